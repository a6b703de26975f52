"""Devices that come and go while the VM runs under QEMU.

What: `Plugger.add` and `remove`: back ends (blockdev-add, netdev_add, ...), front end (device_add behind a
port or bridge), and both away again.
Why one transaction: QEMU has several objects for one device (slot, node, device), each of which can fail to
come or to go; whoever plugs again must find neither a half nor a leak.
Invariants:
- What `add` did not finish it has undone, also when it was cancelled; the slot and the id are free then.
- A device is plugged until DEVICE_DELETED: only then its back ends go, and then its slot is free. A guest
  that does not let go keeps it, and `remove` can be tried again.
- `remove` of what is half gone, from an attempt that failed, goes on where that one ended.
Source: qapi/{block-core,net,qdev}.json of QEMU 7.2.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from devices.addresses import FlatSpace, PciTopology
from devices.config import BlockConfig, VfioConfig
from devices.errors import BugError, CallerError, HypervisorError, KataError
from devices.kinds import Kind
from hypervisors.qemu.events import deleted
from hypervisors.qemu.qmp import NOT_FOUND, QmpClient, QmpError, sensible
from hypervisors.qemu.recipes import SCSI, BackEnd, Placed, Recipe, recipe, reopened, scsi_controller

__all__ = ["LUNS", "Plugger", "scsi_seat"]

LUNS = range(256)
"""Of the SCSI controller: its one target has as many, and the guest finds them all."""

# By the option that does the same on the command line: the commands that make it and remove it, and the key
# of its name.
_COMMANDS = {
    "blockdev": ("blockdev-add", "blockdev-del", "node-name"),
    "chardev": ("chardev-add", "chardev-remove", "id"),
    "netdev": ("netdev_add", "netdev_del", "id"),
    "object": ("object-add", "object-del", "id"),
}

_IN_USE = "is in use"
_MOMENT = 0.005  # seconds
_PULSE = 2.0  # seconds in which a QEMU that is not held up answers
_ABSENT = ("not found", "Failed to find node")  # and its words, where it has none

_log = structlog.get_logger("qemu.hotplug")


@dataclass(frozen=True, slots=True)
class _Seat:
    """Where a device sits: what QEMU is told of it, and the guest's path, "" if only QEMU knows it."""

    properties: Mapping[str, str | int]
    guest_path: str


@dataclass(slots=True)
class _Plugged:
    """`back_end`: the commands that remove what the device stands on, in the order of its making. `whole`:
    it came, and nobody has tried to remove it. `placed`: None for the SCSI controller."""

    placed: Placed | None = None
    guest_path: str = ""
    back_end: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    whole: bool = False
    device_gone: bool = False


class Plugger:
    """Everything hot-plugged into one VM. `deadline`: seconds for the guest to let go of a device. `luns`:
    of the SCSI controller, which is there already if `scsi`, else comes with the first disk behind it."""

    def __init__(
        self,
        qmp: QmpClient,
        topology: PciTopology,
        deadline: float,
        *,
        luns: FlatSpace | None = None,
        scsi: bool = False,
    ) -> None:
        self._qmp = qmp
        self._topology = topology
        self._deadline = deadline
        self._luns = luns or FlatSpace("SCSI addresses", LUNS)
        self._plugged: dict[str, _Plugged] = {}
        self._controller = asyncio.Lock()
        if scsi:
            self._plugged[SCSI] = _Plugged(whole=True)

    def __contains__(self, device_id: str) -> bool:
        return device_id in self._plugged

    def placed(self, device_id: str) -> Placed | None:
        """What is plugged under this id, as it was asked for or last changed."""
        plugged = self._plugged.get(device_id)
        return plugged.placed if plugged is not None else None

    def changed(self, placed: Placed) -> None:
        """A plugged device is like this now."""
        self._plugged[placed.device.id].placed = placed

    def has(self, device_id: str) -> bool:
        """Whether it is plugged, whole, and nobody has tried to remove it."""
        return device_id in self._plugged and self._plugged[device_id].whole

    def present(self, device_id: str) -> bool:
        """Whether the guest has it, or may have it."""
        return device_id in self._plugged and not self._plugged[device_id].device_gone

    async def add(self, placed: Placed) -> str:
        """Plug it, wherever there is room; its guest path. QEMU has realised it then, the guest's driver may
        still be at it.

        Raises HypervisorError when QEMU refuses or no slot is free; nothing is left then.
        """
        device = placed.device
        if isinstance(device, BlockConfig) and device.kind is Kind.SCSI:
            await self._have_controller(io_thread=device.options.io_thread)
        return await self._plug(device.id, device.kind, lambda at: recipe(replace(placed, at=at)), placed)

    async def _have_controller(self, *, io_thread: bool) -> None:
        async with self._controller:
            there = self._plugged.get(SCSI)
            if there is None or not there.whole:
                await self._plug(SCSI, None, lambda at: Recipe(scsi_controller(at, io_thread=io_thread)))

    async def _plug(
        self,
        name: str,
        kind: Kind | None,
        make: Callable[[Mapping[str, str | int]], Recipe],
        placed: Placed | None = None,
    ) -> str:
        if (there := self._plugged.get(name)) is not None:
            if there.whole:
                raise BugError(f"there is a device {name} already")
            await self.remove(name)  # what an earlier attempt could not undo
        vfio = placed.device if placed is not None and isinstance(placed.device, VfioConfig) else None
        seat = self._seat(name, kind, behind=vfio.port if vfio else "")
        plugged = self._plugged[name] = _Plugged(placed, seat.guest_path)
        try:
            made = make(seat.properties)
            for back_end in made.back_ends:
                await self._make(back_end, plugged)
            front = dict(made.front)
            # Legacy virtio needs I/O ports, of which a bridge has few. The newest have no legacy.
            driver = front["driver"]
            if driver.startswith(("virtio-", "vhost-")) and not driver.startswith("vhost-user-fs"):
                front["disable-legacy"] = "on"
            # All of the guest's memory is pinned for a device of VFIO before QEMU answers.
            await self._qmp.execute("device_add", front, timeout=max(5.0, self._deadline if vfio else 0.0))
            if kind is Kind.PMEM:
                plugged.guest_path = f"/dev/pmem{await self._dimm_slot(name)}"
            plugged.whole = True
        except BaseException as error:
            try:
                await self._let_go(plugged, error)
                await self.remove(name)
            except KataError as error:
                _log.error("what was plugged half did not go", device=name, error=str(error))
            raise
        return plugged.guest_path

    def _seat(self, name: str, kind: Kind | None, *, behind: str) -> _Seat:
        match kind:
            case Kind.SCSI:
                return _Seat(*scsi_seat(self._luns.allocate(name)))
            case Kind.PMEM:  # QEMU takes the first free slot for memory
                return _Seat({}, "")
        place = self._topology.allocate(name, hotplug=True, behind=behind)
        return _Seat(place.properties, place.guest_path)

    async def _dimm_slot(self, name: str) -> int:
        devices = await self._qmp.execute("query-memory-devices")
        with sensible("query-memory-devices"):
            for found in devices:
                if found["data"].get("id") == name:
                    return int(found["data"]["slot"])
        raise HypervisorError(f"QEMU does not list {name} among the VM's memory", phase="devices")

    async def remove(self, device_id: str) -> None:
        """Unplug it. Raises HypervisorError when the guest does not let go in time: it stays plugged then."""
        plugged = self._plugged.get(device_id)
        if plugged is None:
            raise CallerError(f"no device {device_id} is plugged", code="NOT_FOUND")
        plugged.whole = False
        if not plugged.device_gone:
            try:
                await self._unplug(device_id)
            except HypervisorError as error:
                if not await self._let_go(plugged, error):
                    raise
                await self._unplug(device_id)
            plugged.device_gone = True
        while plugged.back_end:
            await self._forget(*plugged.back_end[-1])
            plugged.back_end.pop()
        del self._plugged[device_id]
        self._topology.release(device_id)
        self._luns.release(device_id)

    async def _unplug(self, device_id: str) -> None:
        with self._qmp.expect(deleted(device_id)) as gone:
            try:
                await self._qmp.execute("device_del", {"id": device_id})
            except QmpError as error:
                if error.kind == NOT_FOUND:
                    return  # the guest let go of it after an earlier attempt gave up
                if "process of unplug" not in error.cause:
                    raise
            try:
                async with asyncio.timeout(self._deadline):
                    await gone
            except TimeoutError:
                raise HypervisorError(
                    f"the guest did not let go of {device_id} within {self._deadline:g} s",
                    phase="devices",
                    hint="see whether something in the guest still uses it; raise hotplug_timeout",
                    code="DEADLINE_EXCEEDED",
                ) from None

    async def _let_go(self, plugged: _Plugged, error: BaseException) -> bool:
        """Whether QEMU was held up by what serves the device, when this error came, and is no more."""
        placed = plugged.placed
        if placed is None or placed.give_up is None or isinstance(error, QmpError):
            return False
        try:
            await self._qmp.execute("query-status", timeout=_PULSE)
        except HypervisorError as silence:
            if silence.code != "DEADLINE_EXCEEDED":
                return False
        else:
            return False
        _log.error("QEMU is held up by what serves a device: it is given up", device=placed.device.id)
        placed.give_up()
        return True

    async def _make(self, back_end: BackEnd, plugged: _Plugged) -> None:
        """One back end, its descriptors first, each noted before it is there."""
        if back_end.option == "add-fd":
            await self._give(back_end.fds["fd"], back_end.properties["set"], plugged)
            return
        add, delete, named = _COMMANDS[back_end.option]
        names: dict[str, str] = {}
        for key, fds in back_end.fds.items():
            if back_end.reopens:
                names[key] = reopened(await self._give(fds, back_end.reopens, plugged))
                continue
            labels = [f"{key}-{back_end.name}-{number}" for number in range(len(fds))]
            for label, fd in zip(labels, fds, strict=True):
                plugged.back_end.append(("closefd", {"fdname": label}))
                await self._qmp.execute("getfd", {"fdname": label}, fds=[fd])
            names[key] = ":".join(labels)
        plugged.back_end.append((delete, {named: back_end.name}))
        arguments = back_end.arguments(names)
        if back_end.option == "chardev":
            if "path" in arguments:
                address = {"type": "unix", "data": {"path": arguments.pop("path")}}
            else:
                address = {"type": "fd", "data": {"str": arguments.pop("fd")}}
            arguments["backend"] = {"type": "socket", "data": {"addr": address, "server": False}}
        await self._qmp.execute(add, arguments)

    async def _give(self, fds: Sequence[int], fdset: int, plugged: _Plugged) -> int:
        """Give QEMU a file's descriptor, as the only one of a set; its number there."""
        plugged.back_end.append(("remove-fd", {"fdset-id": fdset}))
        answer = await self._qmp.execute("add-fd", {"fdset-id": fdset}, fds=list(fds))
        return int(answer["fd"])

    async def _forget(self, command: str, arguments: dict[str, Any]) -> None:
        """Remove it; what never came is fine (a descriptor goes with its netdev, too).

        QEMU frees a device a moment after DEVICE_DELETED, and its node is in use until then.
        """
        end = asyncio.get_running_loop().time() + self._deadline
        while True:
            try:
                await self._qmp.execute(command, arguments)
            except QmpError as error:
                if error.kind == NOT_FOUND or any(text in error.cause for text in _ABSENT):
                    return
                if _IN_USE not in error.cause or asyncio.get_running_loop().time() > end:
                    raise
                await asyncio.sleep(_MOMENT)  # nothing announces it
            else:
                return


def scsi_seat(lun: int) -> tuple[dict[str, str | int], str]:
    """What QEMU is told of a disk with this number behind the controller, and the agent's address of it."""
    return {"bus": f"{SCSI}.0", "scsi-id": 0, "lun": lun}, f"0:{lun}"
