"""What `delete` does where something of a sandbox is left: end its daemon, undo what that leaves.

What: `sandbox` cleans a whole one, `member` one container of a pod.
Why apart from `delete`: that one decides who is meant, and mostly finds nothing; this loads what it takes.
Invariants: see `shim.launch.delete`; both layouts of state directories are seen to, each by its own rules.
"""

from __future__ import annotations

import os
import time

from shim.state.identity import SHARED_ROOT, Identity
from shim.state.journalfile import Record
from shim.state.procfs import is_running, kill_process, start_time

__all__ = ["member", "sandbox"]

_WAIT_FOR_DAEMON = 3.0  # seconds that a daemon may take to finish by itself
_WAIT_FOR_END = 1.0  # seconds after SIGKILL
_WAIT_FOR_LOCK = 1.0  # seconds that somebody else who cleans up may take


def _left(until: float, most: float) -> float:
    return max(0.05, min(most, until - time.monotonic()))


def _homes(identity: Identity) -> list[tuple[str, str]]:
    """(state directory, share) of each layout."""
    homes = [(identity.state_dir, identity.share_dir)]
    if os.path.isdir(identity.link) and not os.path.islink(identity.link):
        from shim.launch.remains import old_home

        if old := old_home(identity):
            homes.append((old, os.path.join(SHARED_ROOT, identity.sandbox_id)))
    return homes


def member(identity: Identity, container_id: str, until: float, problems: list[str]) -> None:
    """Clean one container of a pod, unless the pod's own daemon is alive and does it better."""
    from shim.launch.remains import NotOurs, Remains, daemon_of, read, remove
    from shim.state.sandboxes import places_of
    from shim.state.statedir import Owned, StateDir, is_owned

    for directory, share in _homes(identity):
        if is_owned(directory) or daemon_of(read(directory)) is not None:
            return
        try:
            home = StateDir.find(directory, _left(until, _WAIT_FOR_LOCK))
        except Owned:
            return
        if home is not None:
            try:
                remains = Remains(home, share, identity)
                remains.release_of(container_id, until)
                problems += remains.problems
            except NotOurs as whose:
                problems.append(str(whose))
                continue
            finally:
                home.close()
        for path in places_of(share, container_id):
            remove(path, until, problems)


def sandbox(
    identity: Identity, container_id: str, socket: str, told_pid: int, until: float, problems: list[str]
) -> int:
    """Clean everything of a sandbox; returns the VMM's pid if it is known. `told_pid`: the daemon's, as the
    bundle names it."""
    pid = 0
    for directory, share in _homes(identity):
        daemon = _daemon(identity, container_id, directory, told_pid)
        if daemon is not None:
            _end_daemon(*daemon, socket, until, problems)
        if os.path.lexists(directory) or os.path.lexists(share):
            pid = _undo(identity, directory, share, until, problems) or pid
    if os.path.lexists(socket) or os.path.islink(identity.link):
        from shim.state.names import remove_link

        try:
            if not _unlinked(socket, until):
                problems.append(f"somebody listens on {socket}")
            remove_link(identity.link, identity.state_dir)
        except OSError as error:
            problems.append(f"cannot remove {error.filename}: {error.strerror}")
    return pid


def _unlinked(socket: str, until: float) -> bool:
    """Remove the socket of a daemon that is dead, or dying: its memory, and with it what tells whose it is,
    goes before its descriptors, so that nothing but the socket is left to wait for."""
    from shim.state.names import unlink_dead

    until = time.monotonic() + _left(until, _WAIT_FOR_END)
    while not unlink_dead(socket):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def _undo(identity: Identity, directory: str, share: str, until: float, problems: list[str]) -> int:
    from shim.launch.remains import NotOurs, Remains, remove
    from shim.state.statedir import Owned, StateDir, holder

    try:
        home = StateDir.find(directory, _left(until, _WAIT_FOR_LOCK))
    except Owned:
        problems.append(f"{directory} is in use by process {holder(directory)}")
        return 0
    if home is None:
        remove(share, until, problems)
        return 0
    try:
        remains = Remains(home, share, identity)
        pid = _vmm(remains.history.records)
        if remains.undo(until):
            home.remove()
        problems += remains.problems
        return pid
    except (NotOurs, OSError) as error:
        problems.append(str(error))
        return 0
    finally:
        home.close()


def _vmm(records: list[Record]) -> int:
    """The pid of the first process that is not the shim."""
    for record in records:
        if record.kind == "process" and record.facts.get("name") != "shim" and "pid" in record.facts:
            return int(record.facts["pid"])
    return 0


def _daemon(identity: Identity, container_id: str, directory: str, told_pid: int) -> tuple[int, int] | None:
    """(pid, start time) of the sandbox's daemon if it runs.

    One whose journal is damaged is known by the lock, one that has none yet by the bundle; both must have
    been started for this container.
    """
    holding = 0
    if os.path.lexists(directory):
        from shim.launch.remains import daemon_of, read
        from shim.state.statedir import holder

        history = read(directory)
        if history.identity not in (None, identity):
            return None
        record = daemon_of(history)
        if record is not None:
            return int(record.facts["pid"]), int(record.facts["start"])
        holding = holder(directory)
    from shim.launch.strays import shim_of

    for pid in (holding, told_pid):
        try:
            start = start_time(pid) if pid > 1 else 0
            ours = start and shim_of(pid, identity.namespace, identity.address, container_id)
            if ours and is_running(pid, start):
                return pid, start
        except OSError:
            continue
    return None


def _end_daemon(pid: int, start: int, socket: str, until: float, problems: list[str]) -> None:
    if not os.path.lexists(socket):
        _wait_gone(pid, start, _left(until, _WAIT_FOR_DAEMON))
    if not kill_process(pid, start, _left(until, _WAIT_FOR_END)):
        problems.append(f"the shim (pid {pid}) did not end after SIGKILL")


def _wait_gone(pid: int, start: int, timeout: float) -> None:
    """Wait for the end of a process that is about to end."""
    import select

    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if is_running(pid, start):
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(timeout * 1000)
    finally:
        os.close(fd)
