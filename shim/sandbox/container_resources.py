"""What the containers of one sandbox get from the host: root file systems, volumes, devices, room, hooks.

What: `ContainerResources.prepare` gets all of it for one container and says what the guest has to do with
it; `release` gives it back. `plug_first` is what has to be there before the VM starts.
Why apart from the sandbox: that is a VM and its phases; this is what happens in it for each container, in one
order, and is undone in the other.
Invariants: what is refused is refused before anything is mounted or plugged; whatever `prepare` did before it
failed, `release` undoes; it works with a dead VM, and any number of times. Modules for what few containers
have are imported when one has it.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import structlog

from devices.config import ShareFsConfig
from devices.errors import KataError
from devices.holdings import Holdings
from devices.kinds import Kind, Op
from devices.manager import DeviceManager
from devices.threads import look
from devices.undo import UndoLog
from hypervisors.base import Hypervisor
from proto import agent_pb2, oci_pb2
from shim.protocols import GuestContainer, RootfsMount
from shim.resources.container_files import ContainerFiles
from shim.resources.direct_volumes import DirectVolumes
from shim.resources.direct_volumes import find as find_direct
from shim.resources.direct_volumes import rewrite as rewrite_direct
from shim.resources.guest_volumes import GuestVolumes
from shim.resources.sizing import Sizing, spec_limits
from shim.resources.vfio_settings import wants
from shim.sandbox.agent_client import GuestAgent
from shim.sandbox.settings import SandboxSettings
from shim.spec.guest_devices import HostDevice, host_devices
from shim.spec.guest_spec import guest_spec, plan_volumes, wants_sandbox_pidns
from shim.spec.oci import Rest, spec_from_json
from shim.state.bundle import MEMBER, OWN
from shim.state.trace import Trace

if TYPE_CHECKING:
    from shim.hooks.hooks import HostHooks
    from shim.resources.vfio_devices import VfioDevices, Wanted
    from shim.sandbox.management import Management
    from shim.spec.guest_spec import Volume

__all__ = ["ContainerResources"]

_log = structlog.get_logger("sandbox")

# Files that each container has from its caller: not what somebody calls his volumes.
_USUAL = frozenset({"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/shm", "/dev/termination-log"})
_DISK_DRIVERS = frozenset({"blk", "mmioblk", "scsi", "nvdimm"})  # the agent's words


class ContainerResources:
    """See the module's docstring. `agent` answers the guest's once there is one; `rescan` looks for links
    that hooks have made; `spawn` runs a coroutine as long as the VM lives. `writing`: the containers with
    disks that they may write."""

    def __init__(
        self,
        settings: SandboxSettings,
        hypervisor: Hypervisor,
        devices: DeviceManager,
        *,
        files: ContainerFiles,
        sizing: Sizing,
        undo: UndoLog,
        trace: Trace,
        agent: Callable[[], GuestAgent],
        rescan: Callable[[], Awaitable[None]],
        spawn: Callable[[Any], None],
    ) -> None:
        self.writing: set[str] = set()
        self._settings = settings
        self._hypervisor = hypervisor
        self._devices = devices
        self._files = files
        self._sizing = sizing
        self._undo = undo
        self._trace = trace
        self._agent = agent
        self._rescan = rescan
        self._hooks: dict[str, HostHooks] = {}
        self._holdings = Holdings(devices, hypervisor)
        self._direct = DirectVolumes(
            devices, self._holdings, undo, alias=settings.alias, style=settings.disks
        )
        self._management: Management | None = None  # from the first direct volume on
        self._own = GuestVolumes(agent, spawn, live=files.live, stock=not settings.direct_stdio)
        self._vfio: VfioDevices | None = None  # once a container wants such a device

    async def plug_first(self) -> None:
        """Before the VM starts: the devices of VFIO that it starts with, and of a VMM that plugs disks at the
        start only, those that the first container will ask for. Raises KataError."""
        if self._settings.passed is not None:
            await self._vfio_devices().add_cold(self._settings.passed)
        spec, able = self._settings.first_spec, await self._hypervisor.capabilities()
        if able.can(Kind.BLK, Op.HOT) or not able.can(Kind.BLK, Op.COLD) or spec is None:
            return
        from shim.resources.container_devices import ContainerDevices

        devices = ContainerDevices(self._devices, self._holdings, self._settings.disks)
        disks = [await devices.disk(device) for device in await look(host_devices, spec)]
        direct = await look(find_direct, plan_volumes(spec, self._settings.sandbox_id))
        disks += [await self._direct.disk(volume) for volume in direct.values()]
        for disk in disks:
            await self._devices.try_add_device(disk, self._hypervisor)

    async def prepare(
        self, container_id: str, bundle: str, spec: Mapping[str, Any], rootfs: Sequence[RootfsMount]
    ) -> GuestContainer:
        """Mount the container's root file system and volumes into the share, plug its devices, translate its
        spec, run the hooks that come before it is made. Raises KataError; `release` undoes what was done."""
        if self._settings.pod is not None:
            from shim.sandbox.pod_config import complete

            spec = await look(complete, spec, self._settings.pod)
        kind = self._settings.container_type if container_id == self._settings.sandbox_id else MEMBER
        volumes = [] if kind == OWN else plan_volumes(spec, container_id, self._settings.shm_source)
        direct = await look(find_direct, volumes) if volumes else {}
        volumes = [volume for volume in volumes if volume.index not in direct]
        own = await self._own.find(await self._files.name(volumes), spec)
        volumes = own.shared
        await self._tell_limits(container_id, volumes, spec)
        disks = [] if kind == OWN else await look(host_devices, spec)
        passed = await self._find_passed(spec) if kind != OWN else None
        root_path = os.path.join(bundle, (spec.get("root") or {}).get("path") or "rootfs")

        def translate() -> tuple[oci_pb2.Spec, Rest, oci_pb2.LinuxResources]:
            document, left_out = guest_spec(
                spec,
                container_id=container_id,
                bundle=bundle,
                container_type=kind,
                volumes=volumes,
                root=self._files.rootfs(container_id),
                disable_seccomp=self._settings.disable_guest_seccomp,
                keep_cpuset=self._settings.direct_stdio,
                devices=disks,
            )
            rewrite_direct(document, direct)
            own.rewrite(document)
            if passed is not None:
                from shim.resources.vfio_devices import rewrite as rewrite_passed

                rewrite_passed(document, passed, self._settings.vfio)
                left_out += passed.left_out
            message, rest = spec_from_json(document)
            left_out += rest.dropped
            if left_out:
                _log.info("not passed to the guest", container=container_id, keys=left_out[:50])
            return message, rest, spec_limits(spec)

        message, rest, limits = await look(translate)  # of the largest that is taken it takes a second
        await self._sizing.fit(container_id, limits)
        storages: list[agent_pb2.Storage] = []
        # Our agent has a pause of its own; another one needs the image's.
        if kind != OWN or not self._settings.direct_stdio:
            with self._trace.phase("rootfs", id=container_id):
                image = None
                if self._settings.hosted:
                    from shim.spec.guest_image import pulled_image

                    image = pulled_image(spec)
                storages = await self._files.add(container_id, rootfs, root_path, volumes, image=image)
        self._own.begin(container_id, own)
        storages += own.storages
        if direct:
            with self._trace.phase("volumes", id=container_id):
                storages += await self._direct.add(container_id, direct)
            await self._manage()
        devices = await self._add_devices(container_id, disks, passed) if disks or passed else []
        if any(storage.driver in _DISK_DRIVERS and "ro" not in storage.options for storage in storages):
            self.writing.add(container_id)
        await self._run_hooks(container_id, bundle, spec)
        return GuestContainer(
            spec=message,
            storages=storages,
            devices=devices,
            sandbox_pidns=wants_sandbox_pidns(spec),
            beyond=rest.beyond,
            words={
                self._files.rootfs(container_id): "its root file system",
                **{volume.guest_path: volume.source for volume in volumes},
                **{volume.mount_point: volume.source for volume in direct.values()},
                **own.words,
            },
        )

    async def _tell_limits(self, name: str, volumes: Sequence[Volume], spec: Mapping[str, Any]) -> None:
        """What of its volumes is not as on a host: docs/limits.md has the whole list."""
        share = next((one for one in self._settings.devices if isinstance(one, ShareFsConfig)), None)
        if share is None or not volumes:
            return
        if own := [volume.destination for volume in volumes if volume.destination not in _USUAL]:
            _log.info(
                "volumes are shared with the VM: locks and events of others do not reach it, and what they"
                " change may be late (docs/limits.md)",
                container=name,
                volumes=own[:50],
                cache=share.cache.value,
            )
        if not spec.get("process", {}).get("user", {}).get("additionalGids"):
            return
        from shim.resources.group_access import told

        if closed := await look(told, volumes, spec, share.daemon):
            _log.warning(
                "no files can be made by a supplemental group: virtiofsd knows one group (docs/workloads.md)",
                container=name,
                volumes=closed,
            )

    async def _manage(self) -> None:
        """From the first direct volume on it can be asked about and resized from outside."""
        if self._management is None:
            from shim.sandbox.management import Management  # not on the usual start path

            self._management = Management(self._direct, self._hypervisor, self._agent)
            await self._management.start(self._settings.state_dir, self._undo)

    async def _add_devices(
        self, container_id: str, disks: Sequence[HostDevice], passed: Wanted | None
    ) -> list[agent_pb2.Device]:
        """Plug the host's devices that the container is to have."""
        devices: list[agent_pb2.Device] = []
        with self._trace.phase("devices", id=container_id):
            if disks:
                from shim.resources.container_devices import ContainerDevices  # not on the usual start path

                plugged = ContainerDevices(self._devices, self._holdings, self._settings.disks)
                devices += await plugged.add(container_id, disks)
            if passed is not None:
                devices += await self._vfio_devices().add(container_id, passed)
        return devices

    async def _find_passed(self, spec: Mapping[str, Any]) -> Wanted | None:
        if not await wants(spec, self._settings.vfio):
            return None
        from shim.resources.vfio_devices import find

        return await look(find, spec, self._settings.vfio)

    def _vfio_devices(self) -> VfioDevices:
        if self._vfio is None:
            from shim.resources.vfio_devices import VfioDevices

            self._vfio = VfioDevices(
                self._settings.vfio, self._devices, self._holdings, self._hypervisor, self._undo
            )
        return self._vfio

    async def _run_hooks(self, container_id: str, bundle: str, spec: Mapping[str, Any]) -> None:
        if not spec.get("hooks"):
            return
        from shim.hooks.hooks import HostHooks

        hooks = HostHooks(
            container_id,
            bundle,
            spec,
            pid=await self._hypervisor.get_vmm_master_tid(),
            undo=self._undo,
            mounts=self._settings.host_mounts,
        )
        self._hooks[container_id] = hooks
        with self._trace.phase("hooks", id=container_id):
            await hooks.before_create()
        await self._rescan()

    async def started(self, container_id: str) -> None:
        """Run the poststart hooks."""
        if container_id in self._hooks:
            await self._hooks[container_id].after_start()

    def plugged(self, container_id: str) -> bool:
        """Whether it may have devices that the guest must let go of."""
        return (
            self._vfio is not None or self._holdings.holds(container_id) or self._files.plugged(container_id)
        )

    async def release(self, container_id: str, *, alive: bool) -> None:
        """Unmount what `prepare` mounted, unplug its devices and let the VM shrink if that is `alive`, and
        answers (else they go with it), run the poststop hooks. Idempotent."""
        if alive:
            await self._sizing.forget(container_id)
            for error in await self._holdings.release(container_id):
                _log.error("not unplugged", container=container_id, error=str(error))
            for error in await self._vfio.release(container_id) if self._vfio else ():
                _log.error("not given back", container=container_id, error=str(error))
        self._own.remove(container_id)
        await self._direct.remove(container_id)
        self.writing.discard(container_id)
        for error in await self._files.remove(container_id, alive=alive):
            _log.error("not released", container=container_id, error=str(error))
        hooks = self._hooks.pop(container_id, None)
        if hooks is not None:
            await hooks.after_delete()

    async def end_management(self) -> None:
        """Nobody can ask about volumes, or resize them, any more. Idempotent."""
        if self._management is not None:
            await self._management.close()

    async def close(self) -> list[Exception]:
        """The VM is gone: give back what `release` was not asked to, going on past errors. Idempotent."""
        errors: list[Exception] = []
        self._own.close()
        try:
            await self._direct.remove()
        except (KataError, OSError) as error:
            errors.append(error)
        return [*errors, *(await self._vfio.close() if self._vfio else [])]
