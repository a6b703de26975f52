"""vCPUs and memory of a running VM under QEMU: more of them, and where it can be, fewer.

What: `Sizer.resize_vcpu` and `resize_memory`, by CPU hot-plug, DIMMs and virtio-mem.
Why events: QEMU answers device_add before the guest has looked. ACPI_DEVICE_OST says that the guest
took a vCPU or a DIMM, or that it keeps one, DEVICE_DELETED that it gave one back,
MEMORY_DEVICE_SIZE_CHANGE how far virtio-mem has come. Nothing is polled but the latter, which QEMU tells at
most once a second.
Invariants:
- What the VM has is QEMU's word each time, never a count of ours (but of what the guest may bring online):
  a failed step leaves no lie behind.
- One resize at a time; asking for what there is does nothing.
- Growing happens or raises. Shrinking is a request: the guest may keep what it uses, which is no error, and
  the answer is what there is then. What it has not answered about in time counts as gone, since it may
  go at any moment; of virtio-mem the request is taken back.
- What the VM was started with stays; DIMMs go whole. Under TCG all vCPUs are there from the start and none
  goes (`Plan.all_vcpus_at_start`): to grow is to let the guest bring more of them online.
- A DIMM's back end goes with it, or at the next resize if the guest was late. No name of one comes twice in
  a VM's life: QEMU 10 and 11 give a memfd of a name that has just gone the old one's descriptor, and close it
  a moment later. All vhost-user daemons then lose their connection with the next DIMM (docs/hosts.md).
- Under TCG back ends stay until the VM ends, and the next DIMM of that size gets one of them: with a new one
  after one that was deleted, programs of the guest die by SIGSEGV (docs/hosts.md). As much as the VM may have
  may lie idle so; a DIMM that would make it more is kept by the guest.
- A guest that gives memory back which it needs kills for it: who shrinks asks it first what it can spare.
Source: docs/system/cpu-hotplug.rst, qapi/{machine,acpi,qdev}.json of QEMU 7.2; ACPI 6.4, _OST (6.3.5).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import structlog

from devices.errors import HypervisorError, UnsupportedByHypervisor
from hypervisors.qemu.abilities import TCG_KEEPS_VCPUS
from hypervisors.qemu.cmdline import PMEM_DRIVER, VIRTIO_MEM, Plan
from hypervisors.qemu.events import let_go, size_is, taken
from hypervisors.qemu.kvm import Accelerator
from hypervisors.qemu.qmp import NOT_FOUND, QmpClient, QmpError, QmpEvent, sensible

__all__ = ["Sizer"]

_PERIPHERAL = "/machine/peripheral/"  # where QEMU keeps what was plugged with an id
_MAX_GROWTH = 8
"""A DIMM has at most so many times the memory that is there: its page table is a 64th of it."""
_STEP = 1024  # MiB; what a larger growth is made of, a multiple of every guest's memory block
_BLOCK = 128 << 20
"""Bytes of a memory block of Linux on x86_64: of a DIMM that begins in the middle of one it takes nothing,
and answers ACPI that all is well."""

_FIRST_LOOK, _LAST_LOOK = 0.005, 0.2  # seconds between two questions for virtio-mem's size
_DIMM = "dimm"  # and a number, the highest that ever was
_BACK_END = "mem-"  # and the DIMM's name

_log = structlog.get_logger("qemu.sizing")


class _Dimm(NamedTuple):
    number: int
    mib: int

    @property
    def name(self) -> str:
        return f"{_DIMM}{self.number}"


@dataclass(slots=True)
class _BackEnd:
    """What a DIMM's memory is. `used`: it was, or may have been, a DIMM's."""

    id: str
    mib: int
    used: bool = False


class _Part(NamedTuple):
    """What takes room for memory."""

    address: int
    size: int  # bytes
    is_dimm: bool


class Sizer:
    """See the module's docstring. `plan` is what QEMU was started with."""

    def __init__(self, plan: Plan, qmp: QmpClient) -> None:
        self._plan = plan
        self._qmp = qmp
        self._deadline = plan.section.hotplug_timeout
        self._lock = asyncio.Lock()
        self._leaving: dict[str, contextlib.ExitStack] = {}  # asked of the guest, its answer still awaited
        self._last_dimm = -1
        self._granted = plan.vcpus  # of those that are there from the start
        self._back_ends: dict[str, _BackEnd] = {}  # by DIMM; noted before they come
        self._keeps = plan.accelerator is Accelerator.TCG
        self._spare: list[_BackEnd] = []  # of DIMMs that have gone

    # --- vCPUs

    def is_granted(self, index: int) -> bool:
        """Whether the guest may use the vCPU of that number, which QEMU has."""
        return not self._plan.all_vcpus_at_start or index < self._granted

    async def resize_vcpu(self, count: int) -> int:
        """See `Hypervisor.resize_vcpu`."""
        plan = self._plan
        if plan.max_vcpus <= plan.vcpus and count != plan.vcpus:
            raise UnsupportedByHypervisor("qemu", f"other than {plan.vcpus} vCPUs as this VM is configured")
        if plan.all_vcpus_at_start:
            return self._grant(count)
        async with self._lock:
            slots = await self._cpu_slots()
            present = self._count(slots)
            if count > present:
                free = [slot for slot in slots if "qom-path" not in slot]
                if count > present + len(free):
                    raise _too_many(count, present + len(free))
                for slot in free[: count - present]:
                    await self._plug_cpu(slot)
            elif count < present:
                if count < plan.vcpus:
                    raise UnsupportedByHypervisor("qemu", f"fewer vCPUs than it started with ({plan.vcpus})")
                plugged = [name for name in map(_name, slots) if name and name not in self._leaving]
                for name in reversed(plugged[count - present :]):
                    if not await self._unplug(name):
                        break
                return self._count(await self._cpu_slots())
        return count

    def _grant(self, count: int) -> int:
        """More of the vCPUs that are offline since the start."""
        if count > self._plan.max_vcpus:
            raise _too_many(count, self._plan.max_vcpus)
        if count < self._granted:
            raise UnsupportedByHypervisor("qemu", f"unplug of a vCPU: {TCG_KEEPS_VCPUS}")
        self._granted = count
        return count

    def _count(self, slots: Iterable[dict[str, Any]]) -> int:
        """vCPUs that the guest can count on."""
        return sum(1 for slot in slots if "qom-path" in slot and _name(slot) not in self._leaving)

    async def _cpu_slots(self) -> list[dict[str, Any]]:
        """All sockets, the lowest first; those in use have a `qom-path`."""
        slots = await self._qmp.execute("query-hotpluggable-cpus")
        with sensible("query-hotpluggable-cpus"):
            return sorted(slots, key=lambda slot: sorted(slot["props"].items()))

    async def _plug_cpu(self, slot: dict[str, Any]) -> None:
        with sensible("query-hotpluggable-cpus"):
            driver, props = slot["type"], slot["props"]
        name = "cpu-" + "-".join(str(props[key]) for key in sorted(props) if key != "node-id")
        await self._plug({"driver": driver, "id": name, **props}, f"the vCPU {name}")

    # --- memory

    async def resize_memory(self, mib: int) -> int:
        """See `Hypervisor.resize_memory`. Shrinking may end above `mib`: DIMMs go whole, and the guest may
        keep what it uses."""
        plan, base = self._plan, self._plan.section.default_memory
        if plan.max_memory <= base and mib != base:
            raise UnsupportedByHypervisor("qemu", f"other than {base} MiB as this VM is configured")
        async with self._lock:
            dimms = [] if plan.virtio_mem is not None else await self._dimms()
            await self._sweep(dimms)
            self._last_dimm = max([self._last_dimm, *(dimm.number for dimm in dimms)])  # by another process
            leaving = [dimm for dimm in dimms if dimm.name in self._leaving]
            present = await self._memory() - sum(dimm.mib for dimm in leaving)
            if mib == present:
                return present
            if mib > plan.max_memory:
                raise HypervisorError(
                    f"{mib} MiB of memory are asked for; this VM can have {plan.max_memory}",
                    phase="sizing",
                    hint="raise default_maxmemory, if the host has more memory",
                    code="RESOURCE_EXHAUSTED",
                )
            if mib < base:
                raise UnsupportedByHypervisor("qemu", f"less memory than it started with ({base} MiB)")
            if plan.virtio_mem is not None:
                return base + await self._request(mib - base, growing=mib > present)
            if mib < present:
                return present - await self._unplug_dimms(
                    [dimm for dimm in dimms if dimm not in leaving], present - mib
                )
            while present < mib:
                step = min(mib - present, max(_STEP, present * _MAX_GROWTH // _STEP * _STEP))
                self._last_dimm += 1
                await self._plug_dimm(_Dimm(self._last_dimm, step))
                present += step
            return present

    async def _memory(self) -> int:
        """MiB that the VM has now."""
        summary = await self._qmp.execute("query-memory-size-summary")
        with sensible("query-memory-size-summary"):
            whole = int(summary["base-memory"] + summary["plugged-memory"])
        return (whole - sum(part.size for part in await self._parts() if not part.is_dimm)) >> 20

    async def _parts(self) -> list[_Part]:
        """Where disks may be memory (nvdimms): all that has a place in the room for it, the lowest first."""
        if self._plan.section.block_device_driver != PMEM_DRIVER:
            return []
        devices = await self._qmp.execute("query-memory-devices")
        with sensible("query-memory-devices"):
            found = [(device["type"] == "dimm", device["data"]) for device in devices]
            return sorted(_Part(int(data["addr"]), int(data["size"]), is_dimm) for is_dimm, data in found)

    async def _place(self, size: int) -> dict[str, int]:
        """Where a DIMM of so many bytes goes: QEMU's own choice, but beside nvdimms the next memory block,
        for QEMU would begin it where the nvdimm ends."""
        parts = await self._parts()
        if all(part.is_dimm for part in parts):
            return {}
        starts = [-(-(part.address + part.size) // _BLOCK) * _BLOCK for part in parts]
        free = (
            start
            for start in sorted(starts)
            if all(start + size <= part.address or part.address + part.size <= start for part in parts)
        )
        return {"addr": next(free)}

    async def _dimms(self) -> list[_Dimm]:
        """Those that are plugged."""
        devices = await self._qmp.execute("query-memory-devices")
        with sensible("query-memory-devices"):
            found = [device["data"] for device in devices if device["type"] == "dimm"]
            return [_Dimm(int(data["id"].removeprefix(_DIMM)), int(data["size"]) >> 20) for data in found]

    async def _sweep(self, dimms: Iterable[_Dimm]) -> None:
        """Remove back ends without a DIMM: it did not come, or the guest gave it back after its time."""
        for name in sorted(self._back_ends.keys() - {dimm.name for dimm in dimms}):
            await self._drop_back_end(name)

    async def _drop_back_end(self, name: str) -> None:
        # Of a DIMM that another process plugged (`adopt`) only the name is known.
        back_end = self._back_ends.get(name) or _BackEnd(f"{_BACK_END}{name}", 0, used=True)
        if self._keeps and back_end.used:
            self._spare.append(back_end)
        else:
            try:
                await self._qmp.execute("object-del", {"id": back_end.id})
            except QmpError as error:
                if "not found" not in error.cause:
                    raise error.with_context(phase="sizing") from None
        self._back_ends.pop(name, None)

    async def _plug_dimm(self, dimm: _Dimm) -> None:
        name = dimm.name
        spare = next((back_end for back_end in self._spare if back_end.mib == dimm.mib), None)
        back_end = spare or _BackEnd(f"{_BACK_END}{name}", dimm.mib)
        self._back_ends[name] = back_end
        try:
            if spare is not None:
                self._spare.remove(spare)
            else:
                size = dimm.mib << 20
                memfd = {"qom-type": "memory-backend-memfd", "id": back_end.id, "size": size, "share": True}
                await self._qmp.execute("object-add", memfd)
            at = await self._place(dimm.mib << 20)
            back_end.used = True
            device = {"driver": "pc-dimm", "id": name, "memdev": back_end.id, **at}
            await self._plug(device, f"{dimm.mib} MiB of memory ({name})")
        except QmpError as error:  # QEMU refused it; a guest that is slow has it all the same
            back_end.used = spare is not None
            await self._drop_back_end(name)
            hint = "plug more at once, or set enable_virtio_mem = true: it needs one slot"
            raise error.with_context(phase="sizing", hint=hint) from None

    async def _unplug_dimms(self, dimms: Iterable[_Dimm], surplus: int) -> int:
        """As much of `surplus` MiB as whole DIMMs make: the largest that fits, of equals the last plugged.
        How much went, or may go at any moment."""
        gone = 0
        for dimm in sorted(dimms, key=lambda dimm: (dimm.mib, dimm.number), reverse=True):
            if gone + dimm.mib > surplus:
                continue
            if self._keeps and sum(spare.mib for spare in self._spare) + dimm.mib > self._plan.max_memory:
                _log.info("the guest keeps memory: too much lies idle", device=dimm.name)
                continue
            went = await self._unplug(dimm.name)
            if went or dimm.name in self._leaving:
                gone += dimm.mib
            if not went:
                break  # the guest is at it still, or has shown that it needs what it has
            await self._drop_back_end(dimm.name)
        return gone

    async def _request(self, mib: int, *, growing: bool) -> int:
        """Tell virtio-mem how much there shall be, and wait until it is so. How much there is (MiB): more
        than that, if the guest keeps it."""
        wanted = mib << 20
        with self._qmp.expect(size_is(VIRTIO_MEM, wanted)) as reached:
            await self._virtio_mem("qom-set", "requested-size", value=wanted)
            try:
                async with asyncio.timeout(self._deadline):
                    await self._until_size(wanted, reached)
                return mib
            except TimeoutError:
                if growing:
                    raise self._late(f"take {mib} MiB of memory by virtio-mem") from None
        said = await self._virtio_mem("qom-get", "size")
        with sensible("qom-get"):
            size = int(said)
        _log.info("the guest keeps memory that it was asked to give back", kept=size - wanted)
        await self._virtio_mem("qom-set", "requested-size", value=size)
        return size >> 20

    async def _until_size(self, wanted: int, reached: asyncio.Future[QmpEvent]) -> None:
        """QEMU tells sizes at most once a second, the last one late: so it is asked meanwhile, too."""
        pause = _FIRST_LOOK
        while True:
            done, _ = await asyncio.wait({reached}, timeout=pause)
            if done:
                await reached
                return
            if await self._virtio_mem("qom-get", "size") == wanted:
                return
            pause = min(2 * pause, _LAST_LOOK)

    async def _virtio_mem(self, command: str, name: str, **more: int) -> Any:
        """Read or write one of its properties."""
        return await self._qmp.execute(
            command, {"path": f"{_PERIPHERAL}{VIRTIO_MEM}", "property": name, **more}
        )

    # --- both

    async def _plug(self, device: dict[str, Any], what: str) -> None:
        self._answered(device["id"])  # one of that name has left
        with self._qmp.expect(taken(device["id"])) as answer:
            await self._qmp.execute("device_add", device)
            event = await self._await(answer, f"take {what}")
        status = event["data"]["info"].get("status")
        if status != 0:
            raise HypervisorError(
                f"the guest refused {what} with ACPI status {status}", phase="sizing", hint="see its console"
            )

    async def _unplug(self, name: str) -> bool:
        """Ask the guest for a vCPU or a DIMM; whether it is gone. Without an answer it is leaving."""
        waiting = contextlib.ExitStack()
        answer = waiting.enter_context(self._qmp.expect(let_go(name)))
        self._answered(name)
        self._leaving[name] = waiting
        answer.add_done_callback(lambda _: self._answered(name, waiting))
        try:
            await self._qmp.execute("device_del", {"id": name})
        except QmpError as error:
            self._answered(name)
            if error.kind == NOT_FOUND:
                return True  # an earlier request was met late
            raise error.with_context(phase="sizing") from None
        done, _ = await asyncio.wait({answer}, timeout=self._deadline)
        if not done:
            _log.warning("the guest has not given back what it was asked for", device=name)
            return False
        event = await answer
        if event["event"] != "DEVICE_DELETED":
            _log.info("the guest keeps what it was asked to give back", device=name, answer=event["data"])
            return False
        return True

    def _answered(self, name: str, waiting: contextlib.ExitStack | None = None) -> None:
        """It is not leaving any more: it has gone, or stays. `waiting`: only if that is the request still."""
        if name in self._leaving and waiting in (None, self._leaving[name]):
            self._leaving.pop(name).close()

    async def _await(self, event: asyncio.Future[QmpEvent], what: str) -> QmpEvent:
        try:
            async with asyncio.timeout(self._deadline):
                return await event
        except TimeoutError:
            raise self._late(what) from None

    def _late(self, what: str) -> HypervisorError:
        return HypervisorError(
            f"the guest did not {what} within {self._deadline:g} s",
            phase="sizing",
            hint="raise hotplug_timeout, or see whether the guest's kernel has ACPI hot-plug",
            code="DEADLINE_EXCEEDED",
        )


def _name(slot: dict[str, Any]) -> str:
    """The id of the vCPU that was plugged into it; "" without one."""
    path = str(slot.get("qom-path", ""))
    return path.removeprefix(_PERIPHERAL) if path.startswith(_PERIPHERAL) else ""


def _too_many(count: int, most: int) -> HypervisorError:
    return HypervisorError(
        f"{count} vCPUs are asked for; this VM can have {most}",
        phase="sizing",
        hint="raise default_maxvcpus, if the host has more CPUs",
        code="RESOURCE_EXHAUSTED",
    )
