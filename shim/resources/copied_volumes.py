"""Volumes by copying: what a VMM without a shared file system makes of a bind mount.

What: `copy_volume` sends a file or a directory tree of the host to the agent, piece by piece (CopyFile).
Why: /etc/resolv.conf, hostname, hosts, config maps and secrets are small and are read; that is most
bind mounts of a pod.
Invariants: what is copied is what is there now: later changes are seen by neither side. A volume has at most
`MAX_ENTRIES` entries and `MAX_BYTES` bytes, else it is refused by name before its first byte is sent.
Symbolic links are copied as links, never followed (but the volume itself); sockets, FIFOs and devices
are left out, with a line in the log.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import structlog

from devices.errors import CallerError
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
    """One file, directory or link: where it is on the host, and below the volume in the guest."""

    path: str
    below: str
    info: os.stat_result


async def copy_volume(agent: FileCopier, volume: Volume) -> None:
    """Copy it to `volume.guest_path`. Raises CallerError if it cannot be, and what the agent raises."""
    entries = await look(_plan, volume)
    for entry in entries:
        request = agent_pb2.CopyFileRequest(
            path=volume.guest_path + entry.below,
            file_mode=entry.info.st_mode,
            dir_mode=0o755,
            uid=entry.info.st_uid,
            gid=entry.info.st_gid,
        )
        if stat.S_ISLNK(entry.info.st_mode):
            request.data = os.fsencode(os.readlink(entry.path))
            await agent.copy_file(request)
        elif stat.S_ISDIR(entry.info.st_mode):
            await agent.copy_file(request)
        else:
            await _copy_content(agent, request, entry.path)


async def _copy_content(agent: FileCopier, request: agent_pb2.CopyFileRequest, path: str) -> None:
    """A file that changes meanwhile is cut or filled up to the size it had at first."""
    file = await acquire(os.open, path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, lost=os.close)
    try:
        request.file_size = os.fstat(file).st_size
        while True:
            left = request.file_size - request.offset
            data = await look(os.pread, file, min(left, _PIECE), request.offset)
            request.data = data or bytes(min(left, _PIECE))
            await agent.copy_file(request)
            request.offset += len(request.data)
            if request.offset >= request.file_size:
                return
    finally:
        os.close(file)


def _plan(volume: Volume) -> list[_Entry]:
    """What to send, parents first. Raises CallerError."""
    entries, size = [], 0
    try:
        for entry in _walk(volume.source):
            kind = stat.S_IFMT(entry.info.st_mode)
            if kind not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                _log.info("not copied into the guest", path=entry.path, mode=oct(entry.info.st_mode))
                continue
            entries.append(entry)
            size += entry.info.st_size if kind == stat.S_IFREG else 0
            if len(entries) > MAX_ENTRIES or size > MAX_BYTES:
                raise CallerError(
                    f"the mount at {volume.destination} ({volume.source}) has more than {MAX_ENTRIES} files"
                    f" or {MAX_BYTES >> 20} MiB: without a shared file system it would have to be copied",
                    phase="volume",
                    code="INVALID_ARGUMENT",
                    hint="use a hypervisor with shared_fs, or put it on a block device",
                )
    except OSError as error:
        raise CallerError(
            f"the source {volume.source} of the mount at {volume.destination} cannot be read:"
            f" {error.strerror}",
            phase="volume",
            code="INVALID_ARGUMENT",
        ) from error
    if not entries:
        raise CallerError(
            f"the source {volume.source} of the mount at {volume.destination} is neither file nor directory",
            phase="volume",
            code="INVALID_ARGUMENT",
        )
    return entries


def _walk(source: str) -> Iterator[_Entry]:
    top = os.path.realpath(source, strict=True)
    info = os.stat(top, follow_symlinks=False)
    yield _Entry(top, "", info)
    if stat.S_ISDIR(info.st_mode):
        for folder, folders, files in os.walk(top, onerror=_raise):
            for name in sorted(folders + files):
                path = os.path.join(folder, name)
                yield _Entry(path, path[len(top) :], os.stat(path, follow_symlinks=False))


def _raise(error: OSError) -> None:
    raise error
