"""`kata-ctl trace`: the phases of one start, from the lines that `shim.state.trace` wrote.

What: finds the run (a live sandbox's file, or the archive's), reads it, and prints phases with their
milliseconds and a bar for each.
Invariants: a line that cannot be read is counted and told, never fatal: the file of a running sandbox may
end within a line. The *start* is the first stretch of phases that no idle second interrupts; what came
later (execs, the stop) is another stretch, so that a pod's month does not flatten its first second.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ctl.chart import draw_svg, draw_text
from ctl.which import Which, name_of, only
from devices.errors import CallerError
from shim.state.identity import KATA_RUN, RUN_DIR
from shim.state.sandboxes import all_sandboxes
from shim.state.trace import ARCHIVE_DIR, TRACE_FILE, owner_of

__all__ = ["Phase", "Run", "find_runs", "read_phases", "run", "stretches"]

IDLE = 1.0
"""Seconds without any phase that end a stretch."""
MAX_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, order=True)
class Phase:
    """One phase; `start` and `end` in seconds of CLOCK_MONOTONIC."""

    start: float
    end: float
    name: str
    id: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """A file with a trace. `written` is when, in seconds since the epoch. `namespace` and `containerd` (the
    address of its socket) are "" where the file does not say."""

    id: str
    path: str
    written: float
    alive: bool
    namespace: str = ""
    containerd: str = ""


def read_phases(path: str) -> tuple[list[Phase], int]:
    """(phases in the order of their starts, number of unreadable lines). Raises CallerError."""
    try:
        with open(path, "rb") as file:
            lines = file.read(MAX_BYTES).splitlines()
    except OSError as error:
        raise CallerError(f"{path}: {error.strerror}", phase="trace") from error
    phases, bad = [], 0
    for line in lines:
        try:
            entry = json.loads(line)
            phase = Phase(
                float(entry["start"]),
                float(entry["end"]),
                str(entry["phase"]),
                str(entry["id"]),
                str(entry.get("error", "")),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            bad += not line.startswith(b'{"trace": ')  # the first line, which says whose it is
        else:
            if math.isfinite(phase.start) and math.isfinite(phase.end):
                phases.append(phase)
            else:  # json reads NaN and Infinity
                bad += 1
    return sorted(phases), bad


def stretches(phases: Iterable[Phase]) -> list[list[Phase]]:
    """Cut sorted phases where nothing happened for more than IDLE seconds."""
    found: list[list[Phase]] = []
    end = 0.0
    for phase in phases:
        if not found or phase.start > end + IDLE:
            found.append([])
            end = phase.end
        found[-1].append(phase)
        end = max(end, phase.end)
    return found


def find_runs(run: str = RUN_DIR, kata: str = KATA_RUN, archive_dir: str = ARCHIVE_DIR) -> list[Run]:
    """All runs that left a trace here, the newest first."""
    found: list[Run] = []

    def add(name: str, path: str, alive: bool) -> None:
        try:
            sandbox, namespace, containerd = owner_of(path)
            written = os.stat(path).st_mtime
        except OSError:
            return  # no trace, or gone meanwhile
        found.append(Run(sandbox or name, path, written, alive, namespace, containerd))

    for each in all_sandboxes(run, kata):
        add(each.name, os.path.join(each.directory, TRACE_FILE), True)
    for name in _names(archive_dir):
        id_, extension = os.path.splitext(name)
        if extension == ".jsonl" and not name.startswith("."):
            add(id_, os.path.join(archive_dir, name), False)
    return sorted(found, key=lambda each: each.written, reverse=True)


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def choose(runs: Sequence[Run], wanted: Which, path: str | None = None) -> Run:
    """The run that `wanted` names, by its id or the beginning of exactly one; the newest if it names none; or
    the file at `path`."""
    if path is not None:
        name = owner_of(path)[0] or os.path.basename(path).removesuffix(".jsonl")
        return Run(name, path, os.stat(path).st_mtime, False)
    if not runs:
        raise CallerError(
            f"no trace in {RUN_DIR} or {ARCHIVE_DIR}",
            phase="trace",
            hint="run a container first; reading traces needs root",
        )
    try:
        if not wanted.id:
            return next(each for each in runs if wanted.fits(each))
        return only(wanted, runs, "trace", f"{wanted.id!r} begins several runs")
    except (LookupError, StopIteration):
        raise CallerError(
            f"no trace of {wanted}",
            phase="trace",
            hint="`kata-ctl trace --list` shows what there is",
        ) from None


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def print_list(runs: Sequence[Run]) -> int:
    """One line for each run."""
    names = [name_of(each, runs) for each in runs]
    width = max([len(name) for name in names] + [3])
    print(f"{'RUN':<{width}}  {'WRITTEN':<19}  {'STATE':<7}  START MS")
    for name, each in zip(names, runs, strict=True):
        try:
            parts = stretches(read_phases(each.path)[0])
        except CallerError:
            continue  # gone meanwhile
        took = f"{_span(parts[0]):8.0f}" if parts else f"{'-':>8}"
        state = "running" if each.alive else "ended"
        print(f"{name:<{width}}  {_when(each.written)}  {state:<7}  {took}")
    return 0


def _span(phases: Sequence[Phase]) -> float:
    """Milliseconds from the first start to the last end."""
    return (max(phase.end for phase in phases) - phases[0].start) * 1000


def run(
    wanted: Which,
    *,
    path: str | None = None,
    svg: str | None = None,
    listing: bool = False,
    everything: bool = False,
    run_dir: str = RUN_DIR,
    kata_dir: str = KATA_RUN,
    archive_dir: str = ARCHIVE_DIR,
) -> int:
    """The command; returns its exit code."""
    runs = find_runs(run_dir, kata_dir, archive_dir)
    if listing:
        return print_list([each for each in runs if wanted.fits(each)])
    chosen = choose(runs, wanted, path)
    phases, bad = read_phases(chosen.path)
    if bad:
        print(f"kata-ctl: {bad} lines of {chosen.path} could not be read", file=sys.stderr)
    if not phases:
        raise CallerError(f"{chosen.path} has no phase in it", phase="trace")
    parts = stretches(phases)
    for number, part in enumerate(parts if everything else parts[:1]):
        title = f"{chosen.id}: {_span(part):.0f} ms"
        if number:
            title += f", {part[0].start - phases[0].start:.1f} s after the start"
        else:
            title += f" to start, written {_when(chosen.written)}"
        print("\n" * bool(number) + "\n".join(draw_text(title, part)))
    if len(parts) > 1 and not everything:
        later = len(phases) - len(parts[0])
        print(f"{later} more phases came later (--all shows them)")
    if svg:
        try:
            with open(svg, "w", encoding="utf-8") as file:
                file.write(draw_svg(f"{chosen.id}: {_span(parts[0]):.0f} ms to start", parts[0]))
        except OSError as error:
            raise CallerError(f"{svg}: {error.strerror}", phase="trace") from error
    return 0
