"""How a container's files get into the VM: shared by virtio-fs, or as disks and copies.

What: `ContainerFiles` is what the sandbox needs; `SharedFiles` serves it with the shared directory,
`shim.resources.block_files.BlockFiles` where there is none. Both give the container the same paths in the
guest, so its spec is the same.
Invariants: what `add` acquired is released by `remove`, and recorded in the undo log before; a failed `add`
leaves nothing. One container at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from devices.threads import acquire
from proto import agent_pb2
from shim.protocols import RootfsMount
from shim.resources.shared_dir import ROOTS_TAG, SHARE_TAG, SharedDir
from shim.spec.guest_spec import GUEST_ROOTS, GUEST_SHARE, Volume, guest_rootfs

if TYPE_CHECKING:
    from shim.spec.guest_image import PulledImage

__all__ = ["ContainerFiles", "SharedFiles"]


class ContainerFiles(Protocol):
    """All containers' files of one sandbox. `live`: the guest sees what changes on the host later."""

    live: bool

    async def set_up(self) -> None:
        """Before the VM starts. Raises KataError."""
        ...

    def sandbox_storages(self) -> list[agent_pb2.Storage]:
        """What the agent mounts for the whole sandbox."""
        ...

    def rootfs(self, container_id: str) -> str:
        """Where the root file system of a container to come will be in the guest."""
        ...

    async def name(self, volumes: Sequence[Volume]) -> list[Volume]:
        """The volumes of a container to come, each with the name that it will have in the guest."""
        ...

    async def add(
        self,
        container_id: str,
        rootfs: Sequence[RootfsMount],
        root_path: str,
        volumes: Sequence[Volume],
        *,
        image: PulledImage | None = None,
    ) -> list[agent_pb2.Storage]:
        """Bring one container's files in, by a running VM; what the agent must mount for it.

        `rootfs` is containerd's list; if it is empty, the directory `root_path` counts. `image`: what the
        guest is to fetch instead, where it does. Raises KataError.
        """
        ...

    def plugged(self, container_id: str) -> bool:
        """Whether it has disks that the guest must let go of."""
        ...

    async def remove(self, container_id: str, *, alive: bool = True) -> list[Exception]:
        """Undo `add`, going on past errors; disks that are plugged into a VM which is not `alive` go with it.
        Idempotent."""
        ...

    async def tear_down(self) -> list[Exception]:
        """Release everything, when the VM is gone. Idempotent."""
        ...


class SharedFiles:
    """By virtio-fs. See `shim.resources.shared_dir`."""

    live = True

    def __init__(self, share: SharedDir) -> None:
        self._share = share
        self._lock = asyncio.Lock()

    async def set_up(self) -> None:
        """See `ContainerFiles`."""
        async with self._lock:
            await acquire(self._share.set_up)

    def sandbox_storages(self) -> list[agent_pb2.Storage]:
        """The share itself, and that of root file systems."""
        places = {SHARE_TAG: GUEST_SHARE, **({ROOTS_TAG: GUEST_ROOTS} if self._share.roots_apart else {})}
        return [
            agent_pb2.Storage(
                driver="virtio-fs", source=tag, fstype="virtiofs", options=["nodev"], mount_point=f"{place}/"
            )
            for tag, place in places.items()
        ]

    def rootfs(self, container_id: str) -> str:
        """See `ContainerFiles`."""
        return (
            f"{GUEST_ROOTS}/{container_id}/rootfs" if self._share.roots_apart else guest_rootfs(container_id)
        )

    async def name(self, volumes: Sequence[Volume]) -> list[Volume]:
        """Those that another container has already get its names, so that both see one file."""
        async with self._lock:
            return await acquire(self._share.merge, volumes)

    async def add(
        self,
        container_id: str,
        rootfs: Sequence[RootfsMount],
        root_path: str,
        volumes: Sequence[Volume],
        *,
        image: PulledImage | None = None,  # noqa: ARG002
    ) -> list[agent_pb2.Storage]:
        """See `ContainerFiles`."""
        async with self._lock:
            await acquire(self._share.add_container, container_id, rootfs, root_path, volumes)
        return []

    def plugged(self, container_id: str) -> bool:  # noqa: ARG002
        """None."""
        return False

    async def remove(self, container_id: str, *, alive: bool = True) -> list[Exception]:  # noqa: ARG002
        """See `ContainerFiles`."""
        async with self._lock:
            return list(await acquire(self._share.remove_container, container_id))

    async def tear_down(self) -> list[Exception]:
        """See `ContainerFiles`."""
        async with self._lock:
            return list(await acquire(self._share.tear_down))
