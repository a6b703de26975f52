"""CopyFile: the host writes files, directories and links below the shared directory, piece by piece.

What: used where no file system is shared; a file comes in pieces of up to 4 MiB and is renamed into
place when it is complete.
Why openat step by step: an earlier CopyFile may have made a symbolic link; following it would let the
next one write anywhere in the guest.
Invariants: every step below `BASE` is opened with O_NOFOLLOW relative to its parent; nothing outside
`BASE` is touched; a file becomes visible only whole.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING

from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from proto import agent_pb2

__all__ = ["BASE", "copy_file"]

BASE = "/run/kata-containers/shared/containers"
_PARTIAL = ".kata-partial"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _parts(path: str, base: str) -> list[str]:
    """The names below `base`; raises INVALID_ARGUMENT for anything that is not plainly below it."""
    prefix = base.rstrip("/") + "/"
    names = path.removeprefix(prefix).split("/")
    if not path.startswith(prefix) or any(name in ("", ".", "..") or "\0" in name for name in names):
        raise RpcError(Code.INVALID_ARGUMENT, f"CopyFile: {path[:200]!r} is not below {base}")
    return names


def _open_parent(names: list[str], request: agent_pb2.CopyFileRequest, base: str) -> int:
    """Open (and make) the directory of the last name; the caller closes the descriptor."""
    os.makedirs(base, exist_ok=True)
    current = os.open(base, _DIRECTORY)
    try:
        for name in names[:-1]:
            try:
                os.mkdir(name, stat.S_IMODE(request.dir_mode) or 0o755, dir_fd=current)
                made = True
            except FileExistsError:
                made = False
            below = os.open(name, _DIRECTORY, dir_fd=current)
            os.close(current)
            current = below
            if made:
                os.fchown(current, request.uid, request.gid)
    except BaseException:
        os.close(current)
        raise
    return current


def _remove(name: str, parent: int) -> None:
    """Remove what an earlier copy left under this name; a directory only if it is empty."""
    try:
        if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            os.rmdir(name, dir_fd=parent)
        else:
            os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        pass


def _copy_piece(name: str, parent: int, request: agent_pb2.CopyFileRequest) -> None:
    partial = name + _PARTIAL
    if request.offset == 0:
        _remove(partial, parent)
    if request.offset < 0 or request.offset + len(request.data) > request.file_size:
        raise RpcError(Code.INVALID_ARGUMENT, f"CopyFile: a piece of {name[:80]!r} reaches beyond its size")
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(partial, flags, 0o600, dir_fd=parent)
    try:
        view = memoryview(request.data)
        done = 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], request.offset + done)
        if os.fstat(fd).st_size != request.file_size:
            return
        os.fchown(fd, request.uid, request.gid)
        os.fchmod(fd, stat.S_IMODE(request.file_mode))
    finally:
        os.close(fd)
    os.rename(partial, name, src_dir_fd=parent, dst_dir_fd=parent)


def copy_file(request: agent_pb2.CopyFileRequest, base: str = BASE) -> None:
    """One CopyFile request. Raises RpcError: INVALID_ARGUMENT for a path or size that lies."""
    names = _parts(request.path, base)
    kind = stat.S_IFMT(request.file_mode)
    try:
        parent = _open_parent(names, request, base)
        try:
            name = names[-1]
            if kind == stat.S_IFLNK:
                _remove(name, parent)
                os.symlink(os.fsdecode(request.data), name, dir_fd=parent)
                os.chown(name, request.uid, request.gid, dir_fd=parent, follow_symlinks=False)
            elif kind == stat.S_IFDIR:
                _make_directory(name, parent, request)
            elif kind in (0, stat.S_IFREG):
                _copy_piece(name, parent, request)
            else:
                raise RpcError(Code.INVALID_ARGUMENT, f"CopyFile: mode {request.file_mode:o} is no file")
        finally:
            os.close(parent)
    except OSError as error:
        raise RpcError(Code.INVALID_ARGUMENT, f"CopyFile {request.path[:200]}: {error.strerror}") from None


def _make_directory(name: str, parent: int, request: agent_pb2.CopyFileRequest) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)
    fd = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        os.fchown(fd, request.uid, request.gid)
        os.fchmod(fd, stat.S_IMODE(request.file_mode))
    finally:
        os.close(fd)
