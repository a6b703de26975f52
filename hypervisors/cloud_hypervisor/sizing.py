"""vCPUs and memory of a running VM under Cloud Hypervisor.

What: `Sizer.resize_vcpu` and `resize_memory`, by vm.resize, which answers before the guest has looked.
Why polled: nothing tells of it: a vCPU is there as long as its thread, virtio-mem's size is in vm.info.
Invariants: one resize at a time. Growing happens or raises; shrinking is a request, whose answer is what
there is then, and of virtio-mem what the guest keeps is asked for again. Memory by ACPI is never asked to
shrink: Cloud Hypervisor says yes, does nothing, and has false figures from then on.
Source: Cloud Hypervisor 53.0, as seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from devices.errors import HypervisorError, UnsupportedByHypervisor
from devices.kinds import Kind, Op
from hypervisors.base import VcpuThreadIds
from hypervisors.cloud_hypervisor.abilities import MEMORY_UNIT, abilities, max_memory
from hypervisors.cloud_hypervisor.config import ClhConfig

__all__ = ["Sizer"]

_FIRST_LOOK, _LAST_LOOK = 0.005, 0.2  # seconds between two looks


class Sizer:
    """See the module's docstring. `put`, `info` and `threads` are the VM's."""

    def __init__(
        self,
        section: ClhConfig,
        put: Callable[..., Awaitable[Any]],
        info: Callable[[], Awaitable[dict[str, Any]]],
        threads: Callable[[], Awaitable[VcpuThreadIds]],
    ) -> None:
        self._section = section
        self._put = put
        self._info = info
        self._threads = threads
        self._able = abilities(section)
        self._lock = asyncio.Lock()

    async def resize_vcpu(self, count: int) -> int:
        """See `Hypervisor.resize_vcpu`."""
        async with self._lock:
            present = await self._vcpus()
            if count == present:
                return present
            self._able.require("clh", Kind.VCPU, Op.HOT if count > present else Op.UNPLUG)
            _check_most(f"{count} vCPUs", count, self._section.default_maxvcpus, "default_maxvcpus")
            await self._put("vm.resize", {"desired_vcpus": count})
            there = await self._until(count, self._vcpus)
            if there < count:
                raise self._late(f"{count} vCPUs", there)
            return there

    async def resize_memory(self, mib: int) -> int:
        """See `Hypervisor.resize_memory`. By ACPI it grows by whole DIMMs: there may be more afterwards."""
        section, by_virtio = self._section, self._section.enable_virtio_mem
        kind = Kind.VIRTIO_MEM if by_virtio else Kind.DIMM
        async with self._lock:
            present = await self._memory()
            if mib == present:
                return present
            self._able.require("clh", kind, Op.HOT if mib > present else Op.UNPLUG)
            if mib < section.default_memory:
                least = section.default_memory
                raise UnsupportedByHypervisor("clh", f"less memory than it started with ({least} MiB)")
            _check_most(f"{mib} MiB of memory", mib, max_memory(section), "default_maxmemory")
            if not by_virtio:
                mib = present - (present - mib) // MEMORY_UNIT * MEMORY_UNIT
            await self._put("vm.resize", {"desired_ram": mib << 20})
            there = await self._until(mib, self._memory)
            if there != mib:
                await self._put("vm.resize", {"desired_ram": there << 20})
            if there < mib:
                raise self._late(f"{mib} MiB of memory", there)
            return there

    async def _vcpus(self) -> int:
        return len((await self._threads()).vcpus)

    async def _memory(self) -> int:
        """MiB that the VM has now."""
        size = (await self._info()).get("memory_actual_size")
        if not isinstance(size, int):
            raise HypervisorError(f"Cloud Hypervisor tells no size of the VM's memory: {size!r:.50}")
        return size >> 20

    async def _until(self, wanted: int, look: Callable[[], Awaitable[int]]) -> int:
        """How much there is: as wanted, or what there was at the deadline."""
        pause, loop = _FIRST_LOOK, asyncio.get_running_loop()
        end = loop.time() + self._section.hotplug_timeout
        while (there := await look()) != wanted and loop.time() < end:
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_LOOK)
        return there

    def _late(self, what: str, there: int) -> HypervisorError:
        return HypervisorError(
            f"the guest did not take {what} within {self._section.hotplug_timeout:g} s; it has {there}",
            phase="sizing",
            hint="raise hotplug_timeout, or see the guest's console",
            code="DEADLINE_EXCEEDED",
        )


def _check_most(what: str, wanted: int, most: int, key: str) -> None:
    if wanted > most:
        raise HypervisorError(
            f"{what} are asked for; this VM can have {most}",
            phase="sizing",
            hint=f"raise {key}, if the host has more",
            code="RESOURCE_EXHAUSTED",
        )
