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
    "CLONE_NEWNS",
    "create_core_scheduling_cookie",
    "mount",
    "openat2",
    "set_child_subreaper",
    "umount2",
    "unshare",
]

CLONE_FS = 0x200
CLONE_NEWNS = 0x20000

_PR_SET_CHILD_SUBREAPER = 36
_PR_SCHED_CORE = 62
_PR_SCHED_CORE_CREATE = 1
_PR_SCHED_CORE_SCOPE_PROCESS_GROUP = 2
_SYS_OPENAT2 = 437  # the same number on every architecture (it is newer than the common table)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]
_libc.unshare.argtypes = [ctypes.c_int]
_libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_libc.syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


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


def set_child_subreaper() -> None:
    """prctl(PR_SET_CHILD_SUBREAPER): orphaned descendants become our children."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def create_core_scheduling_cookie() -> None:
    """prctl(PR_SCHED_CORE, CREATE) for the calling process's group; children inherit it."""
    _check(_libc.prctl(_PR_SCHED_CORE, _PR_SCHED_CORE_CREATE, 0, _PR_SCHED_CORE_SCOPE_PROCESS_GROUP, 0))
