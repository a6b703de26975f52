"""mount(2) and umount2(2), and the translation of mount options to their flags.

Why not the `mount` program: it costs a process start, and hides the errno.
Invariants: option words become flags by the table below; all others are passed to the file system
unchanged; unmounting never follows a symbolic link; errors are OSError with the target's path.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

__all__ = ["MNT_DETACH", "mount", "mounts_below", "parse_options", "umount"]

MS_RDONLY = 1
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

# mount(8) words: (flag, whether the word sets it). From mount(2) and the OCI specification.
_FLAGS = {
    "defaults": (0, True),
    "ro": (MS_RDONLY, True),
    "rw": (MS_RDONLY, False),
    "nosuid": (2, True),
    "suid": (2, False),
    "nodev": (4, True),
    "dev": (4, False),
    "noexec": (8, True),
    "exec": (8, False),
    "sync": (16, True),
    "async": (16, False),
    "remount": (MS_REMOUNT, True),
    "mand": (64, True),
    "nomand": (64, False),
    "dirsync": (128, True),
    "noatime": (1024, True),
    "atime": (1024, False),
    "nodiratime": (2048, True),
    "diratime": (2048, False),
    "bind": (MS_BIND, True),
    "rbind": (MS_BIND | MS_REC, True),
    "relatime": (1 << 21, True),
    "norelatime": (1 << 21, False),
    "strictatime": (1 << 24, True),
    "nostrictatime": (1 << 24, False),
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)


def parse_options(options: Iterable[str]) -> tuple[int, str]:
    """Split options into `(flags, data)`."""
    flags = 0
    data = []
    for option in options:
        known = _FLAGS.get(option)
        if known is None:
            data.append(option)
        elif known[1]:
            flags |= known[0]
        else:
            flags &= ~known[0]
    return flags, ",".join(data)


def mount(source: str, target: str, fstype: str, options: Iterable[str] = ()) -> None:
    """Mount; a read-only bind is remounted so that "ro" holds. Blocks. Raises OSError."""
    flags, data = parse_options(options)
    if fstype == "bind":
        flags |= MS_BIND
        fstype = ""
    _mount(source, target, fstype, flags, data)
    if flags & MS_BIND and flags & ~(MS_BIND | MS_REC):
        _mount("", target, "", flags & ~MS_REC | MS_REMOUNT, "")


def _mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    result = _libc.mount(source.encode(), target.encode(), fstype.encode(), flags, data.encode())
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def umount(target: str, flags: int = 0) -> None:
    """Unmount the topmost mount at `target`. Raises OSError (EINVAL: it is no mount point)."""
    if _libc.umount2(target.encode(), flags | UMOUNT_NOFOLLOW) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def mounts_below(directory: str, mountinfo: str = "/proc/self/mountinfo") -> list[str]:
    """Mount points at or below `directory`, the last mounted first."""
    prefix = directory.rstrip("/") + "/"
    found = []
    with open(mountinfo, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            field = line.split(" ")[4]
            for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
                field = field.replace(code, char)
            if (field + "/").startswith(prefix):
                found.append(field)
    return found[::-1]
