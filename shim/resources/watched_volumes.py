"""Volumes that kubelet rewrites while containers read them: their programs are told, as on a host.

What: `find` picks the config maps, secrets, projected and downward volumes among a container's; `storages`
has the guest copy them; `WatchedVolumes` has it copy again when the host's change.
Why copies: through virtio-fs a program sees the new files, but no event: its kernel did not make the change.
A server that reloads by inotify waits for ever. In a copy the guest's agent makes the change, in kubelet's
own order (the new directory, then `..data` by a rename), and the events are the same.
Why told and not polled: Kata's agent looks every two seconds for ever, in each pod that has a service
account. Here the host's inotify says when, and an idle guest stays idle.
Invariants: only small volumes, by bounds, else they stay shared, with a line in the log; only directories
that kubelet writes by its atomic writer. What is missed costs an update, never a container.
Source: Kata's watchable-bind (facts/kata.md 1.8); Kubernetes' pkg/volume/util/atomic_writer.go.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import structlog

from devices.errors import KataError
from devices.inotify import DirectoryWatch
from proto import agent_pb2
from shim.spec.guest_spec import Volume

__all__ = ["WatchAgent", "WatchedVolumes", "find", "place", "storages"]

_KUBELETS = re.compile(r"/volumes/kubernetes\.io~(configmap|secret|projected|downward-api)/[^/]+$")
_LINK = "..data"
_GUEST = "/run/kata-containers/sandbox/watched"
_MAX_ENTRIES = 256
_MAX_BYTES = 4 << 20

_log = structlog.get_logger("volumes")


class WatchAgent(Protocol):
    """What is asked of the agent: a part of `shim.sandbox.agent_client.GuestAgent`."""

    async def copy_again(self, storages: Sequence[agent_pb2.Storage]) -> None:
        """Bring the copies of these up to date."""
        ...


def find(volumes: Sequence[Volume]) -> list[Volume]:
    """Those to be copied. Blocks."""
    return [volume for volume in volumes if _KUBELETS.search(volume.source) and _is_small(volume)]


def _is_small(volume: Volume) -> bool:
    try:
        if not os.path.islink(f"{volume.source}/{_LINK}"):
            return False
        entries = size = 0
        for folder, folders, files in os.walk(volume.source):
            entries += len(folders) + len(files)
            size += sum(os.lstat(f"{folder}/{name}").st_size for name in files)
            if entries > _MAX_ENTRIES or size > _MAX_BYTES:
                _log.warning("too large to be copied: no inotify of its changes", volume=volume.source)
                return False
    except OSError as error:  # whoever shares it says so
        _log.debug("not watched", volume=volume.source, error=str(error))
        return False
    return True


def storages(watched: Sequence[Volume]) -> list[agent_pb2.Storage]:
    """What the agent copies. One of Kata's knows them, too."""
    return [
        agent_pb2.Storage(
            driver="watchable-bind",
            source=volume.guest_path,
            fstype="bind",
            options=["bind", "ro"],
            mount_point=place(volume),
        )
        for volume in watched
    ]


def place(volume: Volume) -> str:
    """Where the guest has its copy."""
    return f"{_GUEST}/{volume.share_name}"


class WatchedVolumes:
    """Those of one sandbox. `agent` answers the guest's; `spawn` runs a coroutine as long as the VM lives."""

    def __init__(self, agent: Callable[[], WatchAgent], spawn: Callable[[Any], None]) -> None:
        self._agent = agent
        self._spawn = spawn
        self._watch: DirectoryWatch | None = None
        self._numbers: dict[str, list[int]] = {}  # container id -> watches
        self._users: dict[int, int] = {}
        self._changed: dict[str, agent_pb2.Storage] = {}
        self._working = False

    def add(self, container_id: str, watched: Sequence[Volume]) -> None:
        """Before the guest copies them for the first time. Never raises: a volume that cannot be watched is
        copied once."""
        for volume, storage in zip(watched, storages(watched), strict=True):
            try:
                if self._watch is None:
                    self._watch = DirectoryWatch(asyncio.get_running_loop())
                number = self._watch.watch(volume.source, lambda storage=storage: self._hear(storage))  # type: ignore[misc]
            except OSError as error:
                _log.warning("changes will not be seen", volume=volume.source, error=error.strerror)
                continue
            self._numbers.setdefault(container_id, []).append(number)
            self._users[number] = self._users.get(number, 0) + 1

    def remove(self, container_id: str) -> None:
        """The container is gone. Idempotent."""
        for number in self._numbers.pop(container_id, []):
            self._users[number] -= 1
            if not self._users[number]:
                del self._users[number]
                if self._watch is not None:
                    self._watch.forget(number)

    def close(self) -> None:
        """The VM is gone. Idempotent."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._numbers.clear()
        self._users.clear()
        self._changed.clear()

    def _hear(self, storage: agent_pb2.Storage) -> None:
        self._changed[storage.mount_point] = storage
        if not self._working:
            self._working = True
            self._spawn(self._tell())

    async def _tell(self) -> None:
        try:
            while self._changed:
                changed = list(self._changed.values())
                self._changed.clear()
                try:
                    await self._agent().copy_again(changed)
                except KataError as error:
                    _log.warning("the guest was not told of changes", error=str(error))
                else:
                    _log.debug("changed", volumes=[storage.source for storage in changed])
        finally:
            self._working = False
