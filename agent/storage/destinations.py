"""Where a container's volumes are to be mounted, made where only a dangling link leads there.

What: `make_destinations` goes through the bind mounts of a config.json before crun does.
Why: crun makes a missing destination, but not the missing target of a link of the image (`/opt/current ->
releases/7`, to be filled by a volume): it ends with an errno of openat2. runc makes it.
Invariants: nothing outside the container's root is looked at or made: the kernel resolves what is there, and
what is missing is made name by name below open directories, with links followed as a process with that root
would. Whatever goes wrong here is left to crun, which says it better.
Source: openat2(2), path_resolution(7).
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Mapping
from typing import Any

from agent import log

__all__ = ["make_destinations"]

_OPENAT2 = 437
_RESOLVE_IN_ROOT, _RESOLVE_NO_MAGICLINKS = 0x10, 0x02
_LINKS = 40  # as the kernel follows at most
_NAMED = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def make_destinations(config: Mapping[str, Any]) -> None:
    """Blocks. Never raises."""
    volumes = [mount for mount in config.get("mounts", ()) if mount.get("type") == "bind"]
    if not volumes:
        return
    try:
        root = os.open(config["root"]["path"], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        for mount in volumes:
            try:
                if not _is_there(root, mount["destination"]):
                    _make(root, mount["destination"], os.path.isdir(mount["source"]))
            except OSError as error:
                log.debug(f"the mount's destination {mount['destination']}: {error}")
    finally:
        os.close(root)


def _is_there(root: int, path: str) -> bool:
    how = _How(os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    found: int = _libc.syscall(
        _OPENAT2,
        root,
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if found >= 0:
        os.close(found)
        return True
    number = ctypes.get_errno()
    if number != 2:  # ENOENT
        raise OSError(number, os.strerror(number))
    return False


def _make(root: int, path: str, directory: bool) -> None:
    """Make what is missing of `path` from the first link on; nothing if no link leads there."""
    way = [os.dup(root)]  # the directories from the root to where we are
    names = path.split("/")
    links = 0
    try:
        while names:
            name = names.pop(0)
            if name in ("", "."):
                continue
            if name == "..":
                if len(way) > 1:
                    os.close(way.pop())
                continue
            try:
                there = os.open(name, _NAMED, dir_fd=way[-1])
            except FileNotFoundError:
                if not links:
                    return
                there = _new(name, way[-1], directory or any(names))
            way.append(there)
            if stat.S_ISLNK(os.fstat(there).st_mode):
                links += 1
                if links > _LINKS:
                    return
                target = os.readlink("", dir_fd=there)
                os.close(way.pop())
                while target.startswith("/") and len(way) > 1:
                    os.close(way.pop())
                names[:0] = target.split("/")
    finally:
        for fd in way:
            os.close(fd)


def _new(name: str, parent: int, directory: bool) -> int:
    if directory:
        os.mkdir(name, 0o755, dir_fd=parent)
    else:
        os.close(
            os.open(
                name,
                os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC,
                0o644,
                dir_fd=parent,
            )
        )
    return os.open(name, _NAMED, dir_fd=parent)
