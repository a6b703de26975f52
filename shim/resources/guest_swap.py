"""Swap for the guest: a file of the host that becomes a disk, and the disk swap.

What: `GuestSwap.start` makes the file with its signature, plugs it, and has the agent use it; it goes when
the sandbox does.
Why: a guest that needs more memory than its VM has pages out instead of killing; the pages are on the host's
disk, where the administrator wants them (`guest_swap_path`).
Invariants: off unless it is configured; the file has the size that the configuration says, a share of the
memory that the VM starts with, and takes no more of the host's disk than what was paged out; a file system
with less room than that refuses the sandbox. The file is root's alone: it holds the guest's memory.
Source: mkswap(8), include/linux/swap.h (union swap_header), Kata's enable_guest_swap (facts/kata.md 1.10).
"""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass
from typing import Protocol

from devices.config import BlockConfig
from devices.device import DeviceHost
from devices.errors import HostError
from devices.manager import DeviceManager
from devices.threads import acquire
from devices.undo import Entry, UndoLog

__all__ = ["GuestSwap", "SwapAgent", "SwapSettings", "write_signature"]

_PAGE = 4096
_PHASE = "swap"


@dataclass(frozen=True, slots=True)
class SwapSettings:
    """`directory`: where swap files are made; `size`: bytes of one."""

    directory: str
    size: int


class SwapAgent(Protocol):
    """What the guest is asked."""

    async def add_swap(self, pci_path: str) -> None: ...


class GuestSwap:
    """The swap of the sandbox with this key."""

    def __init__(self, settings: SwapSettings, key: str, undo: UndoLog) -> None:
        self._settings = settings
        self._path = f"{settings.directory}/{key}.swap"
        self._undo = undo
        self._entry: Entry | None = None

    async def start(self, devices: DeviceManager, host: DeviceHost, agent: SwapAgent) -> None:
        """Make it, plug it, use it. Raises KataError; `close` undoes what was done."""
        self._entry = self._undo.record("file", path=self._path)
        await acquire(_make, self._path, self._settings.size)
        name = await devices.try_add_device(BlockConfig(id="swap0", path=self._path, ours=True), host)
        disk = await devices.generate_agent_device(name)
        await agent.add_swap(disk.id)

    async def close(self) -> None:
        """Remove the file; only when the VM is gone. Idempotent."""
        if self._entry is not None:
            entry, self._entry = self._entry, None
            await acquire(_remove, self._path)
            self._undo.forget(entry)


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _make(path: str, size: int) -> None:
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        room = os.statvfs(os.path.dirname(path))
        if room.f_bavail * room.f_frsize < size:
            raise HostError(
                f"no room for the guest's swap in {os.path.dirname(path)}: {size >> 20} MiB are needed",
                phase=_PHASE,
                hint="make room, lower guest_swap_size_percent, or set another guest_swap_path",
            )
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size)
            write_signature(fd, size)
        finally:
            os.close(fd)
    except OSError as error:
        raise HostError(f"cannot make {path}: {error.strerror}", phase=_PHASE) from error


def write_signature(fd: int, size: int) -> None:
    """What mkswap writes: the first page, which says how many there are."""
    page = bytearray(_PAGE)
    struct.pack_into("=III", page, 1024, 1, size // _PAGE - 1, 0)  # version, last page, no bad ones
    page[1036:1052] = os.urandom(16)
    page[-10:] = b"SWAPSPACE2"
    os.pwrite(fd, page, 0)
