"""`kata-ctl list`: the sandboxes of this host, from their directories and journals below /run/kata.

Why so and not by asking the shims: a shim that hangs, or is gone, is what one wants to see.
Invariants: only reads. A process counts as alive only if its start time is the recorded one, so a
reused pid is not taken for a VM.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass

from devices.plain import plain
from shim.state import healthfile, journalfile, procfs

__all__ = ["SandboxInfo", "read_sandboxes", "run"]

STATE_DIR = "/run/kata"
SHARE_DIR = "/run/kata-containers/shared/sandboxes"


@dataclass(frozen=True, slots=True)
class SandboxInfo:
    """One sandbox. `state`: running, unresponsive (its guest does not answer: `why`, since `since`), starting
    (no process yet), dead (its processes are gone), damaged (its journal cannot be read). `age` in seconds,
    `since` in seconds of the epoch, `memory` resident KiB of its processes."""

    id: str
    state: str
    pid: int
    age: float
    memory: int
    containers: tuple[str, ...]
    processes: tuple[str, ...]
    why: str = ""
    since: float = 0.0


def read_sandboxes(state_dir: str = STATE_DIR, share_dir: str = SHARE_DIR) -> list[SandboxInfo]:
    """All sandboxes, the oldest first."""
    try:
        names = sorted(os.listdir(state_dir))
    except OSError:
        return []
    found = [_read(name, os.path.join(state_dir, name), share_dir) for name in names]
    return sorted((each for each in found if each is not None), key=lambda each: -each.age)


def _read(name: str, path: str, share_dir: str) -> SandboxInfo | None:
    try:
        age = max(0.0, time.time() - os.stat(path).st_ctime)
        if not os.path.isdir(path):
            return None
        records = journalfile.load(path)
    except journalfile.JournalError:
        return SandboxInfo(name, "damaged", 0, age, 0, (), ())
    except OSError:
        return None  # gone meanwhile
    alive: list[tuple[str, int]] = []
    recorded = False
    for record in records:
        pid, start = record.facts.get("pid"), record.facts.get("start")
        if record.kind == "process" and isinstance(pid, int) and isinstance(start, int):
            recorded = True
            if procfs.is_running(pid, start):
                alive.append((str(record.facts.get("name", "process")), pid))
    # The VMM is started last, after the daemons that it connects to.
    vmm = next((pid for process, pid in reversed(alive) if process not in _DAEMONS), 0)
    silence = healthfile.read(path) if vmm else None
    state = "unresponsive" if silence else "running" if vmm else "dead" if recorded else "starting"
    return SandboxInfo(
        name,
        state,
        vmm,
        age,
        sum(_resident(pid) for _, pid in alive),
        _containers(os.path.join(share_dir, name)),
        tuple(f"{process}={pid}" for process, pid in alive),
        silence.why if silence else "",
        silence.since if silence else 0.0,
    )


_DAEMONS = frozenset({"virtiofsd", "vhost-device-vsock", "vsock"})


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    except (OSError, ValueError, IndexError):
        return 0


def _containers(share: str) -> tuple[str, ...]:
    """The folders with a rootfs; the others there are volumes."""
    found: list[str] = []
    for folder in (os.path.join(share, "rw", "passthrough"), os.path.join(share, "roots", "rw")):
        with contextlib.suppress(OSError):
            names = os.listdir(folder)
            found += [name for name in names if os.path.isdir(os.path.join(folder, name, "rootfs"))]
    return tuple(sorted(found))


def _age(seconds: float) -> str:
    whole = int(seconds)
    if whole < 120:
        return f"{whole}s"
    if whole < 7200:
        return f"{whole // 60}m"
    return f"{whole // 3600}h" if whole < 172800 else f"{whole // 86400}d"


def run(*, as_json: bool = False, state_dir: str = STATE_DIR, share_dir: str = SHARE_DIR) -> int:
    """The command; returns its exit code."""
    found = read_sandboxes(state_dir, share_dir)
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=2))
        return 0
    width = max([len(each.id) for each in found] + [7])
    print(f"{'SANDBOX':<{width}}  {'STATE':<12}  {'VMM PID':>7}  {'AGE':>4}  {'RSS MIB':>7}  CONTAINERS")
    for each in found:
        print(
            f"{plain(each.id):<{width}}  {each.state:<12}  {each.pid or '-':>7}  {_age(each.age):>4}  "
            f"{each.memory // 1024 or '-':>7}  {plain(', '.join(each.containers)) or '-'}"
        )
        if each.why:
            print(f"  its guest does not answer, for {_age(time.time() - each.since)}: {plain(each.why)}")
    return 0
