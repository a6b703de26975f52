"""vCPUs and memory of a running VM under QEMU: more of them, and where it can be, fewer.

What: `Sizer.resize_vcpu` and `resize_memory`, by CPU hot-plug, DIMMs and virtio-mem.
Why events: QEMU answers device_add before the guest has looked. ACPI_DEVICE_OST says that the guest
took a vCPU or a DIMM, DEVICE_DELETED that it gave one back, MEMORY_DEVICE_SIZE_CHANGE how far
virtio-mem has come; nothing is polled.
Invariants:
- What the VM has is QEMU's word each time, never a count of ours: a failed step leaves no lie behind.
- One resize at a time; asking for what there is does nothing.
- vCPUs that the VM was started with stay, and so do DIMMs; under TCG no vCPU is taken away, because
  QEMU 7.2 then corrupts its heap (facts/guest-vm.md part 4).
Source: docs/system/cpu-hotplug.rst, qapi/{machine,acpi,qdev}.json of QEMU 7.2.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import structlog

from devices.errors import HypervisorError, UnsupportedByHypervisor
from hypervisors.qemu.cmdline import VIRTIO_MEM, Plan
from hypervisors.qemu.events import deleted, size_changed, taken
from hypervisors.qemu.kvm import Accelerator
from hypervisors.qemu.qmp import QmpClient, QmpError, QmpEvent

__all__ = ["Sizer"]

_PERIPHERAL = "/machine/peripheral/"  # where QEMU keeps what was plugged with an id
_MAX_GROWTH = 8
"""A DIMM has at most so many times the memory that is there: its page table is a 64th of it."""
_STEP = 1024  # MiB; what a larger growth is made of, a multiple of every guest's memory block

_log = structlog.get_logger("qemu.sizing")


class Sizer:
    """See the module's docstring. `plan` is what QEMU was started with."""

    def __init__(self, plan: Plan, qmp: QmpClient) -> None:
        self._plan = plan
        self._qmp = qmp
        self._deadline = plan.section.hotplug_timeout
        self._lock = asyncio.Lock()

    # --- vCPUs

    async def resize_vcpu(self, count: int) -> int:
        """See `Hypervisor.resize_vcpu`."""
        plan = self._plan
        if plan.max_vcpus <= plan.vcpus and count != plan.vcpus:
            raise UnsupportedByHypervisor("qemu", f"other than {plan.vcpus} vCPUs as this VM is configured")
        async with self._lock:
            slots = await self._cpu_slots()
            present = sum(1 for slot in slots if "qom-path" in slot)
            if count > present:
                if count > len(slots):
                    raise HypervisorError(
                        f"{count} vCPUs are asked for; this VM can have {len(slots)}",
                        phase="sizing",
                        hint="raise default_maxvcpus, if the host has more CPUs",
                        code="RESOURCE_EXHAUSTED",
                    )
                free = [slot for slot in slots if "qom-path" not in slot]
                for slot in free[: count - present]:
                    await self._plug_cpu(slot)
            elif count < present:
                if plan.accelerator is Accelerator.TCG:
                    raise UnsupportedByHypervisor("qemu", "taking vCPUs away under TCG")
                if count < plan.vcpus:
                    raise UnsupportedByHypervisor("qemu", f"fewer vCPUs than it started with ({plan.vcpus})")
                plugged = [slot for slot in slots if slot.get("qom-path", "").startswith(_PERIPHERAL)]
                for slot in plugged[count - present :]:
                    await self._unplug_cpu(slot["qom-path"].removeprefix(_PERIPHERAL))
        return count

    async def _cpu_slots(self) -> list[dict[str, Any]]:
        """All sockets, the lowest first; those in use have a `qom-path`."""
        slots = await self._qmp.execute("query-hotpluggable-cpus")
        try:
            return sorted(slots, key=lambda slot: sorted(slot["props"].items()))
        except (KeyError, TypeError, AttributeError) as error:
            raise _nonsense("query-hotpluggable-cpus", error) from error

    async def _plug_cpu(self, slot: dict[str, Any]) -> None:
        props = slot["props"]
        name = "cpu-" + "-".join(str(props[key]) for key in sorted(props) if key != "node-id")
        await self._plug({"driver": slot["type"], "id": name, **props}, f"the vCPU {name}")

    async def _unplug_cpu(self, name: str) -> None:
        with self._qmp.expect(deleted(name)) as gone:
            await self._qmp.execute("device_del", {"id": name})
            await self._await(gone, f"give back the vCPU {name}")

    # --- memory

    async def resize_memory(self, mib: int) -> int:
        """See `Hypervisor.resize_memory`. A guest may keep what it uses: shrinking ends above `mib` then."""
        plan, base = self._plan, self._plan.section.default_memory
        if plan.max_memory <= base and mib != base:
            raise UnsupportedByHypervisor("qemu", f"other than {base} MiB as this VM is configured")
        async with self._lock:
            present = await self._memory()
            if mib == present:
                return present
            if mib > plan.max_memory:
                raise HypervisorError(
                    f"{mib} MiB of memory are asked for; this VM can have {plan.max_memory}",
                    phase="sizing",
                    hint="raise default_maxmemory, if the host has more memory",
                    code="RESOURCE_EXHAUSTED",
                )
            if plan.virtio_mem is not None:
                if mib < base:
                    raise UnsupportedByHypervisor("qemu", f"less memory than it started with ({base} MiB)")
                await self._request(mib - base, growing=mib > present)
                return await self._memory()
            if mib < present:
                raise UnsupportedByHypervisor("qemu", "taking memory away without virtio-mem")
            while present < mib:
                step = min(mib - present, max(_STEP, present * _MAX_GROWTH // _STEP * _STEP))
                await self._plug_dimm(step)
                present += step
            return present

    async def _memory(self) -> int:
        """MiB that the VM has now."""
        summary = await self._qmp.execute("query-memory-size-summary")
        try:
            return int(summary["base-memory"] + summary["plugged-memory"]) >> 20
        except (KeyError, TypeError) as error:
            raise _nonsense("query-memory-size-summary", error) from error

    async def _plug_dimm(self, mib: int) -> None:
        devices = await self._qmp.execute("query-memory-devices")
        try:
            taken = {device["data"].get("id") for device in devices}
        except (KeyError, TypeError, AttributeError) as error:
            raise _nonsense("query-memory-devices", error) from error
        name = next(name for name in (f"dimm{n}" for n in itertools.count()) if name not in taken)
        backend = {"qom-type": "memory-backend-memfd", "id": f"mem-{name}", "size": mib << 20, "share": True}
        await self._qmp.execute("object-add", backend)
        try:
            await self._plug(
                {"driver": "pc-dimm", "id": name, "memdev": f"mem-{name}"}, f"{mib} MiB of memory ({name})"
            )
        except QmpError as error:  # QEMU refused it; a guest that is slow has it all the same
            await self._qmp.execute("object-del", {"id": f"mem-{name}"})
            hint = "plug more at once, or set enable_virtio_mem = true: it needs one slot"
            raise error.with_context(phase="sizing", hint=hint) from None

    async def _request(self, mib: int, *, growing: bool) -> None:
        """Tell virtio-mem how much there shall be, and wait until it is so; shrinking may end early."""
        path, wanted = f"{_PERIPHERAL}{VIRTIO_MEM}", mib << 20
        progress = size_changed(VIRTIO_MEM)
        try:
            async with asyncio.timeout(self._deadline):
                while True:
                    with self._qmp.expect(progress) as changed:
                        await self._set_requested(path, wanted)
                        if await self._qmp.execute("qom-get", {"path": path, "property": "size"}) == wanted:
                            return
                        await changed
        except TimeoutError:
            if growing:
                raise self._late(f"take {mib} MiB of memory by virtio-mem") from None
            _log.info("the guest keeps memory that it was asked to give back", wanted=mib)

    async def _set_requested(self, path: str, size: int) -> None:
        request = {"path": path, "property": "requested-size"}
        if await self._qmp.execute("qom-get", request) != size:
            await self._qmp.execute("qom-set", {**request, "value": size})

    # --- both

    async def _plug(self, device: dict[str, Any], what: str) -> None:
        with self._qmp.expect(taken(device["id"])) as answer:
            await self._qmp.execute("device_add", device)
            event = await self._await(answer, f"take {what}")
        status = event["data"]["info"].get("status")
        if status != 0:
            raise HypervisorError(
                f"the guest refused {what} with ACPI status {status}", phase="sizing", hint="see its console"
            )

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


def _nonsense(command: str, error: Exception) -> HypervisorError:
    return HypervisorError(f"QEMU's answer to {command} makes no sense: {error!r}")
