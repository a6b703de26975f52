"""Volumes and swap that change while the guest runs: file systems grow, disks become swap.

What: `resize_volume` (ResizeVolume) grows the file system mounted at a path to the size that its disk has
got; `add_swap` (AddSwap, AddSwapPath) has the kernel swap to a disk.
Why ioctls: resize2fs and xfs_growfs do no more for a mounted file system, and the guest has neither.
Invariants: only what is mounted below `agent.storage.storages.ROOTS` is touched; a file system never shrinks;
the size is that of the disk itself, which is waited for, not what the host says.
Source: fs/ext4/ext4.h (EXT4_IOC_RESIZE_FS), fs/xfs/libxfs/xfs_fs.h (XFS_IOC_FSGROWFSDATA), swapon(2).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Sequence

from agent import log
from agent.storage.blockdev import find_device, wait_for_size
from agent.storage.storages import checked
from agent.threads import in_thread
from ttrpc import Code, RpcError

__all__ = ["add_swap", "mounted_at", "pci_path", "resize_volume"]

_EXT4_RESIZE = 0x40086610  # _IOW('f', 16, u64)
_XFS_GEOMETRY = 0x80705864  # _IOR('X', 100, 112 bytes)
_XFS_GROW = 0x4010586E  # _IOW('X', 110, { u64 blocks; u32 imaxpct })
_XFS_IMAXPCT = 28  # where struct xfs_fsop_geom_v1 has it
_SWAP_DISCARD = 0x10000
_GROW_DEADLINE = 300.0  # seconds; a large ext4 writes the tables of each new group

_libc = ctypes.CDLL(None, use_errno=True)


def mounted_at(path: str, table: str = "/proc/self/mountinfo") -> tuple[str, str]:
    """(device number "8:1", file system) of what is mounted exactly there. Raises RpcError(NOT_FOUND)."""
    found = None
    with open(table, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split()
            if fields[4] == path:  # the last one lies above the others
                found = fields[2], fields[fields.index("-") + 1]
    if found is None:
        raise RpcError(Code.NOT_FOUND, f"no volume is mounted at {path[:200]!r}")
    return found


async def resize_volume(path: str, size: int) -> None:
    """Have the file system mounted at `path` fill its disk, once that has at least `size` bytes.

    Raises RpcError: NOT_FOUND, UNIMPLEMENTED for a file system that cannot grow while it is mounted,
    DEADLINE_EXCEEDED when the disk does not become so large, INTERNAL with the kernel's reason.
    """
    path = checked(path)
    number, fstype = mounted_at(path.rstrip("/"))
    grow = {"ext2": _grow_ext4, "ext3": _grow_ext4, "ext4": _grow_ext4, "xfs": _grow_xfs}.get(fstype)
    if grow is None:
        raise RpcError(Code.UNIMPLEMENTED, f"{fstype} at {path} cannot grow while it is mounted")
    device = os.path.basename(os.path.realpath(f"/sys/dev/block/{number}"))
    await wait_for_size(device, size, exactly=False)
    await in_thread(f"growing {fstype} at {path}", lambda: grow(path, _bytes(device)), _GROW_DEADLINE)
    log.debug(f"volume {path}: {fstype} has {_bytes(device)} bytes")


def _bytes(device: str) -> int:
    with open(f"/sys/class/block/{device}/size", encoding="ascii") as file:
        return int(file.read()) * 512


def _grow_ext4(path: str, size: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _EXT4_RESIZE, struct.pack("=Q", size // os.fstatvfs(fd).f_bsize))
    finally:
        os.close(fd)


def _grow_xfs(path: str, size: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        geometry = fcntl.ioctl(fd, _XFS_GEOMETRY, bytes(112))
        block, most_inodes = (struct.unpack_from("=I", geometry, at)[0] for at in (0, _XFS_IMAXPCT))
        fcntl.ioctl(fd, _XFS_GROW, struct.pack("=QII", size // block, most_inodes, 0))
    finally:
        os.close(fd)


def pci_path(slots: Sequence[int]) -> str:
    """AddSwap's list of slots as the text that `find_device` takes."""
    return "/".join(f"{slot:02x}" for slot in slots)


async def add_swap(source: str) -> None:
    """Swap to the disk at this PCI path, or of this name. What is freed goes back to the host, if it can.

    Raises RpcError: NOT_FOUND, INTERNAL with the kernel's reason (no signature of swap on it, ...).
    """
    device = await find_device("blk", source)

    def swap_on() -> None:
        if _libc.swapon(os.fsencode(device), _SWAP_DISCARD) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    await in_thread(f"swapping to {device}", swap_on)
    log.debug(f"swap on {device}")
