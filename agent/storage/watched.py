"""Copies of volumes that the host rewrites, so that who watches them by inotify is told.

What: `bring_up_to_date` makes a directory of the guest the same as one of the share.
Why the order: the host's writer (kubelet's) makes a new directory, lets the link `..data` point to it by a
rename, and removes the old one. Whoever watches reads when the link moves: everything must be there then.
Invariants: nothing outside the two directories is read or written, and no link followed; an entry is replaced
by a rename, so that it is the old one or the new one at each moment; a copy has at most `MAX_ENTRIES` entries
and `MAX_BYTES` bytes. Blocks.
Source: Kata's watchable-bind; Kubernetes' pkg/volume/util/atomic_writer.go.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat

from ttrpc import Code, RpcError

__all__ = ["MAX_BYTES", "MAX_ENTRIES", "bring_up_to_date"]

MAX_ENTRIES = 1024
MAX_BYTES = 16 << 20
_TEMPORARY = "_tmp"  # as kubelet calls the link before it is renamed
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class _Room:
    """What may still be copied."""

    def __init__(self) -> None:
        self._entries, self._bytes = MAX_ENTRIES, MAX_BYTES

    def take(self, size: int) -> None:
        self._entries -= 1
        self._bytes -= size
        if self._entries < 0 or self._bytes < 0:
            raise RpcError(
                Code.RESOURCE_EXHAUSTED,
                f"a watched volume has more than {MAX_ENTRIES} entries or {MAX_BYTES >> 20} MiB",
            )


def bring_up_to_date(source: str, target: str) -> None:
    """Raises OSError, RpcError RESOURCE_EXHAUSTED; what was copied until then stays."""
    os.makedirs(target, exist_ok=True)
    # To read the directory refreshes what the guest has cached of its names, however young that is.
    source_fd = os.open(source, _DIRECTORY)
    try:
        target_fd = os.open(target, _DIRECTORY)
        try:
            _copy(source_fd, target_fd, _Room())
        finally:
            os.close(target_fd)
    finally:
        os.close(source_fd)


def _copy(source: int, target: int, room: _Room) -> None:
    names = os.listdir(source)
    there = {name: os.stat(name, dir_fd=source, follow_symlinks=False) for name in names}
    mine = {name: os.stat(name, dir_fd=target, follow_symlinks=False) for name in os.listdir(target)}
    for name in [
        name for name in mine.keys() - there.keys() if name.endswith(_TEMPORARY)
    ]:  # of a cut short one
        _remove(name, target)
        del mine[name]
    for name, info in there.items():
        room.take(info.st_size if stat.S_ISREG(info.st_mode) else 0)
        kind = stat.S_IFMT(info.st_mode)
        if name in mine and stat.S_IFMT(mine[name].st_mode) != kind:
            _remove(name, target)
            del mine[name]
        if kind == stat.S_IFDIR:
            _copy_directory(name, source, target, info, room)
        elif kind == stat.S_IFREG and not (name in mine and _is_same(mine[name], info)):
            _copy_file(name, source, target, info)
    for name, info in there.items():
        if stat.S_ISLNK(info.st_mode):
            _copy_link(name, source, target, info, name in mine)
    for name in mine.keys() - there.keys():
        _remove(name, target)
    info = os.fstat(source)
    os.fchown(target, info.st_uid, info.st_gid)
    os.fchmod(target, stat.S_IMODE(info.st_mode))


def _is_same(mine: os.stat_result, info: os.stat_result) -> bool:
    return (mine.st_size, mine.st_mtime_ns, mine.st_mode, mine.st_uid, mine.st_gid) == (
        info.st_size,
        info.st_mtime_ns,
        info.st_mode,
        info.st_uid,
        info.st_gid,
    )


def _copy_directory(name: str, source: int, target: int, info: os.stat_result, room: _Room) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, stat.S_IMODE(info.st_mode), dir_fd=target)
    there = os.open(name, _DIRECTORY, dir_fd=source)
    try:
        mine = os.open(name, _DIRECTORY, dir_fd=target)
        try:
            _copy(there, mine, room)
        finally:
            os.close(mine)
    finally:
        os.close(there)


def _copy_file(name: str, source: int, target: int, info: os.stat_result) -> None:
    there = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
    try:
        data = b""
        while part := os.read(there, 1 << 20):
            data += part
            if len(data) > MAX_BYTES:
                raise RpcError(Code.RESOURCE_EXHAUSTED, f"{name[:80]!r} of a watched volume grows")
    finally:
        os.close(there)
    temporary = name + _TEMPORARY
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    mine = os.open(temporary, flags, 0o600, dir_fd=target)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(mine, view) :]
        os.fchown(mine, info.st_uid, info.st_gid)
        os.fchmod(mine, stat.S_IMODE(info.st_mode))
        os.utime(mine, ns=(info.st_mtime_ns, info.st_mtime_ns))
    finally:
        os.close(mine)
    os.rename(temporary, name, src_dir_fd=target, dst_dir_fd=target)


def _copy_link(name: str, source: int, target: int, info: os.stat_result, exists: bool) -> None:
    wanted = os.readlink(name, dir_fd=source)
    if exists and os.readlink(name, dir_fd=target) == wanted:
        return
    temporary = name + _TEMPORARY
    os.symlink(wanted, temporary, dir_fd=target)
    os.chown(temporary, info.st_uid, info.st_gid, dir_fd=target, follow_symlinks=False)
    os.rename(temporary, name, src_dir_fd=target, dst_dir_fd=target)


def _remove(name: str, parent: int) -> None:
    if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        shutil.rmtree(name, dir_fd=parent)
    else:
        os.unlink(name, dir_fd=parent)
