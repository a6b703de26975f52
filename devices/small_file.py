"""A file of the host that is read as a whole, whoever named it.

What: `read_small`.
Why: a path in a bundle, or in a directory that others write to, may lead to a FIFO, where open waits for
ever; to a terminal, which would become ours; to a device, where reading is an act; or to what never ends.
Invariants: only regular files are read, at most so many bytes, and nothing waits but for the disk. It blocks:
in the daemon it belongs into `devices.threads.look`.
"""

from __future__ import annotations

import errno
import os
import stat

__all__ = ["read_small"]

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def read_small(path: str, most: int) -> bytes:
    """The file's content. Raises OSError, whose strerror says it also of what is no file, or has more than
    `most` bytes."""
    fd = os.open(path, _FLAGS)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", path)
        data = bytearray()
        while len(data) <= most and (piece := os.read(fd, most + 1 - len(data))):
            data += piece
        if len(data) > most:
            raise OSError(errno.EFBIG, f"it has more than {most} bytes", path)
        return bytes(data)
    finally:
        os.close(fd)
