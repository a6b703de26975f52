"""Volumes of the host's that the guest has for itself: of huge pages, and copies of what kubelet rewrites.

What: `GuestVolumes.find` tells which of a container's volumes these are, and `GuestVolume` what becomes of
them; `begin` starts to follow the changes of the copies, `remove` and `close` end that.
Why one place: each kind takes a mount out of the share, or puts something of the guest in front of it; who
prepares containers need not know how many kinds there are. Containers without volumes load none of it.
Invariants: what `find` refuses is refused before anything is done; after `remove` nobody is told any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from devices.threads import look
from proto import agent_pb2
from shim.spec.guest_spec import Volume

if TYPE_CHECKING:
    from shim.resources.watched_volumes import WatchAgent, WatchedVolumes

__all__ = ["GuestVolumes", "Own"]


@dataclass(frozen=True, slots=True)
class Own:
    """What one container has of them. `shared`: its volumes that the share is still to have; `places`: where
    the guest has the others, by their index in the spec's mounts; `words`: what their user calls these
    places."""

    shared: list[Volume] = field(default_factory=list)
    watched: list[Volume] = field(default_factory=list)
    places: Mapping[int, str] = field(default_factory=dict)
    storages: list[agent_pb2.Storage] = field(default_factory=list)
    words: Mapping[str, str] = field(default_factory=dict)

    def rewrite(self, document: Mapping[str, Any]) -> None:
        """Have the guest's spec mount the guest's."""
        for index, place in self.places.items():
            mount = document["mounts"][index]
            kept = [option for option in mount.get("options") or [] if option not in ("bind", "rbind")]
            mount.update(type="bind", source=place, options=["rbind", *kept])


class GuestVolumes:
    """Those of one sandbox. `agent` answers the guest's; `spawn` runs a coroutine as long as the VM lives;
    `live`: the guest sees what changes in the share; `stock`: its agent is one of Kata's."""

    def __init__(
        self, agent: Callable[[], WatchAgent], spawn: Callable[[Any], None], *, live: bool, stock: bool
    ) -> None:
        self._agent = agent
        self._spawn = spawn
        self._live = live
        self._stock = stock
        self._watched: WatchedVolumes | None = None

    async def find(self, volumes: Sequence[Volume], spec: Mapping[str, Any]) -> Own:
        """`volumes` have their names. Raises CallerError."""
        if not volumes:
            return Own()
        from shim.resources import huge_pages, watched_volumes

        huge = await look(huge_pages.find, volumes, spec)
        shared = [volume for volume in volumes if volume.index not in huge]
        watched = await look(watched_volumes.find, shared) if self._live else []
        places = {index: volume.mount_point for index, volume in huge.items()}
        places |= {volume.index: watched_volumes.place(volume) for volume in watched}
        return Own(
            shared=shared,
            watched=watched,
            places=places,
            storages=[*huge_pages.storages(huge, stock=self._stock), *watched_volumes.storages(watched)],
            words={place: volume.source for volume in volumes if (place := places.get(volume.index))},
        )

    def begin(self, container_id: str, own: Own) -> None:
        """Before the guest copies them: what changes from now on is told. An agent of Kata's looks for
        itself."""
        if not own.watched or self._stock:
            return
        if self._watched is None:
            from shim.resources.watched_volumes import WatchedVolumes

            self._watched = WatchedVolumes(self._agent, self._spawn)
        self._watched.add(container_id, own.watched)

    def remove(self, container_id: str) -> None:
        """The container is gone. Idempotent."""
        if self._watched is not None:
            self._watched.remove(container_id)

    def close(self) -> None:
        """The VM is gone. Idempotent."""
        if self._watched is not None:
            self._watched.close()
