"""The options that containerd may write to the stdin of `start`.

What: finds the two options that `start` can act on: the cgroup to put the shim in, and 2.3's place
for sockets. Everything else arrives again with CreateTaskRequest.
Why by hand: loading protobuf costs three times what `start` takes.
Invariants: bytes that are no protobuf, or of unknown types, are ignored, never an error: clients
send runc's options to every runtime. Nothing here reads more than the given bytes.

Two messages are possible (facts: containerd 1.6-2.2, and 2.3+):
google.protobuf.Any {1 type_url, 2 value} and
containerd.runtime.bootstrap.v1.BootstrapParams {... 8 repeated Extension{1 Any}, 9 socket_dir};
only the second has fields above 2.
"""

from __future__ import annotations

import errno
import os

__all__ = ["decode", "join_cgroup"]

# Where each options type keeps its shim_cgroup.
_SHIM_CGROUP = {b"containerd.runc.v1.Options": 3, b"containerd.linux.runc.CreateOptions": 9}
_MAX_SOCKET_DIR = 42  # so that <dir>/<64 hex digits> stays a legal socket path


def decode(data: bytes) -> tuple[str, str]:
    """(shim_cgroup, socket_dir), each empty when not given."""
    fields = _fields(data)
    if not any(number > 2 for number, _ in fields):
        return _cgroup_of(fields), ""
    cgroup, socket_dir = "", ""
    for number, value in fields:
        if number == 9:
            socket_dir = _text(value)
        elif number == 8:
            for inner, extension in _fields(value):
                if inner == 1:
                    cgroup = cgroup or _cgroup_of(_fields(extension))
    if not socket_dir.startswith("/") or len(socket_dir) > _MAX_SOCKET_DIR:
        socket_dir = ""
    return cgroup, socket_dir


def join_cgroup(root: str, path: str, pid: int) -> None:
    """Move `pid` to the cgroup `path` below `root`, in every hierarchy that has it (v1 has many).

    The client makes the cgroup. Raises OSError if `path` points outside of `root` or does not exist.
    """
    clean = os.path.normpath("/" + path).lstrip("/")
    if ".." in path.split("/") or not clean:
        raise OSError(errno.EINVAL, f"shim_cgroup {path!a} is not a path below the cgroup root")
    unified = os.path.exists(os.path.join(root, "cgroup.controllers"))
    hierarchies = [""] if unified else sorted(os.listdir(root))
    joined = False
    for hierarchy in hierarchies:
        directory = os.path.join(root, hierarchy, clean)
        # cpu and cpuacct may be links to one hierarchy, or a hierarchy may be none at all.
        if os.path.isdir(directory):
            with open(os.path.join(directory, "cgroup.procs"), "wb") as procs:
                procs.write(b"%d" % pid)
            joined = True
    if not joined:
        raise OSError(errno.ENOENT, f"shim_cgroup {path!a} does not exist below {root}")


def _cgroup_of(any_fields: list[tuple[int, bytes]]) -> str:
    values = dict(any_fields)
    wanted = _SHIM_CGROUP.get(values.get(1, b"").rpartition(b"/")[2])
    if wanted is None:
        return ""
    return _text(dict(_fields(values.get(2, b""))).get(wanted, b""))


def _text(value: bytes) -> str:
    text = value.decode("utf-8", "replace")
    return "" if "\0" in text else text


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, next position); raises IndexError at the end, ValueError when longer than 64 bits."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("varint too long")


def _fields(data: bytes) -> list[tuple[int, bytes]]:
    """(number, bytes) of each length-delimited field, (number, b"") of each other; [] if malformed."""
    found: list[tuple[int, bytes]] = []
    at = 0
    try:
        while at < len(data):
            key, at = _varint(data, at)
            number, wire = key >> 3, key & 7
            value = b""
            if wire == 0:
                _, at = _varint(data, at)
            elif wire == 1:
                at += 8
            elif wire == 5:
                at += 4
            elif wire == 2:
                size, at = _varint(data, at)
                value = data[at : at + size]
                at += size
            else:
                return []
            if at > len(data) or number == 0:
                return []
            found.append((number, value))
    except (IndexError, ValueError):
        return []
    return found
