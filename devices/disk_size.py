"""How large a disk's file or block device is."""

from __future__ import annotations

import os

from devices.errors import HostError

__all__ = ["disk_size"]


def disk_size(path: str) -> int:
    """Bytes of an image file or a block device. Raises HostError. Blocks."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)
    except OSError as error:
        raise HostError(f"{path} cannot be used: {error.strerror}", phase="devices") from error
