"""Disks of vhost-user back ends, as a container's spec names them: by block device nodes that are none.

What: `find` gives the socket of a back end for the number of a block device in `linux.devices`.
Why numbers: an OCI spec has only these for a device. Kata takes reserved ones, and a directory says which
socket each means: `block/devices/NAME` is a node with the number, `block/sockets/NAME` the socket.
Invariants: only the administrator's directory is looked at, and its names are never made of the spec's text.
Source: Kata's enable_vhost_user_store and vhost_user_store_path.
"""

from __future__ import annotations

import os
import stat

from devices.errors import CallerError, HostError

__all__ = ["MAJORS", "find"]

_BLK, _SCSI = 241, 242
MAJORS = frozenset({_BLK, _SCSI})
"""Of block devices, reserved for local use (Documentation/admin-guide/devices.txt): no real disk has them."""
_MAX_NODES = 4096
_PHASE = "devices"


def find(store: str, major: int, minor: int, path: str) -> str:
    """The socket. `store`: the directory, "" for none; `path`: the container's, for messages. Blocks.

    Raises CallerError, HostError when there is no such back end.
    """
    what = f"{path[:200]} ({major}:{minor})"
    if not store:
        raise CallerError(
            f"{what} is a disk of a vhost-user back end, and these are switched off",
            phase=_PHASE,
            hint="enable_vhost_user_store = true",
            code="UNIMPLEMENTED",
        )
    if major == _SCSI:
        raise CallerError(
            f"{what} is a vhost-user-scsi device; supported: vhost-user-blk ({_BLK})",
            phase=_PHASE,
            code="UNIMPLEMENTED",
        )
    name = _node(f"{store}/block/devices", os.makedev(major, minor))
    if not name:
        raise HostError(
            f"{what}: no node in {store}/block/devices has this number",
            phase=_PHASE,
            hint=f"mknod {store}/block/devices/NAME b {major} {minor}",
        )
    socket = f"{store}/block/sockets/{name}"
    try:
        found = stat.S_ISSOCK(os.stat(socket).st_mode)
    except OSError:
        found = False
    if not found:
        raise HostError(f"{what}: {socket} is no socket", phase=_PHASE, hint="start the back end there")
    return socket


def _node(directory: str, number: int) -> str:
    """The name of the node with this number, "" if there is none."""
    try:
        with os.scandir(directory) as entries:
            for _, entry in zip(range(_MAX_NODES), entries, strict=False):
                info = entry.stat(follow_symlinks=False)
                if stat.S_ISBLK(info.st_mode) and info.st_rdev == number:
                    return entry.name
    except OSError as error:
        raise HostError(f"{directory} cannot be read: {error.strerror}", phase=_PHASE) from error
    return ""
