"""Volumes by copying: what a VMM without a shared file system makes of a bind mount.

What: `copy_volume` sends a file or a directory tree of the host to the agent, piece by piece (CopyFile).
Why: /etc/resolv.conf, hostname, hosts, config maps and secrets are small and are read; that is most
bind mounts of a pod.
Invariants:
- What is copied is what is there at the moment: later changes are seen by neither side. Another pod may write
  to the volume and the guest paces the copy, so nothing that was seen once is believed later: each entry is
  opened beneath the volume, no link followed (`devices.beneath`), looked at and read by one descriptor.
- A volume has at most `MAX_ENTRIES` entries and `MAX_BYTES` bytes. It is counted twice: before its first byte
  is sent, and while it is sent, each file with the size that it has when it is opened to be read.
- Symbolic links are copied as links, never followed (but the volume itself); sockets, FIFOs and devices
  are never opened, and left out with a line in the log.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import structlog

from devices.beneath import open_entry, open_named, reopen
from devices.errors import CallerError
from devices.syscalls import open_tree
from devices.threads import acquire, look
from proto import agent_pb2
from shim.spec.guest_spec import Volume

__all__ = ["MAX_BYTES", "MAX_ENTRIES", "FileCopier", "copy_volume"]

MAX_ENTRIES = 4096
MAX_BYTES = 64 << 20
_PIECE = 1 << 20  # bytes; a ttrpc message takes four

_log = structlog.get_logger("volumes")


class FileCopier(Protocol):
    """The part of the agent that is needed here."""

    async def copy_file(self, request: agent_pb2.CopyFileRequest) -> None:
        """CopyFile."""
        ...


@dataclass(frozen=True, slots=True)
class _Entry:
    """One file, directory or link: its name below the volume ("" is the volume itself), an O_PATH descriptor
    of it, and what that said."""

    below: str
    descriptor: int
    info: os.stat_result


async def copy_volume(agent: FileCopier, volume: Volume) -> None:
    """Copy it to `volume.guest_path`. Raises CallerError if it cannot be, and what the agent raises."""
    top = await acquire(_open_top, volume, lost=os.close)
    try:
        await look(_count, volume, os.dup(top))
        walk = _walk(volume, top)
        try:
            while (entry := await acquire(_next, walk)) is not None:
                await _copy_entry(agent, volume, entry)
        finally:
            walk.close()  # `acquire` has seen to it that it stands still
    except OSError as error:
        raise _refusal(volume, f"cannot be read: {error.strerror}") from error
    finally:
        os.close(top)


async def _copy_entry(agent: FileCopier, volume: Volume, entry: _Entry) -> None:
    request = agent_pb2.CopyFileRequest(
        path=volume.guest_path + entry.below,
        file_mode=entry.info.st_mode,
        dir_mode=0o755,
        uid=entry.info.st_uid,
        gid=entry.info.st_gid,
    )
    if stat.S_ISREG(entry.info.st_mode):
        await _copy_content(agent, request, entry)
        return
    if stat.S_ISLNK(entry.info.st_mode):
        request.data = os.fsencode(os.readlink("", dir_fd=entry.descriptor))
    await agent.copy_file(request)


async def _copy_content(agent: FileCopier, request: agent_pb2.CopyFileRequest, entry: _Entry) -> None:
    """A file that changes meanwhile is cut or filled up to the size that was counted."""
    file = await acquire(reopen, entry.descriptor, lost=os.close)
    try:
        request.file_size = entry.info.st_size
        while True:
            left = request.file_size - request.offset
            data = await acquire(os.pread, file, min(left, _PIECE), request.offset)
            request.data = data or bytes(min(left, _PIECE))
            await agent.copy_file(request)
            request.offset += len(request.data)
            if request.offset >= request.file_size:
                return
    finally:
        os.close(file)


def _count(volume: Volume, top: int) -> None:
    """Refuse what is too much, or cannot be read, before anything is sent, and close `top`. Raises
    CallerError, OSError."""
    try:
        with contextlib.closing(_entries(top, tell=True)) as entries:
            for _ in _bounded(entries, volume):
                pass
    finally:
        os.close(top)


def _next(walk: Iterator[_Entry]) -> _Entry | None:
    return next(walk, None)


def _walk(volume: Volume, top: int) -> Generator[_Entry, None, None]:
    """What is there now, parents first, level by level. The descriptor of an entry is closed when the next
    one is asked for. Raises CallerError. Blocks."""
    try:
        with contextlib.closing(_entries(top)) as entries:
            yield from _bounded(entries, volume)
    except OSError as error:
        why = f"changed while it was copied: {error.strerror}"
        raise _refusal(volume, why, "UNAVAILABLE", "try again") from error


def _open_top(volume: Volume) -> int:
    """What the source leads to; where mounts below it are not meant, without them. Raises CallerError."""
    try:
        top = open_named(volume.source)
    except OSError as error:
        raise _refusal(volume, f"cannot be read: {error.strerror}") from error
    try:
        kind = os.fstat(top).st_mode
        if not (stat.S_ISDIR(kind) or stat.S_ISREG(kind)):
            raise _refusal(volume, "is neither file nor directory")
        if volume.recursive or not stat.S_ISDIR(kind):
            return top
        alone = open_tree(top, recursive=False)
    except BaseException:
        os.close(top)
        raise
    os.close(top)
    return alone


def _bounded(entries: Iterator[_Entry], volume: Volume) -> Iterator[_Entry]:
    """The entries until there are too many of them, or too many bytes in them."""
    size = 0
    for number, entry in enumerate(entries, 1):
        if stat.S_ISREG(entry.info.st_mode):
            size += entry.info.st_size
        if number > MAX_ENTRIES or size > MAX_BYTES:
            raise _refusal(
                volume,
                f"has more than {MAX_ENTRIES} files or {MAX_BYTES >> 20} MiB: without a shared file system it"
                " would have to be copied",
                hint="use a hypervisor with shared_fs, or put it on a block device",
            )
        yield entry


def _entries(top: int, *, tell: bool = False) -> Generator[_Entry, None, None]:
    """`tell`: log what is left out."""
    waiting = deque([""])
    while waiting:
        below = waiting.popleft()
        descriptor = open_entry(top, below.lstrip("/")) if below else os.dup(top)
        try:
            info = os.fstat(descriptor)
            kind = stat.S_IFMT(info.st_mode)
            if kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                yield _Entry(below, descriptor, info)
                if kind == stat.S_IFDIR:
                    waiting += [f"{below}/{name}" for name in _names(descriptor)]
            elif tell:
                _log.info("not copied into the guest", path=below, mode=oct(info.st_mode))
        finally:
            os.close(descriptor)


def _names(directory: int) -> list[str]:
    """What is in it, sorted; of too much, more than is allowed."""
    listed = reopen(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with os.scandir(listed) as entries:
            return sorted(entry.name for entry in islice(entries, MAX_ENTRIES + 1))
    finally:
        os.close(listed)


def _refusal(volume: Volume, why: str, code: str = "INVALID_ARGUMENT", hint: str = "") -> CallerError:
    return CallerError(
        f"the mount at {volume.destination} ({volume.source}) {why}",
        phase="volume",
        code=code,
        hint=hint,
    )
