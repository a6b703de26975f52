"""What a template saves: time until the agent answers and until the first output, memory of each further VM.

What: row (i), the same configuration (`shared_fs = "none"`) with a template and without, alternately.
Invariants: as `tests.bench.rows`; the template and the image of the root file system are there before the
first sample, and each VM's trace says that it began with the template, or did not.
"""

from __future__ import annotations

import contextlib
import json
import time
from functools import partial
from pathlib import Path

from shim.state.trace import ARCHIVE_DIR
from testing.containerd import KATA, Containerd
from testing.guest import Value, write_configuration
from tests.bench.figures import Row, Series
from tests.bench.rows import Progress, alternate, detached, first_byte, pss_by_program

__all__ = ["templates"]

_VMS = 3  # at once
_PATIENCE = 20.0  # seconds for a shim to end
_REST = 3.0  # seconds: what a start has left to do
_RESTORED = "agent.make_own"


def templates(containerd: Containerd, rounds: int, say: Progress) -> list[Row]:
    """(i) from a template against cold."""
    options = _configurations(containerd)
    for each in options.values():  # makes what all later ones find
        with detached(containerd, KATA, options=each):
            pass
    ready: dict[str, list[float]] = {name: [] for name in options}

    def once(name: str) -> float:
        took = first_byte(containerd, KATA, options=options[name])
        ready[name].append(_ready(containerd, name))
        return took

    series = alternate(rounds, {name: partial(once, name) for name in options}, say)
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
            ("i1", "agent ready", "ms", {n: Series(n, tuple(all_)) for n, all_ in ready.items()}, 0.08),
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


def _ready(containerd: Containerd, contender: str) -> float:
    """Milliseconds from the VMM's start until the agent was there, of the container that ended last: from a
    template until it had answered twice, else until it was connected, before it answered."""
    name = containerd.ids[-1]
    path = Path(ARCHIVE_DIR, f"{containerd.key(name)}.jsonl")
    end = time.monotonic() + _PATIENCE
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    phases = {one["phase"]: (one["start"], one["end"]) for one in entries if one.get("id") == name}
    assert (_RESTORED in phases) == (contender == "template"), phases
    last = phases[_RESTORED if contender == "template" else "agent.connect"][1]
    return float(last - phases["vmm.start"][0]) * 1000


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
