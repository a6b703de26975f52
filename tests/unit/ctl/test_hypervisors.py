"""The table of hypervisors is made from the plugins, and the one in the documentation is the same."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from ctl import hypervisors
from ctl.hypervisors import MEANING, device_table, markdown, run, table
from devices.kinds import Kind
from devices.undo import MemoryUndo
from hypervisors.base import Capabilities
from hypervisors.registry import get_plugin

DOCUMENT = Path(__file__).parents[3] / "docs" / "hypervisors.md"
BUILT_IN = ("clh", "dragonball", "firecracker", "qemu")


def test_every_capability_has_a_meaning() -> None:
    assert set(MEANING) == {field.name for field in fields(Capabilities)} - {"devices", "tap_owner"}


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_documented_tables_are_the_code(name: str) -> None:
    rows = device_table(get_plugin(name).capabilities)
    assert markdown(rows) in DOCUMENT.read_text(), "run: kata-ctl hypervisors --markdown"


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
    assert rows["virtio-net"] == ["start plug unplug", "start plug", "start", "start plug unplug"]
    assert rows["and without a daemon"] == ["yes", "yes", "yes", "-"]
    assert rows["save a VM"] == rows["start a saved VM"] == ["yes", "yes", "yes", "yes"]


def test_the_command_lists_all_and_tells_what_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert set(BUILT_IN) <= set(head.split())
    assert len(rows) == len(MEANING) + len(Kind)
    monkeypatch.setattr(hypervisors, "broken_plugins", lambda: {"acme": "ImportError: no acme"})
    assert run(as_json=True) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["broken"] == {"acme": "ImportError: no acme"}
    assert told["hypervisors"]["qemu"]["devices"]["virtio-fs"]["cold-plug"] is True
    assert "API has none" in told["hypervisors"]["firecracker"]["devices"]["virtio-fs"]["cold-plug"]
    assert run() == 1
    assert "acme: installed, but cannot be loaded: ImportError: no acme" in capsys.readouterr().out
