"""`make bench-vmms`: what each VMM costs, in one run in the bench host, as ratios to QEMU's q35.

What: out here a bench host is booted, and this module runs in it once more (`inside`). In there each VMM that
is present has a containerd of its own; in each round every VMM starts one container, every other round
backwards. Of each: the time from the VMM's exec to the agent's answer and to the container's first output,
and the memory of the VMM and of its daemons a moment later. The samples come out as one line of JSON.
Why there: all but QEMU need KVM. Why from exec: what comes before it is ours, and the same for all; Python is
ten times slower in there than outside.
Invariants: a VMM that is not there is named; what is timed is checked to have happened.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ctl.trace import read_phases
from shim.state.trace import TRACE_FILE
from testing.containerd import KATA, Containerd
from testing.guest import PROJECT, Value
from testing.images import busybox_image
from tests.bench.figures import interval
from tests.benchhost.machine import Result, Settings, events

PAGE = PROJECT / "docs/hypervisors.md"
BEGIN, END = "<!-- make bench-vmms -->\n", "<!-- end -->"
PEER = "QEMU q35"
FIGURES = {
    "agent": "exec to the agent's answer, ms",
    "output": "exec to the first output, ms",
    "pss": "PSS of the VMM, MB",
    "daemons": "PSS of its daemons, MB",
}
"""What is measured of each start, by the key in the samples."""

_IMAGE = "local/busybox:1"
_LIMIT = 3000.0  # seconds of a machine
_PATIENCE = 240.0  # for one container
_REST = 2.0  # seconds until what a start has left to do is done
_VARIABLES = ("KATA_CLH", "KATA_DRAGONBALL")  # paths of what no registry has

Overrides = dict[str, dict[str, Value | None]]
Samples = dict[str, dict[str, list[float]]]  # by VMM and figure


@dataclass(frozen=True, slots=True)
class Contender:
    """`program`: the name that the kernel keeps of the VMM's process; `overrides`: the configuration."""

    name: str
    program: str
    overrides: Overrides


# --- in the bench host


def _contenders(folder: Path) -> Iterator[Contender]:
    """Those that are here. `folder` is for what they need."""
    from tests.benchhost import clhs, firecrackers
    from tests.benchhost.conftest import KERNEL_PARAMS

    for machine in ("q35", "microvm"):
        qemu: dict[str, Value | None] = {"machine_type": machine, "kernel_params": KERNEL_PARAMS}
        yield Contender(f"QEMU {machine}", "qemu-system-x86", {"hypervisor.qemu": qemu})
    if (PROJECT / "build/firecracker/firecracker").exists():
        yield _other("Firecracker", "firecracker", firecrackers.section(folder, jailed=False))
    if clhs.clh():
        yield _other("Cloud Hypervisor", "clh", clhs.keys(), "cloud-hyperviso")


def _other(name: str, section: str, keys: Mapping[str, Value | None], program: str = "") -> Contender:
    runtime: dict[str, Value | None] = {"hypervisor_name": section}
    return Contender(name, program or section, {f"hypervisor.{section}": dict(keys), "runtime": runtime})


def inside(rounds: int) -> Samples:
    """Samples of all that are here; the first start of each is not counted."""
    samples: Samples = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-vmms-")))
        archive = folder / "busybox.tar"
        busybox_image(archive, _IMAGE)
        daemons: list[tuple[Contender, Containerd]] = []
        for contender in _contenders(folder):
            merged = dict(contender.overrides)
            merged["agent.kata"] = {"reconnect_timeout_ms": int(_PATIENCE * 1000)}
            daemon = stack.enter_context(Containerd(overrides=merged))
            daemon.ctr("image", "import", str(archive), timeout=_PATIENCE)
            daemons.append((contender, daemon))
            print(f"{contender.name}: {_told(_start(contender, daemon))} (not counted)", flush=True)
            samples[contender.name] = {figure: [] for figure in FIGURES}
        for number in range(rounds):
            for contender, daemon in daemons if number % 2 == 0 else reversed(daemons):
                found = _start(contender, daemon)
                print(f"round {number + 1} of {rounds}, {contender.name}: {_told(found)}", flush=True)
                for figure, value in found.items():
                    samples[contender.name][figure].append(value)
    return samples


def _start(contender: Contender, daemon: Containerd) -> dict[str, float]:
    """One container's figures."""
    name = daemon.new_id("vmm")
    command = ("sh", "-c", "echo x; exec sleep 100000")
    argv = daemon.ctr_argv("run", "--rm", "--runtime", KATA, _IMAGE, name, *command)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=daemon.environment) as process:
        try:
            assert process.stdout is not None
            said, first = os.read(process.stdout.fileno(), 2), time.monotonic()
            assert said == b"x\n", f"{contender.name} ended without a word"
            time.sleep(_REST)
            vmm, others = _processes(contender.program, daemon)
            began = int(Path(f"/proc/{vmm}/stat").read_text().rpartition(")")[2].split()[19])
            exec_ = began / os.sysconf("SC_CLK_TCK")
            phases, _ = read_phases(str(daemon.state_dir(name) / TRACE_FILE))
            (answer,) = [phase.end for phase in phases if phase.name == "agent.connect"]
            return {
                "agent": (answer - exec_) * 1000,
                "output": (first - exec_) * 1000,
                "pss": _pss(vmm),
                "daemons": sum(map(_pss, others)),
            }
        finally:
            daemon.remove(name)
            process.wait(60)


def _processes(program: str, daemon: Containerd) -> tuple[int, list[int]]:
    """The VMM's pid, and those of the daemons that serve it."""
    called: dict[int, str] = {}
    for process in daemon.processes():
        with contextlib.suppress(OSError):
            called[process.pid] = Path(f"/proc/{process.pid}/comm").read_text().strip()
    (vmm,) = [pid for pid, name in called.items() if name == program]
    return vmm, [pid for pid, name in called.items() if name in ("virtiofsd", "vhost-device-vs")]


def _pss(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def _told(found: Mapping[str, float]) -> str:
    return ", ".join(f"{figure} {value:.0f}" for figure, value in found.items())


# --- out here


def table(samples: Samples) -> str:
    """Markdown: a row a VMM; medians, and behind them the ratio to the peer with its 95 % interval."""
    rows = [["", *FIGURES.values()], ["---"] * (1 + len(FIGURES))]
    for name, figures in samples.items():
        rows += [[name, *(_cell(figures[key], samples[PEER][key], name == PEER) for key in FIGURES)]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(ours: Sequence[float], peer: Sequence[float], itself: bool) -> str:
    median = statistics.median(ours)
    if itself or not (median and statistics.median(peer)):
        return f"{median:.0f}"
    low, high = interval(ours, peer)
    return f"{median:.0f}: {median / statistics.median(peer):.2f} ({low:.2f}-{high:.2f})"


def _publish(samples: Samples, rounds: int) -> None:
    """Put the table into docs/hypervisors.md."""
    head, begin, rest = PAGE.read_text().partition(BEGIN)
    assert begin, f"{PAGE} has no place for the table"
    caption = (
        f"{time.strftime('%Y-%m-%d')}, medians of {rounds} rounds, the ratio to {PEER} with its 95 % interval"
    )
    PAGE.write_text(f"{head}{BEGIN}{caption}:\n\n{table(samples)}\n{END}{rest.partition(END)[2]}")


def main() -> int:
    """0 if all that are present could be measured."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.vmms", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="counted starts of each (default: %(default)s)")
    parser.add_argument("--json", default="build/bench/vmms.json", help="samples (default: %(default)s)")
    parser.add_argument("--publish", action="store_true", help="write the table into docs/hypervisors.md")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        os.write(int(os.environ["BENCH_CONTROL_FD"]), json.dumps(inside(options.rounds)).encode() + b"\n")
        return 0
    told = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    words = [*told, sys.executable, "-m", "tests.bench.vmms", "--inside", "--rounds", str(options.rounds)]
    samples: Samples = {}
    results: list[Result] = []
    for event in events(f"exec env {' '.join(words)}", Settings(limit=_LIMIT), results.append):
        if event.kind == "control":
            samples = json.loads(event.data)
        elif event.kind == "output":
            print(event.data.decode(errors="replace"), end="", flush=True)
    if not samples or results[0].code:
        print(results[0].explain() if results else "no machine", file=sys.stderr)
        return 1
    path = Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rounds": options.rounds, "samples": samples}, indent=1) + "\n")
    print(f"\n{table(samples)}\n\n{path} is written; load {os.getloadavg()[0]:.1f} out here at the end")
    if options.publish:
        _publish(samples, options.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
