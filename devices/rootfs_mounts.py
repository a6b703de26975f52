"""containerd's list of root file system mounts, mounted where it says: inside the root.

What: `mount_rootfs`; `bind_rootfs` where there is no list, but a directory.
Why apart: the first of the list is mounted on a directory of ours, the others inside what the image is; an
image may have a link to the host where one of them goes.
Invariants: where a mount goes is found by the kernel inside the root file system, links included
(`devices.beneath.open_in_root`), and it is attached to that by descriptor; what is mounted is `nodev` and
`nosuid` on the host. On failure nothing stays.

An overlay of many layers does not fit the one page that mount(2) takes as data. As containerd does,
the common directory is then left out of the paths and entered instead; here by a thread that has a
working directory of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Sequence
from typing import Protocol

from devices.beneath import descriptor_path, open_in_root, open_named
from devices.errors import CallerError
from devices.loop import attached
from devices.mounts import (
    MS_BIND,
    MS_NOATIME,
    MS_NODEV,
    MS_NODIRATIME,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    MS_STRICTATIME,
    PROPAGATION,
    TENANT,
    MountError,
    bind,
    failed,
    unmount,
    unmount_below,
)
from devices.syscalls import (
    CLONE_FS,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    mount,
    move_mount,
    open_tree,
    set_mount_attributes,
    unshare,
)
from devices.threads import start

__all__ = ["MountLike", "bind_rootfs", "mount_rootfs", "parse_options"]

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
    "noatime": (MS_NOATIME, True),
    "atime": (MS_NOATIME, False),
    "nodiratime": (MS_NODIRATIME, True),
    "diratime": (MS_NODIRATIME, False),
    "bind": (MS_BIND, True),
    "rbind": (MS_BIND | MS_REC, True),
    "relatime": (1 << 21, True),
    "norelatime": (1 << 21, False),
    "strictatime": (MS_STRICTATIME, True),
    "nostrictatime": (MS_STRICTATIME, False),
    "defaults": (0, True),
}
# What a bind takes of mount(2)'s flags: the same as attributes.
_ATIME = 0x70
_ATTRIBUTES = {
    MS_RDONLY: MOUNT_ATTR_RDONLY,
    MS_NOSUID: MOUNT_ATTR_NOSUID,
    MS_NODEV: MOUNT_ATTR_NODEV,
    MS_NOEXEC: MOUNT_ATTR_NOEXEC,
    MS_NOATIME: 0x10,
    MS_STRICTATIME: 0x20,
    MS_NODIRATIME: 0x80,
}
_MAX_DATA = os.sysconf("SC_PAGE_SIZE") - 1


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


def mount_rootfs(mounts: Sequence[MountLike], target: str) -> None:
    """Mount containerd's list at the directory `target`, where nothing is mounted yet, in order; a mount's
    own `target` is a path inside it. Raises MountError, with nothing mounted there.
    """
    try:
        for item in mounts:
            _mount_inside(item, target)
    except OSError:
        unmount(target)  # with all that is mounted on what is mounted there
        unmount_below(target)
        raise


def bind_rootfs(path: str, target: str, *, read_only: bool = False) -> None:
    """Bind the directory `path` of a bundle. Raises CallerError for what is none (runc refuses a link, too),
    MountError."""
    try:
        root = open_named(path.rstrip("/") or "/", follow=False)
    except OSError as error:
        raise failed("mount", path, target, error) from error
    try:
        kind = os.fstat(root).st_mode
        if not stat.S_ISDIR(kind):
            what = "a symbolic link" if stat.S_ISLNK(kind) else "no directory"
            raise CallerError(
                f"the root file system {path} is {what}",
                phase="rootfs",
                code="INVALID_ARGUMENT",
                hint="root.path of config.json must name the directory itself",
            )
        bind(root, target, read_only=read_only, tenant=True)
    finally:
        os.close(root)


def parse_options(options: Sequence[str]) -> tuple[int, int, str]:
    """(mount flags, propagation flags, data) of fstab-like options; "loop" is in none of them."""
    flags = propagation = 0
    data: list[str] = []
    for option in options:
        if option in _FLAGS:
            bits, sets = _FLAGS[option]
            flags = flags | bits if sets else flags & ~bits
        elif option in PROPAGATION:
            propagation = PROPAGATION[option]
        elif option != "loop":
            data.append(option)
    return flags, propagation, ",".join(data)


def _mount_inside(item: MountLike, base: str) -> None:
    """Mount one of the list: where its target leads to now, inside what is mounted at `base`."""
    _check_inside(base, item.target)
    shown = os.path.join(base, item.target.lstrip("/")) if item.target else base
    flags, propagation, data = parse_options(item.options)
    try:
        root = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            where = open_in_root(root, item.target or "/")
        finally:
            os.close(root)
        try:
            if flags & MS_BIND:
                _bind_one(item.source, where, flags, propagation)
            else:
                with _device(item, read_only=bool(flags & MS_RDONLY)) as source:
                    _mount_one(item.type, source, descriptor_path(where), flags | MS_NODEV | MS_NOSUID, data)
        finally:
            os.close(where)
        if propagation and not flags & MS_BIND:
            if item.target:
                raise OSError(errno.EINVAL, "only binds and the root itself can have a propagation")
            mount("", base, "", propagation, "")
    except OSError as error:
        raise failed(f"mount {item.type or 'bind'}", item.source, shown, error, item.type) from error


def _device(item: MountLike, *, read_only: bool) -> contextlib.AbstractContextManager[str]:
    """What is mounted: the source, or the image file that it is as a block device (blockfile snapshotter)."""
    if "loop" in item.options:
        return attached(item.source, read_only=read_only)
    return contextlib.nullcontext(item.source)


def _check_inside(base: str, relative: str) -> None:
    path = os.path.normpath(os.path.join(base, relative.lstrip("/")))
    if path != base and not path.startswith(base.rstrip("/") + "/"):
        raise MountError(errno.EINVAL, f"mount target {relative!r} leaves the root file system", base)


def _bind_one(source: str, where: int, flags: int, propagation: int) -> None:
    """A bind has its flags before it is attached; they are the top mount's alone, as mount(8) has it."""
    tree = open_tree(source, recursive=bool(flags & MS_REC))
    try:
        set_mount_attributes(tree, TENANT)
        attributes = sum(bit for flag, bit in _ATTRIBUTES.items() if flags & flag)
        atime = _ATIME if flags & (MS_NOATIME | MS_STRICTATIME) else 0
        set_mount_attributes(tree, attributes, clear=atime, recursive=False)
        if propagation:
            set_mount_attributes(
                tree, 0, propagation=propagation & ~MS_REC, recursive=bool(propagation & MS_REC)
            )
        move_mount(tree, where)
    finally:
        os.close(tree)


def _mount_one(fstype: str, source: str, target: str, flags: int, data: str) -> None:
    directory = ""
    if len(os.fsencode(data)) > _MAX_DATA:
        directory, data = _shorten_overlay(data)
    if directory:
        _in_directory(directory, source, target, fstype, flags, data)
    else:
        mount(source, target, fstype, flags, data)


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
    start(thread)
    thread.join()
    if failure:
        raise failure[0]
