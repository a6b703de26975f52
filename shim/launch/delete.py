"""The `delete` action: clean up after a container whose shim is gone, or going.

What: `delete` undoes what the journal of the sandbox still records, removes what lies at known
places, and prints DeleteResponse (pid, 137, now).
Why: containerd runs it at the end of *every* container, after a clean shutdown as after kill -9, and
it is the last one who looks.
Invariants:
- Only what belongs to the sandbox that the command line names is touched: containerd's address, namespace and
  id together (`shim.state.identity`). Whose something else is, is said.
- Idempotent; works with any part of the state missing; under containerd's 5 seconds. When the time is up the
  rest stays in the journal for the next one.
- Per id: for a member of a pod whose sandbox lives on, only that member's share goes, and only when
  the daemon (which undoes its own containers) is dead.
- A daemon on its way out (its socket's path is gone) is waited for; one that is not on its way out is
  killed: containerd has forgotten it, so nobody can reach it any more.
- No process is killed by its pid alone, no tree removed across a mount.
- stdout carries the response only. Where nothing is left, which is the rule, hardly anything is loaded.

Exit code 0: nothing of this container is left. 1, with the reason on stderr, which containerd logs: something
could not be undone, or may still be held (a damaged journal), and a second `delete` tries again; or it is
refused because what is here is another containerd's or namespace's. containerd keeps the bundle then. It is
not refused, only told, where containerd removes a bundle whose `start` failed: nothing was made for it.
"""

from __future__ import annotations

import os
import sys
import time

from shim.launch.flags import FlagError, check_id
from shim.state import bundle
from shim.state.identity import RUN_DIR, Identity, key_of_socket

__all__ = ["delete"]

_EXIT_STATUS = 128 + 9
_BUDGET = 4.5  # seconds in total; containerd gives up at 5


class Refused(Exception):  # noqa: N818  (the answer to whoever asked)
    """What is here is another's; the text says whose."""


def delete(namespace: str, container_id: str, grpc_address: str, where: str) -> int:
    """Clean up after `container_id`, whose bundle is the directory `where`. Returns the exit code."""
    until = time.monotonic() + _BUDGET
    problems: list[str] = []
    told = _socket_of(where)
    pid = _read_pid(where)
    try:
        sandbox, is_member = _sandbox(where, told, namespace, container_id, grpc_address)
        note = _somebody_elses(sandbox, told, container_id, where)
    except Refused as refused:
        sys.stderr.write(f"delete {namespace}/{container_id}: refused: {refused}\n")
        return 1
    # containerd 2.3 may have put the socket elsewhere, under the same name.
    ours = os.path.basename(told) == sandbox.digest
    socket = told if ours else os.path.join(bundle.SOCKET_DIR, sandbox.digest)
    if _is_something_left(sandbox, socket, pid):
        from shim.launch import cleanup

        if is_member:
            cleanup.member(sandbox, container_id, until, problems)
        else:
            pid = cleanup.sandbox(sandbox, container_id, socket, pid, until, problems) or pid
    _unmount(os.path.join(where, "rootfs"), problems)
    os.write(1, _response(pid, time.time()))
    for text in [note, *problems] if note else problems:
        sys.stderr.write(f"delete {container_id}: {text}\n")
    return 1 if problems else 0


def _sandbox(
    where: str, told: str, namespace: str, container_id: str, grpc_address: str
) -> tuple[Identity, bool]:
    """(the sandbox of the container, whether it is a member only); its own if the bundle does not tell."""
    own = Identity(grpc_address, namespace, container_id)
    try:
        group = bundle.find_group(where, container_id)
        check_id("sandbox-id", group.sandbox_id)
        return Identity(grpc_address, namespace, group.sandbox_id), group.is_member
    except (bundle.BundleError, FlagError):
        pass
    from shim.state.sandboxes import all_sandboxes

    for found in all_sandboxes():
        pod = found.identity
        if pod is None or pod == own or pod != Identity(grpc_address, namespace, pod.sandbox_id):
            continue
        # It has our address, or a place for the container in what it shares with its guest.
        if pod.digest == os.path.basename(told) or found.has_place_for(container_id):
            return pod, True
    return own, False


def _somebody_elses(own: Identity, told: str, container_id: str, where: str) -> str:
    """What to say of another sandbox that is meant, or could be, when nothing here is ours; "" if none is.

    Raises Refused unless the bundle is one that containerd made for this very container.
    """
    if os.path.lexists(own.state_dir) or os.path.basename(told) == own.digest:
        return ""  # ours is here, or was and has ended
    from shim.launch.remains import old_home
    from shim.state.journalfile import read_identity
    from shim.state.sandboxes import owners_of

    if old_home(own):
        return ""
    if told:
        _, owner = read_identity(os.path.join(RUN_DIR, key_of_socket(told)))
        if owner is not None:
            raise Refused(f"the shim of this bundle is that of {owner}; it is left alone")
    others = ", ".join(map(str, owners_of(own.sandbox_id)))
    if not others:
        return ""
    text = f"nothing here is that of {own}; left alone: {others}"
    if os.path.realpath(where).endswith(f"/{own.namespace}/{container_id}"):
        return text
    raise Refused(text)


def _is_something_left(sandbox: Identity, socket: str, pid: int) -> bool:
    """Whether there is anything of the sandbox, or may be: `pid` is that which its bundle names."""
    places = (sandbox.state_dir, sandbox.share_dir, sandbox.link, socket)
    return any(map(os.path.lexists, places)) or (pid > 1 and os.path.exists(f"/proc/{pid}"))


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


def _unmount(target: str, problems: list[str]) -> None:
    if not os.path.ismount(target):
        return
    from devices.mounts import unmount

    try:
        unmount(target)
    except OSError as error:
        problems.append(f"cannot unmount {target}: {error.strerror}")


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
