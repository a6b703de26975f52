"""The `delete` action: clean up after a container whose shim is gone, or going.

What: `delete` undoes what the journal of the sandbox still records, removes what lies at known
places, and prints DeleteResponse (pid, 137, now).
Why: containerd runs it at the end of *every* container, after a clean shutdown as after kill -9, and
it is the last one who looks.
Invariants:
- Idempotent; works with any part of the state missing; under containerd's 5 seconds.
- Per id: for a member of a pod whose sandbox lives on, only that member's share goes, and only when
  the daemon (which undoes its own containers) is dead.
- A daemon on its way out (its socket's path is gone) is waited for; one that is not on its way out is
  killed: containerd has forgotten it, so nobody can reach it any more.
- No process is killed by its pid alone, no tree removed across a mount.
- stdout carries the response only. What could not be undone is told on stderr with exit code 1, and
  containerd logs it; a second `delete` tries again.
"""

from __future__ import annotations

import os
import sys
import time

from shim.launch.flags import FlagError, check_id
from shim.state import bundle
from shim.state.journalfile import JournalError, Record, load

__all__ = ["clear_remains", "delete"]

_EXIT_STATUS = 128 + 9
_WAIT_FOR_DAEMON = 3.0  # seconds that a daemon may take to finish by itself
_BUDGET = 4.5  # seconds in total; containerd gives up at 5


def delete(namespace: str, container_id: str, grpc_address: str, where: str) -> int:
    """Clean up after `container_id`, whose bundle is the directory `where`. Returns the exit code."""
    started = time.monotonic()
    group = _group(where, namespace, container_id, grpc_address)
    problems: list[str] = []
    pid = _read_pid(where)
    if group.is_member:
        _delete_member(group.sandbox_id, container_id, problems)
    else:
        path = bundle.socket_path(grpc_address, namespace, group.sandbox_id)
        told = _socket_of(where)  # containerd 2.3 may have put it elsewhere, under the same name
        if os.path.basename(told) == os.path.basename(path):
            path = told
        pid = _delete_sandbox(group.sandbox_id, path, started, problems) or pid
    _unmount(os.path.join(where, "rootfs"), problems)
    os.write(1, _response(pid, time.time()))
    for problem in problems:
        sys.stderr.write(f"delete {container_id}: {problem}\n")
    return 1 if problems else 0


def _group(where: str, namespace: str, container_id: str, grpc_address: str) -> bundle.Group:
    """The sandbox of the container; its own when the bundle does not tell (any more)."""
    try:
        group = bundle.find_group(where, container_id)
        check_id("sandbox-id", group.sandbox_id)
        return group
    except (bundle.BundleError, FlagError):
        pass
    told = os.path.basename(_socket_of(where))
    for sandbox_id in sorted({*_list(bundle.KATA_RUN), *_list(bundle.SHARED_ROOT)} - {container_id}):
        # It has our address, or a place for the container in what it shares with its guest.
        socket = os.path.basename(bundle.socket_path(grpc_address, namespace, sandbox_id))
        if told == socket or any(map(os.path.isdir, _member_dirs(sandbox_id, container_id))):
            return bundle.Group(sandbox_id, True)
    return bundle.Group(container_id, False)


def _member_dirs(sandbox_id: str, container_id: str) -> list[str]:
    share = bundle.share_dir(sandbox_id)
    return [os.path.join(share, mode, "passthrough", container_id) for mode in ("rw", "ro")]


def _list(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _read_pid(where: str) -> int:
    try:
        with open(os.path.join(where, "shim.pid")) as file:
            return int(file.read(20))
    except (OSError, ValueError):
        return 0


def _socket_of(where: str) -> str:
    """The socket named in the bundle's `address`, if it lies where sockets of shims lie."""
    try:
        with open(os.path.join(where, "address")) as file:
            address = file.read(256).strip()
    except (OSError, ValueError):
        return ""
    path = address.removeprefix("unix://")
    name = os.path.basename(path)
    if path.startswith("/") and ".." not in path.split("/") and len(name) == 64 and name.isalnum():
        return path
    return ""


def _delete_member(sandbox_id: str, container_id: str, problems: list[str]) -> None:
    """Clean one container of a pod, unless the pod's own daemon is alive and does it better."""
    try:
        records = load(bundle.state_dir(sandbox_id))
    except JournalError as error:
        problems.append(str(error))
        return
    if _daemon(records) is not None:
        return
    mine = [record for record in records if record.facts.get("container") == container_id]
    _release_all(mine, problems)
    for path in _member_dirs(sandbox_id, container_id):
        _remove(path, problems)


def _delete_sandbox(sandbox_id: str, socket: str, started: float, problems: list[str]) -> int:
    """Clean everything of a sandbox; returns the VMM's pid if it is known."""
    directory = bundle.state_dir(sandbox_id)
    records = _load(directory, problems)
    daemon = _daemon(records)
    if daemon is not None:
        pid, start = int(daemon.facts["pid"]), int(daemon.facts["start"])
        if not os.path.lexists(socket):
            _wait_gone(pid, start, _WAIT_FOR_DAEMON)
        from shim.state.procfs import kill_process

        if not kill_process(pid, start, 1.0):
            problems.append(f"the shim (pid {pid}) did not end after SIGKILL")
        records = _load(directory, problems)  # it may have written until now
    vmm = [record for record in records if record.kind == "process" and record.facts.get("name") != "shim"]
    pid = next((int(record.facts["pid"]) for record in vmm if "pid" in record.facts), 0)
    _release_all(records, problems, started)
    if problems or any(record.kind == "process" and "pid" not in record.facts for record in records):
        _kill_strays(sandbox_id, problems)
    _unlink(socket, problems)
    for path in (bundle.share_dir(sandbox_id), directory):
        _remove(path, problems)
    return pid


def clear_remains(sandbox_id: str, keep: str) -> list[str]:
    """Undo what a shim that is gone has left of this sandbox; returns what could not be undone.

    `keep` is the socket of the caller, the next shim of the same sandbox: it has the same path. While
    the earlier shim lives nothing is touched.
    """
    directory = bundle.state_dir(sandbox_id)
    problems: list[str] = []
    records = _load(directory, problems)
    if problems or _daemon(records) is not None:
        return problems or [f"the shim of sandbox {sandbox_id} still runs"]
    _release_all([record for record in records if record.facts.get("path") != keep], problems)
    if not problems:
        for path in (bundle.share_dir(sandbox_id), directory):
            _remove(path, problems)
    return problems


def _load(directory: str, problems: list[str]) -> list[Record]:
    try:
        return load(directory)
    except JournalError as error:
        problems.append(str(error))
        return []


def _daemon(records: list[Record]) -> Record | None:
    """The record of the daemon if it still runs."""
    for record in records:
        if record.kind == "process" and record.facts.get("name") == "shim":
            from shim.state.procfs import is_running

            pid, start = record.facts.get("pid"), record.facts.get("start")
            if isinstance(pid, int) and isinstance(start, int) and is_running(pid, start):
                return record
    return None


def _wait_gone(pid: int, start: int, timeout: float) -> None:
    """Wait for the end of a process that is about to end."""
    import select

    from shim.state.procfs import is_running

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


def _release_all(records: list[Record], problems: list[str], started: float | None = None) -> None:
    """Release in reverse. All processes first: they hold what the other records name."""
    from shim.launch.undo_kinds import release
    from shim.state.releases import ReleaseError

    processes = [record for record in records if record.kind == "process"]
    others = [record for record in records if record.kind != "process"]
    for record in [*reversed(processes), *reversed(others)]:
        left = _BUDGET if started is None else _BUDGET - (time.monotonic() - started)
        try:
            release(record, max(0.1, min(2.0, left)))
        except (ReleaseError, OSError) as error:
            problems.append(f"{record.kind}: {error}")


def _kill_strays(sandbox_id: str, problems: list[str]) -> None:
    """Kill what was started for this sandbox but never reached the journal.

    Between fork and the journal's next line a helper runs whose pid nobody wrote down. Such a one is
    known by its command line: it names a directory of this sandbox (0700), or, a VMM whose sockets
    are passed as descriptors, the sandbox itself as its `-name`.
    """
    from shim.state.procfs import kill_process, start_time

    directories = (bundle.state_dir(sandbox_id), bundle.share_dir(sandbox_id))
    needles = [f"{path}/".encode() for path in directories] + [f"\0sandbox-{sandbox_id},".encode()]
    for name in _list("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                words = file.read(1 << 16)
            if not any(needle in words for needle in needles):
                continue
            if os.stat(f"/proc/{name}").st_uid not in (0, os.geteuid()):
                continue
            if not kill_process(int(name), start_time(int(name)), 1.0):
                problems.append(f"process {name} did not end after SIGKILL")
        except (OSError, ValueError):
            continue


def _unmount(target: str, problems: list[str]) -> None:
    if not os.path.ismount(target):
        return
    from devices.mounts import unmount

    try:
        unmount(target)
    except OSError as error:
        problems.append(f"cannot unmount {target}: {error.strerror}")


def _remove(path: str, problems: list[str]) -> None:
    """Remove a tree of ours, and what is still mounted in it."""
    if not os.path.lexists(path):
        return
    from devices.mounts import unmount_below
    from shim.state.safefs import remove_tree

    try:
        unmount_below(path)
        remove_tree(path)
    except OSError as error:
        problems.append(str(error))


def _unlink(path: str, problems: list[str]) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        problems.append(f"cannot remove {path}: {error.strerror}")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _response(pid: int, now: float) -> bytes:
    """DeleteResponse {1 pid, 2 exit_status, 3 exited_at Timestamp {1 seconds, 2 nanos}}, by hand."""
    seconds = int(now)
    timestamp = b"\x08" + _varint(seconds) + b"\x10" + _varint(int((now - seconds) * 1e9))
    head = b"\x08" + _varint(pid) if pid > 0 else b""
    return head + b"\x10" + _varint(_EXIT_STATUS) + b"\x1a" + _varint(len(timestamp)) + timestamp
