"""Storages of Kata's agent protocol: mount what the host lent, unmount it when the last user goes.

What: one small coroutine per driver (virtio-fs, ephemeral, local, bind, overlayfs, block devices)
behind `Storages.add`/`release`, counted by mount point because containers of a pod send the same
storage again.
Invariants: a mount point lies below one of `ROOTS`, so that no request can cover the guest's own
files; mount calls run outside the event loop and have a deadline; a failed `add` leaves nothing.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import shutil
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from agent import log
from agent.storage.mounts import MNT_DETACH, mount, umount
from agent.threads import in_thread
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from agent.reaper import Reaper
    from proto import agent_pb2

__all__ = ["DRIVERS", "ROOTS", "Storages", "checked"]

ROOTS = ("/run/kata-containers/",)


def _split(options: Iterable[str], *special: str) -> tuple[dict[str, str], list[str]]:
    """Take the `key=value` options named `special` out; options may be comma-joined."""
    taken: dict[str, str] = {}
    rest = []
    for word in (word for option in options for word in option.split(",") if word):
        key, _, value = word.partition("=")
        if key in special:
            taken[key] = value
        else:
            rest.append(word)
    return taken, rest


def _number(text: str, base: int, what: str) -> int:
    try:
        return int(text, base)
    except ValueError:
        raise RpcError(Code.INVALID_ARGUMENT, f"storage option {what}: {text[:40]!r} is no number") from None


def _own(path: str, gid: int) -> None:
    """Let group `gid` write: owner, mode, and setgid so that new files inherit it."""
    os.chown(path, -1, gid)
    os.chmod(path, os.stat(path).st_mode & 0o7777 | 0o2070)  # noqa: S103  (what fsGroup means)


async def _mount(storage: agent_pb2.Storage, source: str, fstype: str, options: Sequence[str]) -> None:
    target = storage.mount_point
    if fstype == "bind" and not os.path.isdir(source):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    else:
        os.makedirs(target, exist_ok=True)
    what = f"mounting {source} ({fstype}) on {target}"
    await in_thread(what, lambda: mount(source, target, fstype, options))


async def _virtio_fs(storage: agent_pb2.Storage) -> None:
    try:
        await _mount(storage, storage.source, storage.fstype or "virtiofs", storage.options)
    except RpcError as error:
        if not error.message.endswith(os.strerror(errno.EINVAL)):  # that means: no such tag
            raise
        await _virtio_fs_to_come(storage, error)


async def _virtio_fs_to_come(storage: agent_pb2.Storage, first: RpcError) -> None:
    """It was plugged a moment ago and its driver is still at it: tried again at each event of the kernel, and
    `first` raised when it does not come."""
    from agent.storage.blockdev import HOTPLUG_DEADLINE, on_uevent  # not on the usual start path

    what = f"mounting {storage.source} on {storage.mount_point}"
    failure: OSError | None = None
    end = asyncio.get_running_loop().time() + HOTPLUG_DEADLINE

    def attempt() -> None:  # beside the loop, when events are listened to
        nonlocal failure
        try:
            mount(storage.source, storage.mount_point, storage.fstype or "virtiofs", storage.options)
            failure = None
        except OSError as error:
            failure = error

    while True:
        # Without a failure nothing is waited for, and with one the first event.
        looks = iter([None, True])
        left = end - asyncio.get_running_loop().time()
        try:
            await on_uevent(lambda looks=looks: next(looks) if failure else True, left, begin=attempt)  # type: ignore[misc]
        except TimeoutError:
            raise first from None
        if failure is None:
            return
        if failure.errno != errno.EINVAL:
            raise RpcError(Code.INTERNAL, f"{what}: {failure.strerror}")


async def _bind(storage: agent_pb2.Storage) -> None:
    await _mount(storage, storage.source, "bind", storage.options)


async def _ephemeral(storage: agent_pb2.Storage) -> None:
    taken, options = _split(storage.options, "fsgid")
    if storage.fstype == "hugetlbfs" and any(option.startswith("size=") for option in options):
        await _reserve_huge_pages(options)  # for a host that counts them by volumes; ours by limits
    await _mount(storage, storage.source or "tmpfs", storage.fstype or "tmpfs", options)
    if "fsgid" in taken:
        _own(storage.mount_point, _number(taken["fsgid"], 10, "fsgid"))


async def _reserve_huge_pages(options: list[str]) -> None:
    taken, _ = _split(options, "pagesize", "size")
    page = _number(taken.get("pagesize", ""), 10, "pagesize")
    size = _number(taken.get("size", ""), 10, "size")
    if page <= 0 or size < page:
        raise RpcError(Code.INVALID_ARGUMENT, f"huge pages: size {size} with pages of {page} bytes")
    path = f"/sys/kernel/mm/hugepages/hugepages-{page >> 10}kB/nr_hugepages"

    def reserve() -> None:
        with open(path, "r+", encoding="ascii") as file:
            have = int(file.read())
            file.seek(0)
            file.write(str(have + size // page))

    await in_thread("reserving huge pages", reserve)


async def _local(storage: agent_pb2.Storage) -> None:
    taken, _ = _split(storage.options, "mode", "fsgid")
    os.makedirs(storage.mount_point, exist_ok=True)
    if "mode" in taken:
        os.chmod(storage.mount_point, _number(taken["mode"], 8, "mode") & 0o7777)
    if "fsgid" in taken:
        _own(storage.mount_point, _number(taken["fsgid"], 10, "fsgid"))


async def _overlay(storage: agent_pb2.Storage) -> None:
    options = [word for word in storage.options if not word.startswith("io.katacontainers.")]
    if "io.katacontainers.fs-opt.overlay-rw" in storage.options:
        base = os.path.dirname(storage.mount_point.rstrip("/"))
        for name, key in (("fs", "upperdir"), ("work", "workdir")):
            os.makedirs(f"{base}/{name}", exist_ok=True)
            options.append(f"{key}={base}/{name}")
    await _mount(storage, storage.source or "overlay", "overlay", options)


async def _watchable(storage: agent_pb2.Storage) -> None:
    from agent.storage.watched import bring_up_to_date

    target = storage.mount_point
    await in_thread(f"copying to {target}", lambda: bring_up_to_date(storage.source, target))


async def _block(storage: agent_pb2.Storage) -> None:
    from agent.storage.blockdev import find_device, wait_for_size

    if any(option.startswith("encryption_key=") for option in storage.driver_options):
        raise RpcError(Code.UNIMPLEMENTED, "encrypted block storages are not supported by this agent")
    device = await find_device(storage.driver, storage.source)
    sizes, _ = _split(storage.driver_options, "kata-shim.bytes")
    if "kata-shim.bytes" in sizes:
        await wait_for_size(device, _number(sizes["kata-shim.bytes"], 10, "kata-shim.bytes"))
    options = [word for word in storage.options if not word.startswith("X-kata.")]
    await _mount(storage, device, storage.fstype, options)
    if storage.HasField("fs_group"):
        group = storage.fs_group
        path, gid = storage.mount_point, group.group_id
        if group.group_change_policy == 0 or os.stat(path).st_gid != gid:
            await in_thread(f"giving {path} to group {gid}", lambda: _own_tree(path, gid), 300.0)


def _own_tree(path: str, gid: int) -> None:
    for _, _, names, fd in os.fwalk(path):
        os.fchown(fd, -1, gid)
        os.fchmod(fd, os.fstat(fd).st_mode & 0o7777 | 0o2070)
        for name in names:
            os.chown(name, -1, gid, dir_fd=fd, follow_symlinks=False)


_DRIVERS: dict[str, Callable[[agent_pb2.Storage], Awaitable[None]]] = {
    "virtio-fs": _virtio_fs,
    "ephemeral": _ephemeral,
    "local": _local,
    "bind": _bind,
    "overlayfs": _overlay,
    "watchable-bind": _watchable,
    "blk": _block,
    "mmioblk": _block,
    "scsi": _block,
    "nvdimm": _block,
}
DRIVERS = tuple(_DRIVERS)


def checked(target: str) -> str:
    """`target` if it lies below one of `ROOTS`. Raises RpcError(INVALID_ARGUMENT)."""
    if not target.startswith(ROOTS) or os.path.normpath(target) != target.rstrip("/"):
        raise RpcError(Code.INVALID_ARGUMENT, f"storage: {target[:200]!r} is no place to mount")
    return target


class Storages:
    """Everything mounted for the sandbox, counted by mount point."""

    def __init__(self, reaper: Reaper | None = None) -> None:
        self._reaper = reaper  # without one no file systems are made
        self._users: dict[str, int] = {}
        self._copies: set[str] = set()  # those of them that are directories of ours
        self._lock = asyncio.Lock()

    async def add(self, storages: Iterable[agent_pb2.Storage]) -> list[str]:
        """Mount them in order; the mount points, for `release`. All or nothing."""
        done: list[str] = []
        try:
            for storage in storages:
                await self._add(storage)
                done.append(storage.mount_point)
        except BaseException:
            await self.release(done)
            raise
        return done

    async def _add(self, storage: agent_pb2.Storage) -> None:
        target = checked(storage.mount_point)
        driver = _DRIVERS.get(storage.driver)
        if driver is None:
            raise RpcError(
                Code.UNIMPLEMENTED, f"storage driver {storage.driver[:60]!r}; known: {', '.join(_DRIVERS)}"
            )
        async with self._lock:
            if target not in self._users:
                if "create_filesystem" in storage.driver_options:
                    await self._format(storage)
                try:
                    await driver(storage)
                except BaseException:
                    if driver is _watchable:
                        shutil.rmtree(target, ignore_errors=True)
                    raise
                if driver is _watchable:
                    self._copies.add(target)
                log.debug(f"storage {storage.driver} at {target}")
            self._users[target] = self._users.get(target, 0) + 1

    async def _format(self, storage: agent_pb2.Storage) -> None:
        if self._reaper is None or _DRIVERS[storage.driver] is not _block:
            raise RpcError(Code.UNIMPLEMENTED, f"no file system can be made for {storage.driver[:60]!r}")
        from agent.storage.blockdev import find_device
        from agent.storage.format import make_filesystem

        device = await find_device(storage.driver, storage.source)
        await make_filesystem(self._reaper, device, storage.fstype)

    async def release(self, targets: Iterable[str]) -> None:
        """Drop one use of each; unmount what has no user left. Never raises."""
        for target in reversed(list(targets)):
            async with self._lock:
                left = self._users.get(target, 0) - 1
                if left > 0:
                    self._users[target] = left
                    continue
                self._users.pop(target, None)
                what, let_go = f"unmounting {target}", functools.partial(_unmount, target)
                if target in self._copies:
                    self._copies.discard(target)
                    what, let_go = f"removing {target}", functools.partial(shutil.rmtree, target)
                try:
                    await in_thread(what, let_go)
                except RpcError as error:
                    log.error(error.message)

    async def update(self, storages: Iterable[agent_pb2.Storage]) -> None:
        """UpdateEphemeralMounts: remount tmpfs storages with new options (their size), and copy watched ones
        again. Raises RpcError."""
        for storage in storages:
            target = checked(storage.mount_point)
            if storage.driver == "ephemeral":
                _, options = _split(storage.options, "fsgid")
                options.append("remount")
                work = functools.partial(mount, storage.source, target, storage.fstype, options)
                await in_thread(f"remounting {target}", work)
            elif storage.driver != "watchable-bind":
                raise RpcError(
                    Code.INVALID_ARGUMENT, f"storage driver {storage.driver[:60]!r} cannot be updated"
                )
            else:
                async with self._lock:
                    if target not in self._users:
                        raise RpcError(Code.NOT_FOUND, f"there is no storage at {target}")
                    await _watchable(storage)


def _unmount(target: str) -> None:
    try:
        umount(target.rstrip("/"), MNT_DETACH)
    except OSError as error:
        if error.errno not in (2, 22):  # never mounted (driver "local"), or gone already
            raise
