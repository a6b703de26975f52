"""File systems in files, for VMMs without a shared file system: a container's image, and its scratch disk.

What: `ImageStore.image` makes a read-only erofs image of a mounted root file system, or finds the one made
before; `make_scratch` makes an empty ext4 disk that costs only what is written to it.
Why erofs below and ext4 above: the image is made once for all containers of it, whoever runs them, and is
the same pages in the host's cache for all VMs; what a container writes is its own.
Invariants:
- A file in the store is complete: it is made under another name and renamed. Its name is a digest of what it
  was made from; equal digests mean equal content.
- Who uses an image holds a shared lock on it; the store is kept below `STORE_LIMIT` by removing what nobody
  holds, oldest use first.
- Nothing in here runs what the image contains. Programs run with a deadline; each sees the file that it
  makes, and what it makes it of.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import shutil
from collections.abc import Sequence

import structlog

from devices.child import Child
from devices.confine import Bind, Confinement, View
from devices.errors import HostError
from devices.threads import acquire
from devices.undo import UndoLog
from shim.protocols import RootfsMount

__all__ = ["DATA_DIR", "SCRATCH_SIZE", "ImageStore", "make_scratch", "rootfs_digest"]

DATA_DIR = "/var/lib/kata-containers"
STORE_LIMIT = 16 << 30  # bytes
SCRATCH_SIZE = 8 << 30  # bytes; the file is sparse
_BUILD = 900.0  # seconds for one image; some 100 MB a second
_MAKE = 60.0
_MKE2FS = ("/etc/mke2fs.conf",)

_log = structlog.get_logger("images")
_numbers = itertools.count()


def rootfs_digest(rootfs: Sequence[RootfsMount]) -> str:
    """What the content of these mounts is known by; "" if it cannot be told without reading all of it.

    Layers of a snapshotter never change once they are committed, and a new one at the same path is another
    directory. A container that has written something of its own is not known by its layers.
    """
    if len(rootfs) != 1 or rootfs[0].type != "overlay":
        return ""
    parts = []
    try:
        for option in rootfs[0].options:
            name, _, value = option.partition("=")
            if name == "upperdir" and os.listdir(value):
                return ""
            if name == "lowerdir":
                for layer in value.replace("\\:", "\0").split(":"):
                    info = os.stat(layer.replace("\0", ":"))
                    parts.append(f"{layer} {info.st_dev} {info.st_ino} {info.st_ctime_ns}")
    except OSError:
        return ""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40] if parts else ""


class ImageStore:
    """Images in `directory`, shared by all shims of the host."""

    def __init__(self, undo: UndoLog, directory: str = f"{DATA_DIR}/images") -> None:
        self._undo = undo
        self._directory = directory

    async def image(self, tree: str, digest: str) -> tuple[str, int]:
        """An erofs image of the directory `tree`: its path, and a descriptor that keeps it from removal until
        closed. `digest`: see `rootfs_digest`; "" makes one of the caller's own, who removes it."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        name = digest or f"private-{os.getpid()}-{hashlib.sha256(tree.encode()).hexdigest()[:16]}"
        path = f"{self._directory}/{name}.erofs"
        held = await acquire(_hold, path, lost=_drop) if digest else -1
        if held < 0:
            partial = f"{path}.{os.getpid()}-{next(_numbers)}"
            entry = self._undo.record("file", path=partial)
            try:
                _touch(partial)
                reads_all = Confinement(
                    capabilities=("dac_read_search",),
                    view=View(binds=(Bind(path=partial, writable=True), Bind(path=tree))),
                )
                argv = ["-d0", "-x1", partial, tree]
                await _run(self._undo, "mkfs.erofs", argv, _BUILD, reads_all)
                os.chmod(partial, 0o444)  # for a VMM without root's rights; the directory is root's
                held = await acquire(_hold, partial, lost=_drop)
                os.rename(partial, path)
            except BaseException:
                if os.path.exists(partial):
                    os.unlink(partial)
                raise
            finally:
                self._undo.forget(entry)
            await acquire(self._make_room)
        return path, held

    def _make_room(self) -> None:
        """Remove images that nobody uses, oldest first, while the store is above its limit."""
        files = []
        for entry in os.scandir(self._directory):
            if entry.name.endswith(".erofs") and entry.is_file(follow_symlinks=False):
                info = entry.stat(follow_symlinks=False)
                files.append((info.st_atime_ns, info.st_blocks * 512, entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= STORE_LIMIT:
                return
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
                total -= size
                _log.info("image removed to make room", path=path)
            except BlockingIOError:
                continue
            finally:
                os.close(fd)


async def make_scratch(undo: UndoLog, path: str) -> None:
    """An empty ext4 file system in the new sparse file `path`. Raises HostError.

    Everybody may write to the file, and nobody but root reaches it: its directory is root's. So a VMM
    with another user's rights can, where it is bound into its jail.
    """
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, SCRATCH_SIZE)
        os.fchmod(fd, 0o666)
    finally:
        os.close(fd)
    options = ["-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard"]
    binds = (Bind(path=path, writable=True), *(Bind(path=each) for each in _MKE2FS if os.path.exists(each)))
    await _run(undo, "mkfs.ext4", [*options, path], _MAKE, Confinement(view=View(binds=binds)))


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))


def _hold(path: str) -> int:
    """A descriptor with a shared lock on the file at `path`, -1 if there is none."""
    while True:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return -1
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.fstat(fd).st_nlink:
            os.utime(fd)
            return fd
        os.close(fd)  # removed between open and lock


def _drop(held: int) -> None:
    if held >= 0:
        os.close(held)


async def _run(
    undo: UndoLog, program: str, arguments: Sequence[str], timeout: float, confinement: Confinement
) -> None:
    path = shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        package = "erofs-utils" if program == "mkfs.erofs" else "e2fsprogs"
        raise HostError(f"there is no {program}", phase="rootfs", hint=f"install {package}")
    child = await Child.spawn([path, *arguments], name=program, undo=undo, confinement=confinement)
    try:
        status = await child.wait(timeout)
    except TimeoutError:
        raise HostError(
            f"{program} did not end within {timeout:g} s", phase="rootfs", code="DEADLINE_EXCEEDED"
        ) from None
    finally:
        await child.kill()
    if status:
        raise HostError(
            f"{program} {child.describe()}",
            phase="rootfs",
            details={program: child.stderr_tail()},
            hint=f"is the disk of {DATA_DIR} full?",
        )
