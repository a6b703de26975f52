"""An image file as a block device of this host, for as long as somebody has it mounted.

What: `attached` gives a free loop device to a file, and its path.
Why not losetup(8): a fork and exec, and a device that somebody must detach.
Invariants: the kernel takes the device back itself when its last user has gone (LO_FLAGS_AUTOCLEAR), so there
is nothing to undo: not after an unmount, nor after a shim that was killed. Blocks: not for the event loop.
Source: loop(4); the kernel's include/uapi/linux/loop.h, LOOP_CONFIGURE of Linux 5.8.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator

__all__ = ["attached"]

_CONTROL = "/dev/loop-control"
_GET_FREE, _CONFIGURE = 0x4C82, 0x4C0A
_READ_ONLY, _AUTOCLEAR = 1, 4
#: struct loop_config: the file, block size 0 (the kernel's choice), loop_info64, eight reserved words.
_CONFIG = struct.Struct("=II52xI240x")  # fmt: skip
_TRIES = 64  # another one may take the device that was free a moment ago


@contextlib.contextmanager
def attached(path: str, *, read_only: bool) -> Iterator[str]:
    """The path of a device that shows the file `path`; who wants it longer has it mounted in here.

    Raises OSError: EINVAL for what is no file, and what the kernel says; its text names what it is about.
    """
    mode = os.O_RDONLY if read_only else os.O_RDWR
    file = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "not a regular file, as the option loop wants", path)
        device = _take_free(file, mode, _READ_ONLY if read_only else 0)
    finally:
        os.close(file)
    try:
        yield f"/dev/loop{os.minor(os.fstat(device).st_rdev)}"
    finally:
        os.close(device)


def _take_free(file: int, mode: int, flags: int) -> int:
    """A descriptor of a loop device that has this file now."""
    try:
        control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        text = f"this host gives no loop devices: {_CONTROL}: {error.strerror}; try: modprobe loop"
        raise OSError(error.errno, text) from error
    try:
        for _ in range(_TRIES):
            device = os.open(f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}", mode | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _CONFIGURE, _CONFIG.pack(file, 0, flags | _AUTOCLEAR))
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise
            else:
                return device
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no free loop device was to be had", _CONTROL)
