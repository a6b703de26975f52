"""The table of hypervisors is made from the plugins, and the one in the documentation is the same."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest

from ctl import hypervisors
from ctl.hypervisors import MEANING, device_table, markdown, run, seen, seen_with, table
from devices.kinds import Kind
from devices.undo import MemoryUndo
from hypervisors.base import Capabilities
from hypervisors.registry import get_plugin

DOCUMENT = Path(__file__).parents[3] / "docs" / "hypervisors.md"
BUILT_IN = ("clh", "dragonball", "firecracker", "qemu", "remote")


def test_every_capability_has_a_meaning() -> None:
    assert set(MEANING) == {field.name for field in fields(Capabilities)} - {"devices", "tap_owner"}


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_documented_tables_are_the_code(name: str) -> None:
    plugin = get_plugin(name)
    told = f"\n\n{seen(plugin)}\n\n{markdown(device_table(plugin.capabilities))}\n"
    assert told in DOCUMENT.read_text(), "run: kata-ctl hypervisors --markdown"


def test_versions_in_the_pages_are_those_of_the_drivers() -> None:
    """One that a page names as seen is in the driver's table."""
    pages = {"clh": "cloud-hypervisor.md", "firecracker": "firecracker.md"}
    for name, page in pages.items():
        for version in re.findall(r"[Ss]een with (\d[\d.]*\d)", (DOCUMENT.parent / page).read_text()):
            assert version in seen_with(get_plugin(name)), page
    row = next(
        line
        for line in (DOCUMENT.parent / "hosts.md").read_text().splitlines()
        if line.startswith("| QEMU |")
    )
    assert set(row.split(" | ")[1:]) <= {
        f"{version}{end}" for version in seen_with(get_plugin("qemu")) for end in ("", " |")
    }


async def test_the_table_of_a_microvm_too(tmp_path: Path) -> None:
    qemu = get_plugin("qemu")
    section = qemu.adjust_config(qemu.section(machine_type="microvm"))
    vm = qemu.create(section, sandbox_id="s", state_dir=str(tmp_path), undo=MemoryUndo())
    await vm.prepare_vm("s", None)
    assert markdown(device_table(await vm.capabilities())) in DOCUMENT.read_text()
    await vm.cleanup()


def test_one_table_shows_all() -> None:
    rows = {row[0]: row[1:] for row in table({name: get_plugin(name) for name in BUILT_IN})}
    assert rows[""] == list(BUILT_IN)
    assert rows["virtio-net"] == ["start plug unplug", "start plug", "start", "start plug unplug", "-"]
    assert rows["and without a daemon"] == ["yes", "yes", "yes", "-", "yes"]
    assert rows["save a VM"] == rows["start a saved VM"] == ["yes", "yes", "yes", "yes", "-"]


def test_the_command_lists_all_and_tells_what_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert set(BUILT_IN) <= set(head.split())
    assert len(rows) == len(MEANING) + len(Kind) + 1
    assert re.fullmatch(r"seen with +53\.0 +4\.1\.0 +1\.12\.1 +7\.2\.22 10\.0\.13 11\.1\.3 +-", rows[-1])
    monkeypatch.setattr(hypervisors, "broken_plugins", lambda: {"acme": "ImportError: no acme"})
    assert run(as_json=True) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["broken"] == {"acme": "ImportError: no acme"}
    assert told["hypervisors"]["qemu"]["devices"]["virtio-fs"]["cold-plug"] is True
    assert told["hypervisors"]["clh"]["seen_with"] == ["53.0"]
    assert "API has none" in told["hypervisors"]["firecracker"]["devices"]["virtio-fs"]["cold-plug"]
    assert run() == 1
    assert "acme: installed, but cannot be loaded: ImportError: no acme" in capsys.readouterr().out
