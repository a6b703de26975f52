"""What a template saves: time until the agent answers and until the first output, memory of each further VM.

What: row (i), the same configuration (`shared_fs = "none"`) with a template and without, alternately.
Invariants: as `tests.bench.rows`; the template and the image of the root file system are there before the
first sample, and each VM's trace says that it began with the template, or did not.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from shim.state.trace import TRACE_FILE
from testing.containerd import KATA, Containerd
from testing.guest import Value, write_configuration
from tests.bench.figures import Row, Series
from tests.bench.rows import Progress, alternate, detached, first_byte, pss_by_program

__all__ = ["templates"]

_VMS = 4  # at once
_REST = 3.0  # seconds: what a start has left to do
_RESTORED = "agent.make_own"


def templates(containerd: Containerd, rounds: int, say: Progress) -> list[Row]:
    """(i) from a template against cold."""
    options = _configurations(containerd)
    for each in options.values():  # makes what all later ones find
        with detached(containerd, KATA, options=each):
            pass
    series = alternate(
        rounds,
        {name: partial(first_byte, containerd, KATA, options=each) for name, each in options.items()},
        say,
    )
    ready = alternate(
        max(3, rounds // 2),
        {name: partial(_ready, containerd, name, each) for name, each in options.items()},
        say,
    )
    memory = {name: _further(containerd, each, say) for name, each in options.items()}
    return [
        Row(
            key=key,
            title=title,
            unit=unit,
            ours=measured["template"],
            peer=measured["cold"],
            target=target,
        )
        for key, title, unit, measured, target in (
            ("i1", "agent ready", "ms", ready, 0.08),
            ("i2", "ctr run to first output", "ms", series, 0.30),
            ("i3", f"PSS of QEMU, the last of {_VMS}", "MB", memory, None),
        )
    ]


def _configurations(containerd: Containerd) -> dict[str, tuple[str, ...]]:
    """Options of `ctr run`, by contender."""
    found: dict[str, tuple[str, ...]] = {}
    for name in ("template", "cold"):
        factory: dict[str, Value | None] = {
            "enable_template": name == "template",
            "template_path": str(containerd.root / "templates"),
        }
        path = write_configuration(
            Path(containerd.root, f"{name}.toml"),
            {"hypervisor.qemu": {"shared_fs": "none"}, "hypervisor.qemu.factory": factory},
        )
        found[name] = ("--runtime-config-path", str(path))
    return found


def _phases(containerd: Containerd, name: str) -> Mapping[str, tuple[float, float]]:
    """When the phases of a running sandbox began and ended, in seconds."""
    lines = (containerd.state_dir(name) / TRACE_FILE).read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return {entry["phase"]: (entry["start"], entry["end"]) for entry in entries if entry["id"] == name}


def _ready(containerd: Containerd, contender: str, options: tuple[str, ...]) -> float:
    """Milliseconds from the VMM's start until the agent is there: from a template until it has answered
    twice, else until it is connected, before it answers."""
    with detached(containerd, KATA, options=options) as name:
        phases = _phases(containerd, name)
    assert (_RESTORED in phases) == (contender == "template"), phases
    end = phases[_RESTORED if contender == "template" else "agent.connect"][1]
    return (end - phases["vmm.start"][0]) * 1000


def _further(containerd: Containerd, options: tuple[str, ...], say: Progress) -> Series:
    """What the last one's QEMU adds to the memory of all, in MB: what is shared counts once."""

    def total(names: list[str]) -> float:
        time.sleep(_REST)
        return sum(pss_by_program(containerd, name)["qemu-system"] for name in names)

    with contextlib.ExitStack() as stack:
        names = [stack.enter_context(detached(containerd, KATA, options=options)) for _ in range(_VMS - 1)]
        before = total(names)
        names.append(stack.enter_context(detached(containerd, KATA, options=options)))
        after = total(names)
    say(f"PSS of {_VMS - 1} VMs {before:.1f} MB, of {_VMS} {after:.1f} MB")
    return Series("template" if "template" in options[1] else "cold", (after - before,))
