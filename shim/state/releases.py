"""How a journal record is undone when its owner is gone.

What: `release(record)`, used by `delete` after a crash and by the journal for records that came
without a function of their own. `KINDS` are those that any wing records; `shim.launch.undo_kinds` adds
those of one wing.
Why: the daemon that knew better is dead; all that is left of an acquisition are its facts.
Invariants: each release is idempotent, treats what is gone as released, and blocks at most `timeout`
seconds; paths are never followed through symbolic links, trees never left across a mount.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Mapping

from shim.state.journalfile import Record

__all__ = ["KINDS", "Facts", "Release", "ReleaseError", "release"]

Facts = dict[str, str | int]
Release = Callable[[Facts, float], None]


class ReleaseError(Exception):
    """It could not be undone; the text says what and why."""


def release(record: Record, timeout: float = 2.0, *, kinds: Mapping[str, Release] | None = None) -> None:
    """Undo one acquisition of one of `kinds` (default: `KINDS`). Raises ReleaseError or OSError. Blocks."""
    function = (KINDS if kinds is None else kinds).get(record.kind)
    if function is None:
        raise ReleaseError(f"do not know how to release a {record.kind!r} ({record.facts})")
    try:
        function(record.facts, timeout)
    except (ValueError, TypeError, OverflowError) as error:  # no path or number that the kernel has: spoilt
        raise ReleaseError(f"{record!r:.200} makes no sense: {error}") from error


def _path(facts: Facts) -> str:
    path = facts.get("path")
    if not isinstance(path, str) or not path.startswith("/") or ".." in path.split("/"):
        raise ReleaseError(f"not an absolute path: {path!r}")
    return path


def _process(facts: Facts, timeout: float) -> None:
    from shim.state.procfs import kill_process

    _end(facts, timeout, kill_process)


def _logger(facts: Facts, timeout: float) -> None:
    """A `binary://` logger: its pipes ended with the shim, so it is writing down the last of them."""
    from shim.state.procfs import end_process

    _end(facts, timeout, end_process)


def _end(facts: Facts, timeout: float, function: Callable[[int, int, float], bool]) -> None:
    pid, start = facts.get("pid"), facts.get("start")
    if not isinstance(pid, int) or not isinstance(start, int):
        return  # recorded, but never seen to run: `shim.launch.strays` finds such by their mark
    if pid <= 1:
        raise ReleaseError(f"pid {pid} is not a process of ours")
    if not function(pid, start, timeout):
        raise ReleaseError(f"{facts.get('name', 'process')} (pid {pid}) did not end within {timeout} s")


def _file(facts: Facts, _timeout: float) -> None:
    path = _path(facts)
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            raise ReleaseError(f"{path} is a directory, recorded as a file")
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        pass


def _socket(facts: Facts, timeout: float) -> None:
    """One whose place others may take is removed only if it is the one that was recorded."""
    path, inode, made = _path(facts), facts.get("inode"), facts.get("made")
    if not isinstance(inode, int) or not isinstance(made, int):
        _file(facts, timeout)
        return
    from shim.state.names import unlink_socket

    unlink_socket(path, inode, made)


def _link(facts: Facts, _timeout: float) -> None:
    from shim.state.names import remove_link

    remove_link(_path(facts), str(facts.get("target")))


def _dir(facts: Facts, _timeout: float) -> None:
    from shim.state.safefs import remove_tree

    remove_tree(_path(facts))


def _mount(facts: Facts, _timeout: float) -> None:
    from devices.mounts import unmount

    unmount(_path(facts))


def _cgroup(facts: Facts, timeout: float) -> None:
    """A cgroup directory of either version: kill what is in it, wait for its end, remove it."""
    from shim.state.procfs import kill_process, start_time

    path = _path(facts)
    until = time.monotonic() + timeout
    try:
        with open(os.path.join(path, "cgroup.procs")) as procs:
            pids = [int(word) for word in procs.read().split()]
    except FileNotFoundError:
        return
    for pid in pids:
        try:
            kill_process(pid, start_time(pid), max(0.0, until - time.monotonic()))
        except ProcessLookupError:
            continue
    while True:
        try:
            os.rmdir(path)
            return
        except FileNotFoundError:
            return
        except OSError:  # the kernel lets go of the dead a moment later, and tells nobody
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def _pci_driver(facts: Facts, timeout: float) -> None:
    """Give a PCI function back to the driver that it was taken from."""
    from devices.errors import KataError
    from devices.pci_driver import restore

    try:
        restore(facts, timeout=timeout)
    except (KataError, ValueError) as error:
        raise ReleaseError(str(error)) from error


def _user(facts: Facts, timeout: float) -> None:
    """A number of a user that a sandbox had for itself."""
    from devices.users import give_back

    give_back(facts, timeout)


KINDS: Mapping[str, Release] = {
    "user": _user,
    "pci-driver": _pci_driver,
    "process": _process,
    "logger": _logger,
    "socket": _socket,
    "link": _link,
    "file": _file,
    "dir": _dir,
    "mount": _mount,
    "cgroup": _cgroup,
}
