"""A container's files in a VM on another machine: the guest fetches the image, volumes are copies.

What: `PulledFiles` implements `shim.resources.container_files.ContainerFiles` for VMs of somebody else
(`hypervisors.config.HostedSection`). The agent is told the image by a storage of Kata's driver
`image_guest_pull`; what the snapshotter has made of it on this host is not looked at.
Invariants: nothing is acquired on the host.
Source: Kata Containers 4.1.0: virtual_volume.rs of runtime-rs, image_pull_handler.rs of the agent.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from devices.errors import BugError
from proto import agent_pb2
from shim.protocols import RootfsMount
from shim.resources.copied_volumes import FileCopier, copy_volume
from shim.spec.guest_image import PulledImage
from shim.spec.guest_spec import Volume

__all__ = ["DRIVER", "PulledFiles"]

DRIVER = "image_guest_pull"
_GUEST = "/run/kata-containers"


class PulledFiles:
    """By the guest itself, and copies. `agent` answers the agent once the VM runs."""

    live = False

    def __init__(self, agent: Callable[[], FileCopier]) -> None:
        self._agent = agent

    async def set_up(self) -> None:
        """Nothing to do."""

    def sandbox_storages(self) -> list[agent_pb2.Storage]:
        """None: there is nothing shared."""
        return []

    def rootfs(self, container_id: str) -> str:
        """Where the agent puts what it has fetched."""
        return f"{_GUEST}/{container_id}/rootfs"

    async def name(self, volumes: Sequence[Volume]) -> list[Volume]:
        """As they are: each container gets a copy of its own."""
        return list(volumes)

    async def add(
        self,
        container_id: str,
        rootfs: Sequence[RootfsMount],  # noqa: ARG002
        root_path: str,  # noqa: ARG002
        volumes: Sequence[Volume],
        *,
        image: PulledImage | None = None,
    ) -> list[agent_pb2.Storage]:
        """See `ContainerFiles`."""
        if image is None:
            raise BugError("a container whose image the guest fetches needs one")
        for volume in volumes:
            await copy_volume(self._agent(), volume)
        told = json.dumps({"metadata": dict(image.annotations)}, separators=(",", ":"))
        return [
            agent_pb2.Storage(
                driver=DRIVER,
                driver_options=[f"{DRIVER}={told}"],
                source=image.name,
                fstype="overlay",
                mount_point=self.rootfs(container_id),
            )
        ]

    def plugged(self, container_id: str) -> bool:  # noqa: ARG002
        """None."""
        return False

    async def remove(self, container_id: str, *, alive: bool = True) -> list[Exception]:  # noqa: ARG002
        """Nothing is held."""
        return []

    async def tear_down(self) -> list[Exception]:
        """Nothing is held."""
        return []
