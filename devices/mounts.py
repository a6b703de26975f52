"""Mounts: the daemon's own namespace, binds, what is mounted where.

What: `make_private`, `bind`, `seal`, `unmount`, `unmount_below`, and a reader of mountinfo. Root file systems
are `devices.rootfs_mounts`'.
Why not mount(8): a fork and exec for each, and its text for an interface.
Invariants: nothing here follows a symbolic link on unmount; what a tenant may have made is bound `nodev` and
`nosuid`: a node or a setuid program in it is the guest's to use, never the host's. Every function blocks, so
callers on the event loop use `devices.threads.acquire` (all threads share the daemon's mount namespace as
long as they were made after `make_private`).
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from devices.beneath import descriptor_path
from devices.errors import HostError
from devices.syscalls import (
    CLONE_NEWNS,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_NOSYMFOLLOW,
    MOUNT_ATTR_RDONLY,
    mount,
    move_mount,
    open_tree,
    set_mount_attributes,
    setns,
    umount2,
    unshare,
)

__all__ = [
    "PROPAGATION",
    "TENANT",
    "MountEntry",
    "MountError",
    "bind",
    "enter",
    "failed",
    "is_mountpoint",
    "make_private",
    "mount_of",
    "mount_table",
    "mounts_below",
    "parse_mountinfo",
    "seal",
    "set_propagation",
    "unmount",
    "unmount_below",
]

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x1, 0x2, 0x4, 0x8
MS_NOATIME, MS_NODIRATIME, MS_STRICTATIME = 0x400, 0x800, 1 << 24
MS_REMOUNT, MS_BIND, MS_REC = 0x20, 0x1000, 0x4000
MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 18, 1 << 19, 1 << 20
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8

PROPAGATION = {
    "private": MS_PRIVATE,
    "rprivate": MS_PRIVATE | MS_REC,
    "slave": MS_SLAVE,
    "rslave": MS_SLAVE | MS_REC,
    "shared": MS_SHARED,
    "rshared": MS_SHARED | MS_REC,
}
TENANT = MOUNT_ATTR_NODEV | MOUNT_ATTR_NOSUID
"""The attributes of a mount of what a guest or an image may have made."""
_host_roots: list[int] = []  # of the mount namespace that `make_private` left: a descriptor
_MAX_MOUNTINFO = 64 << 20  # bytes; some 400 000 mounts


class MountError(OSError):
    """A mount failed; its text names type, source, target and the likely cause."""


@dataclass(frozen=True, slots=True)
class MountEntry:
    """One line of mountinfo: where, what, from where; `super_options` are the file system's own."""

    mount_id: int
    parent_id: int
    device: str
    root: str
    target: str
    options: str
    fstype: str
    source: str
    super_options: str = ""


def make_private() -> int:
    """Give this process a mount namespace that receives the host's mounts and sends none.

    Returns a descriptor of the one that it left, for what has to be done on the host (`shim.hooks.hooks`).

    Call it before any thread or child exists: those keep the namespace that they were made in.
    Raises PermissionError without CAP_SYS_ADMIN, HostError where `/` is no mount point: nothing could keep
    what is mounted here from the host.
    """
    left = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # stays the host's, mounts and all
    try:
        unshare(CLONE_NEWNS)
        mount("none", "/", "", MS_SLAVE | MS_REC, "")
    except BaseException as error:
        os.close(left)
        os.close(root)
        if not isinstance(error, OSError) or error.errno != errno.EINVAL:
            raise
        raise HostError(
            "/ is no mount point here (a plain chroot): mounts cannot be kept to the pod",
            phase="devices",
            hint="make it one before containerd starts: mount --bind ROOT ROOT, then chroot ROOT",
        ) from error
    _host_roots.append(root)
    return left


def enter(pid: int) -> int:
    """Move this process into the mount namespace of that one; its root and working directory are the
    namespace's then. Returns, and needs, the same as `make_private`."""
    left = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        try:
            setns(there, CLONE_NEWNS)
        finally:
            os.close(there)
    except BaseException:
        os.close(left)
        raise
    return left


def bind(
    source: str | int,
    target: str | int,
    *,
    read_only: bool = False,
    deep: bool = True,
    recursive: bool = True,
    tenant: bool = False,
) -> None:
    """Bind `source` to `target`: paths, or descriptors of what was found there. `deep`: what is mounted below
    is read-only, too, if `read_only`. `tenant`: it holds what a guest or an image may have made. Raises
    MountError.

    A read-only bind is read-only before it is attached. The usual way, to bind and then remount, would
    not do in a shared directory: the copies that propagate to other mount namespaces (virtiofsd's)
    are made by the first step and never see the second.

    Raises HostError where the host has mounted something at the source since, which does not reach us for its
    root mount is not shared: the container would find an empty directory.
    """
    if _host_roots and _is_out_of_sight(source, _host_roots[-1]):
        path = os.readlink(descriptor_path(source)) if isinstance(source, int) else source
        raise HostError(
            f"what the host has mounted at {path} does not reach the shim: its mount at / is not shared",
            phase="devices",
            hint="mount --make-rshared / before containerd starts (systemd does it)",
        )
    attributes = (MOUNT_ATTR_RDONLY if read_only and deep else 0) | (TENANT if tenant else 0)
    try:
        tree = open_tree(source, recursive=recursive)
        try:
            if attributes:
                set_mount_attributes(tree, attributes)
            if read_only and not deep:
                set_mount_attributes(tree, MOUNT_ATTR_RDONLY, recursive=False)
            move_mount(tree, target)
        finally:
            os.close(tree)
    except OSError as error:
        raise failed("bind", source, target, error) from error


def seal(path: str) -> None:
    """Make what is mounted at `path`, and on that, safe for a program that walks it by its names: nothing is
    written, no link is followed, no device opened. Raises MountError; Linux 5.14."""
    try:
        top = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            set_mount_attributes(top, TENANT | MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NOSYMFOLLOW)
        finally:
            os.close(top)
    except OSError as error:
        old = (
            " (before Linux 5.14 mounts cannot be told to follow no links)"
            if error.errno == errno.EINVAL
            else ""
        )
        raise MountError(error.errno, f"cannot seal {path}: {error.strerror}{old}") from error


def _is_out_of_sight(source: str | int, host_root: int) -> bool:
    """Whether the host sees a file system at that path that we have mounted nowhere."""
    try:
        path = os.readlink(f"/proc/self/fd/{source}") if isinstance(source, int) else source
        theirs = os.stat(path.lstrip("/") or ".", dir_fd=host_root)
        ours = os.stat(source)
    except OSError:
        return False  # what is not there is told by who needs it
    if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino):
        return False
    device = f"{os.major(theirs.st_dev)}:{os.minor(theirs.st_dev)}"
    # A subvolume of btrfs has a device number of its own, which no line of mountinfo has: not judged.
    return all(entry.device != device and entry.fstype != "btrfs" for entry in mount_table())


def set_propagation(target: str, option: str) -> None:
    """Set how the mount at `target` passes mounts on: "shared", "slave", "rprivate", ..."""
    mount("", target, "", PROPAGATION[option], "")


def failed(what: str, source: str | int, target: str | int, error: OSError, fstype: str = "") -> MountError:
    """The error of `what` ("bind", "mount overlay") with source, target and the likely cause."""
    names = [
        os.readlink(descriptor_path(each)) if isinstance(each, int) else each for each in (source, target)
    ]
    why = _why(error.errno, names[0], fstype)
    return MountError(error.errno, f"cannot {what} {names[0]} on {names[1]}: {error.strerror}{why}")


def _why(number: int | None, source: str, fstype: str) -> str:
    if number == errno.ENODEV:
        return f" (this kernel has no {fstype}; try: modprobe {fstype})"
    if number == errno.ENOSYS:
        return " (Linux 5.12 or later is needed)"
    if number == errno.ENOENT and source.startswith("/") and not os.path.exists(source):
        return f" ({source} does not exist)"
    return ""


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
    return [entry for entry in mount_table() if entry.target == directory or entry.target.startswith(prefix)]


def mount_of(path: str) -> MountEntry:
    """The mount that `path`, which exists, lies on. Raises OSError."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    real = os.path.realpath(path)
    on = [
        entry
        for entry in mount_table()
        if entry.device == number and f"{real}/".startswith(f"{entry.target.rstrip('/')}/")
    ]
    if not on:  # btrfs numbers its subvolumes otherwise
        raise OSError(errno.ENOENT, "it lies on no mount", path)
    return max(on, key=lambda entry: len(entry.target))


def is_mountpoint(path: str) -> bool:
    """Whether something is mounted at `path` (absolute, without links)."""
    return any(entry.target == path for entry in mount_table())


def mount_table() -> list[MountEntry]:
    """All mounts of the calling thread's namespace, in the order of their making."""
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
        own = _unescape(after[2]) if len(after) > 2 else ""
        entries.append(MountEntry(mount_id, parent_id, device, root, target, options, fstype, source, own))
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
