"""`kata-ctl list`: the sandboxes of this host, from their state directories and journals.

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

from ctl.which import name_of
from devices.plain import plain
from shim.state import healthfile, journalfile, procfs
from shim.state.identity import KATA_RUN, RUN_DIR, SHARED_ROOT
from shim.state.sandboxes import Found, all_sandboxes

__all__ = ["SandboxInfo", "read_sandboxes", "run"]


@dataclass(frozen=True, slots=True)
class SandboxInfo:
    """One sandbox. `namespace`, `containerd` (the address of its socket): whose it is, "" where that is not
    written (by older shims). `state`: running, unresponsive (its guest does not answer: `why`, since
    `since`), orphaned (its VM lives, its shim does not: `kata-ctl recover`), starting (no VMM yet), stopped
    (its VM has ended and its shim is asked for what was: a task that has ended and is not deleted), dead
    (its processes are gone), damaged (its journal cannot be read to the end). `pid`: the VMM's, 0 without
    one. `age` in seconds, `since` in seconds of the epoch, `memory` resident KiB of its processes.
    """

    id: str
    namespace: str
    containerd: str
    directory: str
    state: str
    pid: int
    age: float
    memory: int
    containers: tuple[str, ...]
    processes: tuple[str, ...]
    why: str = ""
    since: float = 0.0


def read_sandboxes(run: str = RUN_DIR, kata: str = KATA_RUN, shared: str = SHARED_ROOT) -> list[SandboxInfo]:
    """All sandboxes, the oldest first."""
    found = [_read(each) for each in all_sandboxes(run, kata, shared)]
    return sorted((each for each in found if each is not None), key=lambda each: -each.age)


def _read(found: Found) -> SandboxInfo | None:
    records: list[journalfile.Record] = []
    damaged = given_up = False
    try:
        age = max(0.0, time.time() - os.stat(found.directory).st_ctime)
        history = journalfile.load(found.directory)
        records, damaged, given_up = history.records, bool(history.damage), history.has_released
    except journalfile.JournalError:
        damaged = True
    except OSError:
        return None  # gone meanwhile
    alive: list[tuple[str, int]] = []
    recorded = had_shim = False
    for record in records:
        pid, start = record.facts.get("pid"), record.facts.get("start")
        if record.kind == "process" and isinstance(pid, int) and isinstance(start, int):
            recorded = True
            had_shim = had_shim or record.facts.get("name") == _SHIM
            if procfs.is_running(pid, start):
                alive.append((str(record.facts.get("name", "process")), pid))
    # The VMM is started last, after the daemons that it connects to.
    others = [(process, pid) for process, pid in alive if process not in _DAEMONS]
    shim = any(process == _SHIM for process, _ in others)
    vmm = next((pid for process, pid in reversed(others) if process != _SHIM), 0)
    elsewhere = shim and any(record.kind == _REMOTE for record in records)
    silence = healthfile.read(found.directory) if vmm or elsewhere else None
    if damaged:
        state = "damaged"
    elif elsewhere:
        state = "unresponsive" if silence else "running"
    elif vmm:
        state = "orphaned" if had_shim and not shim else "unresponsive" if silence else "running"
    elif shim:
        # A sandbox has a directory that it shares for as long as it has, or is to have, a VM.
        ended = given_up and not any(record.kind in _OF_A_VM for record in records)
        state = "stopped" if ended else "starting"
    else:
        state = "dead" if recorded else "starting"
    owner = found.identity
    return SandboxInfo(
        found.name,
        owner.namespace if owner else "",
        owner.address if owner else "",
        found.directory,
        state,
        vmm,
        age,
        sum(_resident(pid) for _, pid in alive),
        _containers(found.share),
        tuple(f"{process}={pid}" for process, pid in alive),
        silence.why if silence else "",
        silence.since if silence else 0.0,
    )


_SHIM = "shim"
_REMOTE = "remote-vm"  # on another machine, without a process here
_OF_A_VM = frozenset({"dir", "mount", "cgroups"})
_DAEMONS = frozenset({"virtiofsd", "vhost-device-vsock", "vsock", "mounts"})


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


def run(
    *, as_json: bool = False, run_dir: str = RUN_DIR, kata_dir: str = KATA_RUN, shared: str = SHARED_ROOT
) -> int:
    """The command; returns its exit code."""
    found = read_sandboxes(run_dir, kata_dir, shared)
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=2))
        return 0
    names = [plain(name_of(each, found)) for each in found]
    width = max([len(name) for name in names] + [7])
    print(f"{'SANDBOX':<{width}}  {'STATE':<12}  {'VMM PID':>7}  {'AGE':>4}  {'RSS MIB':>7}  CONTAINERS")
    for name, each in zip(names, found, strict=True):
        print(
            f"{name:<{width}}  {each.state:<12}  {each.pid or '-':>7}  {_age(each.age):>4}  "
            f"{each.memory // 1024 or '-':>7}  {plain(', '.join(each.containers)) or '-'}"
        )
        if each.why:
            print(f"  its guest does not answer, for {_age(time.time() - each.since)}: {plain(each.why)}")
    return 0
