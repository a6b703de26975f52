"""The system calls that Python 3.11 has no function for, by ctypes.

What: one thin function per call: it raises OSError with errno and path, and decides nothing.
Why apart: importing ctypes costs 4 ms, which only those pay who call.
Invariants: none of them retries, loops or logs.
"""

from __future__ import annotations

import ctypes
import os

__all__ = [
    "CLONE_FS",
    "CLONE_NEWNET",
    "CLONE_NEWNS",
    "CLONE_NEWPID",
    "MOUNT_ATTR_NODEV",
    "MOUNT_ATTR_NOEXEC",
    "MOUNT_ATTR_NOSUID",
    "MOUNT_ATTR_NOSYMFOLLOW",
    "MOUNT_ATTR_RDONLY",
    "RESOLVE_BENEATH",
    "RESOLVE_IN_ROOT",
    "RESOLVE_NO_MAGICLINKS",
    "RESOLVE_NO_SYMLINKS",
    "RESOLVE_NO_XDEV",
    "create_core_scheduling_cookie",
    "mount",
    "move_mount",
    "open_tree",
    "openat2",
    "set_child_subreaper",
    "set_mount_attributes",
    "setns",
    "umount2",
    "unshare",
]

CLONE_FS = 0x200
CLONE_NEWNS = 0x20000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS = 0x01, 0x02, 0x04
RESOLVE_BENEATH, RESOLVE_IN_ROOT = 0x08, 0x10
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 0x1, 0x2, 0x4, 0x8
MOUNT_ATTR_NOSYMFOLLOW = 0x200000  # Linux 5.14

_PR_SET_CHILD_SUBREAPER = 36
_PR_SCHED_CORE = 62
_PR_SCHED_CORE_CREATE = 1
_PR_SCHED_CORE_SCOPE_PROCESS_GROUP = 2
# The same numbers on every architecture: these calls are newer than the common table.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_OPENAT2 = 437
_SYS_MOUNT_SETATTR = 442

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH, _MOVE_MOUNT_T_EMPTY_PATH = 0x04, 0x40

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.unshare.argtypes = [ctypes.c_int]
_libc.setns.argtypes = [ctypes.c_int, ctypes.c_int]
_libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_libc.syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


class _MountAttr(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd"))


def _check(result: int, path: str = "") -> int:
    if result < 0:
        number = ctypes.get_errno()
        if path:
            raise OSError(number, os.strerror(number), path)
        raise OSError(number, os.strerror(number))
    return result


def mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """mount(2). An empty string stands for NULL in fstype and data."""
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        os.fsencode(fstype) or None,
        flags,
        os.fsencode(data) or None,
    )
    _check(result, target)


def umount2(target: str, flags: int) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), target)


def unshare(flags: int) -> None:
    """unshare(2), of the calling thread."""
    _check(_libc.unshare(flags))


def setns(fd: int, kind: int) -> None:
    """setns(2), of the calling thread."""
    _check(_libc.setns(fd, kind))


def openat2(directory: int, path: str, flags: int, resolve: int) -> int:
    """openat2(2): a new descriptor, always O_CLOEXEC."""
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    result = _libc.syscall(
        ctypes.c_long(_SYS_OPENAT2),
        ctypes.c_long(directory),
        ctypes.c_char_p(os.fsencode(path)),
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    return _check(int(result), path)


def open_tree(what: str | int, *, recursive: bool) -> int:
    """open_tree(2) with OPEN_TREE_CLONE: a detached copy of the mount at `what`, a path or a descriptor of
    what lies there, as a descriptor."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    directory, path, empty = _place(what, _AT_EMPTY_PATH)
    result = _libc.syscall(
        ctypes.c_long(_SYS_OPEN_TREE),
        ctypes.c_long(directory),
        ctypes.c_char_p(path),
        ctypes.c_ulong(flags | empty),
    )
    return _check(int(result), "" if isinstance(what, int) else what)


def set_mount_attributes(
    tree: int, attributes: int, *, clear: int = 0, propagation: int = 0, recursive: bool = True
) -> None:
    """mount_setattr(2) on the mount whose root `tree` is: MOUNT_ATTR_* on, those of `clear` off."""
    wanted = _MountAttr(attr_set=attributes, attr_clr=clear, propagation=propagation)
    result = _libc.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_long(tree),
        ctypes.c_char_p(b""),
        ctypes.c_ulong(_AT_EMPTY_PATH | (_AT_RECURSIVE if recursive else 0)),
        ctypes.byref(wanted),
        ctypes.c_size_t(ctypes.sizeof(wanted)),
    )
    _check(int(result))


def move_mount(tree: int, target: str | int) -> None:
    """move_mount(2): attach a detached tree at `target`, a path or a descriptor. No link is followed in the
    path's last place."""
    directory, path, empty = _place(target, _MOVE_MOUNT_T_EMPTY_PATH)
    result = _libc.syscall(
        ctypes.c_long(_SYS_MOVE_MOUNT),
        ctypes.c_long(tree),
        ctypes.c_char_p(b""),
        ctypes.c_long(directory),
        ctypes.c_char_p(path),
        ctypes.c_ulong(_MOVE_MOUNT_F_EMPTY_PATH | empty),
    )
    _check(int(result), "" if isinstance(target, int) else target)


def _place(what: str | int, empty: int) -> tuple[int, bytes, int]:
    """(directory, path below it, flag for the empty path) of a path or a descriptor."""
    return (what, b"", empty) if isinstance(what, int) else (_AT_FDCWD, os.fsencode(what), 0)


def set_child_subreaper() -> None:
    """prctl(PR_SET_CHILD_SUBREAPER): orphaned descendants become our children."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def create_core_scheduling_cookie() -> None:
    """prctl(PR_SCHED_CORE, CREATE) for the calling process's group; children inherit it."""
    _check(_libc.prctl(_PR_SCHED_CORE, _PR_SCHED_CORE_CREATE, 0, _PR_SCHED_CORE_SCOPE_PROCESS_GROUP, 0))
