"""Devices of VFIO that a container was given: found, bound, plugged, and told to the agent.

What: `find` reads them from the container's spec: character devices below /dev/vfio, and, if the
administrator lists them, the devices of CDI that annotations name. `rewrite` changes the guest's spec;
`VfioDevices` plugs whole groups and gives their drivers back.
Why by number: a node's path in the spec is the container's choice ("--device /dev/null:/dev/vfio/7"); its
number is what somebody was allowed to give.
Invariants:
- Nothing is passed on unless cold_plug_vfio or hot_plug_vfio says where, nothing is taken from a driver of
  the host unless vfio_bind says so, and nothing that the host uses is (`devices.pci_driver`).
- `find` changes nothing: what cannot be had is refused before anything is done.
- A driver comes back when the last container that uses its group is gone and QEMU has let go of it.
Source: kata.md 1.11, 3.4.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import structlog

from devices.cdi import ANNOTATION, DIRECTORIES, annotated, find_device, guest_kind
from devices.config import VfioConfig
from devices.errors import CallerError, KataError
from devices.holdings import Holdings
from devices.manager import DeviceManager
from devices.pci_driver import check_unused, give_to_vfio
from devices.undo import Entry, UndoLog
from devices.vfio import CONTROL_NODES, IommuGroup, find_group, is_cdev, is_vfio_node
from hypervisors.base import Hypervisor
from proto import agent_pb2
from shim.resources.vfio_settings import VfioSettings
from shim.spec.guest_devices import vfio_nodes

__all__ = ["Passed", "VfioDevices", "Wanted", "find", "rewrite"]

_PHASE = "devices"

_log = structlog.get_logger("vfio")


@dataclass(frozen=True, slots=True)
class Passed:
    """One group, and where the container has its node. `iommufd`: it was given by a function's own node."""

    path: str
    group: IommuGroup
    iommufd: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """`env`: of CDI. `left_out`: what is asked for and not done."""

    groups: tuple[Passed, ...] = ()
    env: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def find(
    spec: Mapping[str, Any],
    settings: VfioSettings,
    *,
    sysfs: str = "/sys",
    directories: Sequence[str] = DIRECTORIES,
) -> Wanted:
    """What a container is to have, after `shim.spec.guest_devices.check_devices`. Blocks.

    Raises CallerError, HostError for what cannot be had, naming it.
    """
    env: list[str] = []
    left_out: list[str] = []
    found = vfio_nodes(spec, sysfs)
    for name in annotated(spec.get("annotations") or {}) if settings.cdi else []:
        if not any(fnmatchcase(name, pattern) for pattern in settings.cdi):
            left_out.append(f"CDI device {name} (valid_cdi_devices does not list it)")
            continue
        device = find_device(name, directories)
        left_out += device.left_out
        env += device.env
        for node in device.nodes:
            if is_vfio_node(node):
                found.append((node, node))
            elif node not in CONTROL_NODES:
                left_out.append(f"CDI device {name}: {node} (no device of VFIO)")
    if found and settings.cold == settings.hot == "no-port":
        raise CallerError(
            f"{found[0][0]} is a device of VFIO, and these are not passed on here",
            phase=_PHASE,
            hint='set hot_plug_vfio = "root-port" and pcie_root_port, or cold_plug_vfio = "root-port"',
        )
    groups: dict[int, Passed] = {}
    for path, host in found:
        group = find_group(host, sysfs)
        if group.number not in groups:
            _check(group, settings, sysfs)
            groups[group.number] = Passed(path, group, is_cdev(host))
    return Wanted(tuple(groups.values()), tuple(env), tuple(left_out))


def _check(group: IommuGroup, settings: VfioSettings, sysfs: str) -> None:
    """Raise KataError unless the group is with vfio-pci, or may be brought there."""
    if not settings.bind or any(one.is_bridge for one in group.unbound):
        group.check_bound()
    for function in group.unbound:
        check_unused(function, sysfs)


def rewrite(document: MutableMapping[str, Any], wanted: Wanted, settings: VfioSettings) -> None:
    """Change the guest's spec. In guest-kernel mode it has no node of VFIO. In vfio mode it has one for each
    group, whose number the agent knows; for a stock agent also the names by which a CDI specification in the
    guest may know the devices."""
    linux = document.setdefault("linux", {})
    nodes = [one for one in linux.get("devices") or [] if one["path"] not in CONTROL_NODES]
    paths = {passed.path for passed in wanted.groups}
    nodes = [one for one in nodes if one["path"] not in paths]
    annotations = document.setdefault("annotations", {})
    for key in [key for key in annotations if key.startswith(ANNOTATION)]:
        del annotations[key]  # of the host's specifications: they mean nothing in the guest, or harm
    if settings.mode == "vfio":
        nodes += [{"path": passed.path, "type": "c", "major": 0, "minor": 0} for passed in wanted.groups]
    if not settings.own_agent:
        annotations.update(_guest_names(wanted))
    linux["devices"] = nodes
    names = {word.partition("=")[0] for word in wanted.env}
    process = document.setdefault("process", {})
    kept = [word for word in process.get("env") or [] if word.partition("=")[0] not in names]
    if wanted.env:
        process["env"] = [*kept, *wanted.env]


def _guest_names(wanted: Wanted) -> dict[str, str]:
    """Kata's annotations: `cdi.k8s.io/vfio<group>` = `<kind>=<index of its kind>`."""
    counts: dict[str, int] = {}
    names = {}
    for passed in wanted.groups:
        for function in passed.group.functions:
            kind = guest_kind(function.vendor, function.class_code)
            if kind:
                names[f"{ANNOTATION}vfio{passed.group.number}"] = f"{kind}={counts.get(kind, 0)}"
                counts[kind] = counts.get(kind, 0) + 1
    return names


@dataclass(slots=True)
class _Group:
    """One that is here: who uses it, and what gives its functions back. `stays`: since before the start."""

    configs: list[VfioConfig]
    users: set[str] = field(default_factory=set)
    taken: list[Entry] = field(default_factory=list)
    stays: bool = False


class VfioDevices:
    """Those of one sandbox."""

    def __init__(
        self,
        settings: VfioSettings,
        devices: DeviceManager,
        holdings: Holdings,
        hypervisor: Hypervisor,
        undo: UndoLog,
    ) -> None:
        self._settings = settings
        self._devices = devices
        self._holdings = holdings
        self._hypervisor = hypervisor
        self._undo = undo
        self._groups: dict[int, _Group] = {}
        self._lock = asyncio.Lock()

    async def add_cold(self, wanted: Wanted) -> None:
        """Before the start: these are part of the VM. Raises KataError; `close` undoes what was done."""
        async with self._lock:
            for passed in wanted.groups:
                here = await self._take(passed, self._settings.cold)
                here.stays = True
                for config in here.configs:
                    await self._devices.try_add_device(config, self._hypervisor)

    async def add(self, container_id: str, wanted: Wanted) -> list[agent_pb2.Device]:
        """Plug them, unless they are there; what the agent is told. Raises KataError; `release` undoes what
        was done, after the container's holdings are released."""
        told = []
        async with self._lock:
            for passed in wanted.groups:
                number = passed.group.number
                here = self._groups.get(number) or await self._take(passed, self._settings.hot)
                here.users.add(container_id)
                options = []
                for config in here.configs:
                    name = await self._holdings.take(container_id, config)
                    place = (await self._devices.generate_agent_device(name)).id
                    options.append(f"{config.address}={place}")
                kind = "vfio-pci" if self._settings.mode == "vfio" else "vfio-pci-gk"
                told.append(
                    agent_pb2.Device(id=str(number), type=kind, container_path=passed.path, options=options)
                )
        return told

    async def _take(self, passed: Passed, port: str) -> _Group:
        """Bring the whole group to vfio-pci."""
        group = passed.group
        configs = [
            VfioConfig(
                id=f"vfio-{function.address.replace(':', '-').replace('.', '-')}",
                address=function.address,
                port=port if port != "no-port" else "root-port",  # refused by the hypervisor, in its words
                iommufd=passed.iommufd,
            )
            for function in group.functions
        ]
        here = self._groups[group.number] = _Group(configs)
        for function in group.unbound if self._settings.bind else ():
            here.taken.append(await give_to_vfio(function, self._undo))
            _log.info("taken from the host", device=str(function))
        return here

    async def release(self, container_id: str) -> list[Exception]:
        """Give the drivers of what nobody uses any more back. Idempotent."""
        errors: list[Exception] = []
        async with self._lock:
            for number, here in list(self._groups.items()):
                here.users.discard(container_id)
                if here.users or here.stays or await self._is_plugged(here):
                    continue  # what the guest does not let go of goes with the VM
                del self._groups[number]
                errors += await self._give_back(here)
        return errors

    async def close(self) -> list[Exception]:
        """After the VM's end: give everything back. Idempotent."""
        errors: list[Exception] = []
        async with self._lock:
            while self._groups:
                errors += await self._give_back(self._groups.popitem()[1])
        return errors

    async def _is_plugged(self, here: _Group) -> bool:
        for config in here.configs:
            try:
                await self._devices.generate_agent_device(config.id)
            except CallerError:
                continue
            return True
        return False

    async def _give_back(self, here: _Group) -> list[Exception]:
        errors: list[Exception] = []
        while here.taken:
            try:
                await self._undo.release(here.taken.pop())
            except (KataError, OSError) as error:
                errors.append(error)
        return errors
