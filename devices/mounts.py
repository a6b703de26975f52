"""Mounts: the daemon's own namespace, containerd's list of rootfs mounts, what is mounted where.

What: `make_private`, `mount_rootfs`, `bind`, `unmount`, `unmount_below`, and a reader of mountinfo.
Why not mount(8): a fork and exec for each, and its text for an interface.
Invariants: nothing here follows a symbolic link on unmount; every function blocks, so callers on the
event loop use `devices.threads.acquire` (all threads share the daemon's mount namespace as long as they were
made after `make_private`).

An overlay of many layers does not fit the one page that mount(2) takes as data. As containerd does,
the common directory is then left out of the paths and entered instead; here by a thread that has a
working directory of its own.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from devices.syscalls import (
    CLONE_FS,
    CLONE_NEWNS,
    mount,
    move_mount,
    open_tree,
    set_mount_readonly,
    umount2,
    unshare,
)

__all__ = [
    "MountEntry",
    "MountError",
    "MountLike",
    "bind",
    "is_mountpoint",
    "make_private",
    "mount_rootfs",
    "mounts_below",
    "parse_mountinfo",
    "set_propagation",
    "unmount",
    "unmount_below",
]

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x1, 0x2, 0x4, 0x8
MS_REMOUNT, MS_BIND, MS_REC = 0x20, 0x1000, 0x4000
MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 18, 1 << 19, 1 << 20
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8

# option -> (flag, whether the option sets it)
_FLAGS: dict[str, tuple[int, bool]] = {
    "ro": (MS_RDONLY, True),
    "rw": (MS_RDONLY, False),
    "nosuid": (MS_NOSUID, True),
    "suid": (MS_NOSUID, False),
    "nodev": (MS_NODEV, True),
    "dev": (MS_NODEV, False),
    "noexec": (MS_NOEXEC, True),
    "exec": (MS_NOEXEC, False),
    "sync": (0x10, True),
    "async": (0x10, False),
    "remount": (MS_REMOUNT, True),
    "mand": (0x40, True),
    "nomand": (0x40, False),
    "dirsync": (0x80, True),
    "noatime": (0x400, True),
    "atime": (0x400, False),
    "nodiratime": (0x800, True),
    "diratime": (0x800, False),
    "bind": (MS_BIND, True),
    "rbind": (MS_BIND | MS_REC, True),
    "relatime": (1 << 21, True),
    "norelatime": (1 << 21, False),
    "strictatime": (1 << 24, True),
    "nostrictatime": (1 << 24, False),
    "defaults": (0, True),
}
_PROPAGATION = {
    "private": MS_PRIVATE,
    "rprivate": MS_PRIVATE | MS_REC,
    "slave": MS_SLAVE,
    "rslave": MS_SLAVE | MS_REC,
    "shared": MS_SHARED,
    "rshared": MS_SHARED | MS_REC,
}
_MAX_DATA = os.sysconf("SC_PAGE_SIZE") - 1
_MAX_MOUNTINFO = 64 << 20  # bytes; some 400 000 mounts


class MountError(OSError):
    """A mount failed; its text names type, source, target and the likely cause."""


class MountLike(Protocol):
    """containerd.types.Mount, or shim.protocols.RootfsMount."""

    @property
    def type(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def options(self) -> Sequence[str]: ...


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of mountinfo: where, what, from where."""

    mount_id: int
    parent_id: int
    device: str
    root: str
    target: str
    options: str
    fstype: str
    source: str


def make_private() -> int:
    """Give this process a mount namespace that receives the host's mounts and sends none.

    Returns a descriptor of the one that it left, for what has to be done on the host (`shim.hooks.hooks`).

    Call it before any thread or child exists: those keep the namespace that they were made in.
    Raises PermissionError without CAP_SYS_ADMIN.
    """
    left = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        unshare(CLONE_NEWNS)
    except BaseException:
        os.close(left)
        raise
    mount("none", "/", "", MS_SLAVE | MS_REC, "")
    return left


def parse_options(options: Sequence[str]) -> tuple[int, int, str]:
    """(mount flags, propagation flags, data) of fstab-like options."""
    flags = propagation = 0
    data: list[str] = []
    for option in options:
        if option in _FLAGS:
            bits, sets = _FLAGS[option]
            flags = flags | bits if sets else flags & ~bits
        elif option in _PROPAGATION:
            propagation = _PROPAGATION[option]
        else:
            data.append(option)
    return flags, propagation, ",".join(data)


def mount_rootfs(mounts: Sequence[MountLike], target: str) -> None:
    """Mount containerd's list at `target`, in order; a mount's own `target` is relative to it.

    Raises MountError; what this call mounted before is unmounted again.
    """
    done: list[str] = []
    try:
        for item in mounts:
            where = _inside(target, item.target)
            _mount_one(item.type, item.source, where, item.options)
            done.append(where)
    except OSError:
        for where in reversed(done):
            unmount(where)
        raise


def bind(source: str, target: str, *, read_only: bool = False, recursive: bool = True) -> None:
    """Bind `source` to `target`. Raises MountError.

    A read-only bind is read-only before it is attached. The usual way, to bind and then remount, would
    not do in a shared directory: the copies that propagate to other mount namespaces (virtiofsd's)
    are made by the first step and never see the second.
    """
    try:
        tree = open_tree(source, recursive=recursive)
        try:
            if read_only:
                set_mount_readonly(tree)
            move_mount(tree, target)
        finally:
            os.close(tree)
    except OSError as error:
        why = _why(error.errno, source, "")
        text = f"cannot bind {source} to {target}: {error.strerror}{why}"
        raise MountError(error.errno, text) from error


def set_propagation(target: str, option: str) -> None:
    """Set how the mount at `target` passes mounts on: "shared", "slave", "rprivate", ..."""
    mount("", target, "", _PROPAGATION[option], "")


def _inside(base: str, relative: str) -> str:
    if not relative:
        return base
    path = os.path.normpath(os.path.join(base, relative.lstrip("/")))
    if path != base and not path.startswith(base.rstrip("/") + "/"):
        raise MountError(errno.EINVAL, f"mount target {relative!r} leaves the root file system", base)
    return path


def _mount_one(fstype: str, source: str, target: str, options: Sequence[str]) -> None:
    if "loop" in options:
        raise MountError(errno.ENOTSUP, "mounts of image files (option loop) are not supported", source)
    flags, propagation, data = parse_options(options)
    directory = ""
    if len(os.fsencode(data)) > _MAX_DATA:
        directory, data = _shorten_overlay(data)
    try:
        if flags & MS_BIND:
            mount(source, target, "", flags & (MS_BIND | MS_REC), "")
            if flags & ~(MS_BIND | MS_REC):  # a bind takes its flags only when remounted
                mount("", target, "", (flags & ~MS_REC) | MS_REMOUNT, "")
        elif directory:
            _in_directory(directory, source, target, fstype, flags, data)
        else:
            mount(source, target, fstype, flags, data)
        if propagation:
            mount("", target, "", propagation, "")
    except OSError as error:
        why = _why(error.errno, source, fstype)
        text = f"cannot mount {fstype or 'bind'} {source} on {target}: {error.strerror}{why}"
        raise MountError(error.errno, text) from error


def _why(number: int | None, source: str, fstype: str) -> str:
    if number == errno.ENODEV:
        return f" (this kernel has no {fstype}; try: modprobe {fstype})"
    if number == errno.ENOENT and source.startswith("/") and not os.path.exists(source):
        return f" ({source} does not exist)"
    return ""


def _shorten_overlay(data: str) -> tuple[str, str]:
    """(common directory, data with lower directories relative to it) of an overlay's long data."""
    options = data.split(",")
    for index, option in enumerate(options):
        if not option.startswith("lowerdir="):
            continue
        # An escaped colon ("\:") is part of a name.
        layers = option[9:].replace("\\:", "\0").split(":")
        common = os.path.commonpath(layers) if all(layer.startswith("/") for layer in layers) else ""
        if len(common) > 1:
            relative = [os.path.relpath(layer, common).replace("\0", "\\:") for layer in layers]
            options[index] = "lowerdir=" + ":".join(relative)
            return common.replace("\0", ":"), ",".join(options)
    raise MountError(errno.E2BIG, f"mount options of {len(data)} bytes; the kernel takes {_MAX_DATA}")


def _in_directory(directory: str, source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """mount(2) with `directory` as the working directory, of a thread that has its own."""
    if len(os.fsencode(data)) > _MAX_DATA:
        raise MountError(
            errno.E2BIG,
            f"mount options of {len(data)} bytes even when shortened; the kernel takes {_MAX_DATA}",
        )
    failure: list[OSError] = []

    def work() -> None:
        try:
            unshare(CLONE_FS)
            os.chdir(directory)
            mount(source, target, fstype, flags, data)
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="mount")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


def unmount(target: str) -> None:
    """Detach every mount at `target`; nothing mounted there, or nothing there, is fine."""
    for _ in range(64):  # mounts stack
        try:
            umount2(target, _MNT_DETACH | _UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return
            raise


def unmount_below(directory: str) -> None:
    """Detach every mount at or below `directory`, innermost first."""
    for entry in reversed(mounts_below(directory)):
        unmount(entry.target)


def mounts_below(directory: str) -> list[MountEntry]:
    """The mounts at or below `directory` (an absolute path without links), outermost first."""
    prefix = directory.rstrip("/") + "/"
    return [entry for entry in _mountinfo() if entry.target == directory or entry.target.startswith(prefix)]


def is_mountpoint(path: str) -> bool:
    """Whether something is mounted at `path` (absolute, without links)."""
    return any(entry.target == path for entry in _mountinfo())


def _mountinfo() -> list[MountEntry]:
    with open("/proc/thread-self/mountinfo", "rb") as file:
        return parse_mountinfo(file.read(_MAX_MOUNTINFO))


def parse_mountinfo(data: bytes) -> list[MountEntry]:
    """Parse proc_pid_mountinfo(5). Lines that are cut off or malformed are left out."""
    entries = []
    for line in data.split(b"\n"):
        left, separator, right = line.partition(b" - ")
        before, after = left.split(b" "), right.split(b" ")
        if not separator or len(before) < 6 or len(after) < 2:
            continue
        try:
            mount_id, parent_id = int(before[0]), int(before[1])
        except ValueError:
            continue
        device, root, target, options = (_unescape(word) for word in before[2:6])
        fstype, source = _unescape(after[0]), _unescape(after[1])
        entries.append(MountEntry(mount_id, parent_id, device, root, target, options, fstype, source))
    return entries


def _unescape(word: bytes) -> str:
    r"""Undo \040 and its like: the kernel escapes blanks, tabs, newlines and backslashes in octal."""
    if b"\\" not in word:
        return os.fsdecode(word)
    pieces = word.split(b"\\")
    out = [pieces[0]]
    for piece in pieces[1:]:
        code = piece[:3]
        if len(code) == 3 and all(0x30 <= digit <= 0x37 for digit in code):
            out.append(bytes([int(code, 8) & 0xFF]) + piece[3:])
        else:
            out.append(b"\\" + piece)
    return os.fsdecode(b"".join(out))
