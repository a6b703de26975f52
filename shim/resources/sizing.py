"""The size of the VM: what its containers' limits ask for, and how it follows them while it runs.

What: `sized` decides what the VM starts with and what it can become, `Sizing.fit` makes room for one
container's limits before the guest hears of them, `forget` takes a container's part back.
Why: a VM is small until somebody asks for more; a limit that is above what the VM has would be a lie.
The rule is Kata's: the configuration's default plus the sum of all containers' limits.
Invariants:
- One change at a time; asking for what there is changes nothing.
- What the guest is told to bring online was plugged before; `fit` returns when it is in use.
- A limit above the largest VM the configuration allows is refused by Update; at Create it is only
  logged, since runc too starts a container that may use more than the host has.
- Shrinking is no promise: it happens in the background where the VMM can, and what fails is logged.
- No more memory is taken away than the guest says it can spare: a kernel that gives back what it needs
  kills processes for it.
Source: kata.md 1.10; runtime-rs' resource/src/cpu_mem for the rule.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import structlog

from devices.errors import CallerError, KataError, UnsupportedByHypervisor
from devices.kinds import Kind, Op
from hypervisors.base import Capabilities, Hypervisor
from hypervisors.config import GrowingSection, HostedSection
from proto import oci_pb2
from shim.spec.limits import Size, fold_unified, wanted
from shim.spec.oci import resources_from_json

__all__ = ["Bounds", "GuestSizing", "Sizing", "boot_size", "sized", "spec_limits", "spec_wants"]

_MIB = 1 << 20
_BLOCK = 128 * _MIB  # a Linux guest's memory block on x86_64, and the least
_MAX_BLOCK = 2048 * _MIB
_RESERVE = 64 * _MIB  # of the memory that the guest has to spare, what a shrink leaves it
_SANDBOX_QUOTA = "io.kubernetes.cri.sandbox-cpu-quota"
_SANDBOX_PERIOD = "io.kubernetes.cri.sandbox-cpu-period"
_SANDBOX_MEMORY = "io.kubernetes.cri.sandbox-memory"

_KEYS = ("cpu", "memory", "hugepageLimits")

_log = structlog.get_logger("sizing")


class GuestSizing(Protocol):
    """What is asked of the agent: a part of `shim.sandbox.agent_client.GuestAgent`."""

    async def memory_block_size(self) -> int:
        """Bytes; memory comes in whole blocks."""
        ...

    async def memory_available(self) -> int:
        """Bytes that it could hand out, its caches included."""
        ...

    async def online_cpu_mem(self, vcpus: int) -> None:
        """Have so many vCPUs in use, and all memory."""
        ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """Sizes of one VM: `base` without containers, `boot` as it starts, `largest` as it can become."""

    base: Size
    boot: Size
    largest: Size


def spec_limits(spec: Mapping[str, Any]) -> oci_pb2.LinuxResources:
    """linux.resources of a container's spec. Raises CallerError for what is malformed."""
    resources = fold_unified((spec.get("linux") or {}).get("resources") or {})
    limits, _ = resources_from_json({key: resources[key] for key in _KEYS if resources.get(key)})
    return limits


def spec_wants(spec: Mapping[str, Any], *, pod: bool) -> Size:
    """The limits that are known when the VM is made: of its container, or the sums of a pod's."""
    return wanted(_annotated(spec.get("annotations") or {}) if pod else spec_limits(spec))


def boot_size(base: Size, overhead: Size, spec: Mapping[str, Any], *, static: bool, pod: bool) -> Size:
    """What the VM starts with. `pod`: the spec is a pod's sandbox container's.

    static: the limits that are known, a pod's from its CRI annotations, plus `overhead` (its zeros mean:
    no CPU, and the base's memory), because it never grows. Else: `base` plus this container's limits; a
    pod's containers come later. What has no limit stays as in `base`.
    """
    known = spec_wants(spec, pod=pod)
    if not static:
        if pod:
            return base
        return Size(base.vcpus + known.vcpus, base.memory + _up(known.bytes, _BLOCK))
    return Size(
        max(overhead.vcpus + known.vcpus, 1.0) if known.vcpus else base.vcpus,
        (overhead.memory or base.memory) + _up(known.bytes, _MIB) if known.bytes else base.memory,
    )


def sized(section: Any, spec: Mapping[str, Any], *, static: bool, pod: bool) -> tuple[Any, Bounds]:
    """A hypervisor's section with the size that the VM boots with, and the sizes that it can have.

    `static`: it never gets another; `pod`: `spec` is a pod's sandbox container's. A section that mixes in no
    GrowingSection is of a VMM whose VMs do not grow; one with a HostedSection is bounded elsewhere.
    """
    growing = section if isinstance(section, GrowingSection) else None
    base = Size(section.default_vcpus, section.default_memory << 20)
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    overhead, ceiling = Size(0.0, 0), Size(float(len(os.sched_getaffinity(0))), host << 20)
    if isinstance(section, HostedSection):
        ceiling = Size(math.inf, sys.maxsize)
    if growing is not None:
        overhead = Size(growing.overhead_vcpus, growing.overhead_memory << 20)
        ceiling = Size(growing.default_maxvcpus, growing.default_maxmemory << 20)
    most = Size(max(base.vcpus, ceiling.vcpus), max(base.memory, ceiling.memory))
    boot = boot_size(base, overhead, spec, static=static, pod=pod)
    boot = Size(min(boot.vcpus, most.vcpus), min(boot.memory, most.memory))
    largest = boot if growing is None or static else most
    changes: dict[str, float] = {"default_vcpus": boot.vcpus, "default_memory": boot.memory >> 20}
    if growing is not None:
        changes["default_maxvcpus"] = math.ceil(largest.vcpus)
        changes["default_maxmemory"] = largest.memory >> 20
    return dataclasses.replace(section, **changes), Bounds(base, boot, largest)


def _annotated(annotations: Mapping[str, Any]) -> oci_pb2.LinuxResources:
    """The pod's sums as the CRI gives them; what is no number counts as absent."""

    def number(key: str) -> int:
        text = annotations.get(key, "")
        return int(text) if text.isascii() and text.removeprefix("-").isdecimal() and len(text) < 19 else 0

    return oci_pb2.LinuxResources(
        CPU=oci_pb2.LinuxCPU(Quota=number(_SANDBOX_QUOTA), Period=max(0, number(_SANDBOX_PERIOD))),
        Memory=oci_pb2.LinuxMemory(Limit=number(_SANDBOX_MEMORY)),
    )


class Sizing:
    """The running VM's size. `guest` answers the agent once the VM runs; `spawn` runs a shrink in the
    background, as long as the VM lives; `room` is told of a size before the VM has it."""

    def __init__(
        self,
        bounds: Bounds,
        hypervisor: Hypervisor,
        guest: Callable[[], GuestSizing],
        spawn: Callable[[Any], None],
        room: Callable[[Size], Awaitable[None]] | None = None,
    ) -> None:
        self._bounds = bounds
        self._hypervisor = hypervisor
        self._guest = guest
        self._spawn = spawn
        self._room = room
        self._vcpus = max(1, math.ceil(bounds.boot.vcpus))
        self._memory = bounds.boot.memory
        self._block = 0
        self._asked: dict[str, Size] = {}
        self._lock = asyncio.Lock()

    @property
    def size(self) -> Size:
        """What the VM has now."""
        return Size(self._vcpus, self._memory)

    @property
    def share(self) -> Size:
        """The same without rounding: what the limits add up to, and the VM's own; not less than at boot."""
        vcpus = self._bounds.base.vcpus + sum(size.vcpus for size in self._asked.values())
        return Size(max(vcpus, self._bounds.boot.vcpus), self._memory)

    async def fit(
        self, container_id: str, resources: oci_pb2.LinuxResources, *, strict: bool = False
    ) -> None:
        """Have room for a container with these limits; those that are not set stay as they were.

        Raises CallerError FAILED_PRECONDITION (`strict` only) when the VM can never be that large, and
        HypervisorError, GuestError when growing fails; what it asked for before counts again then.
        """
        async with self._lock:
            before = self._asked.get(container_id)
            asked = _merged(before or Size(), resources)
            self._check(container_id, asked, await self._hypervisor.capabilities(), strict=strict)
            self._asked[container_id] = asked
            try:
                await self._grow()
            except BaseException:
                if before is None:
                    del self._asked[container_id]
                else:
                    self._asked[container_id] = before
                raise
        await self._shrink_soon()

    async def forget(self, container_id: str) -> None:
        """The container is gone. Unknown ids are fine."""
        async with self._lock:
            gone = self._asked.pop(container_id, Size())
        if gone != Size():
            await self._shrink_soon()

    def _check(self, container_id: str, asked: Size, able: Capabilities, *, strict: bool) -> None:
        vcpus = self._bounds.largest.vcpus if able.can(Kind.VCPU, Op.HOT) else self._vcpus
        memory = self._bounds.largest.memory if able.more_memory else self._memory
        for what, possible, needed, key in (
            ("CPUs", vcpus, asked.vcpus, "default_maxvcpus"),
            ("MiB of memory", memory >> 20, -(-asked.bytes >> 20), "default_maxmemory"),
        ):
            if needed <= possible:
                continue
            problem = f"{container_id} cannot have {needed:g} {what}: its VM can have {possible:g}"
            if not strict:
                _log.warning("a limit is above the largest VM", problem=problem)
                continue
            hint = f"raise {key} in the configuration, unless static_sandbox_resource_mgmt fixes the size"
            raise CallerError(problem, phase="update", hint=hint, code="FAILED_PRECONDITION")

    def _wanted(self) -> tuple[int, int]:
        """vCPUs and bytes by the rule, within what is possible."""
        base, largest = self._bounds.base, self._bounds.largest
        vcpus = math.ceil(base.vcpus + sum(size.vcpus for size in self._asked.values()) - 1e-6)
        memory = base.memory + sum(size.bytes for size in self._asked.values())
        return min(max(1, vcpus), max(1, math.ceil(largest.vcpus))), min(memory, largest.memory)

    async def _grow(self) -> None:
        vcpus, memory = self._wanted()
        able = await self._hypervisor.capabilities()
        target = self._memory
        if memory > self._memory and able.more_memory:
            more = _up(memory - self._memory, await self._block_size())
            target = min(self._memory + more, self._bounds.largest.memory)
        if self._room is not None:
            await self._room(Size(self.share.vcpus, target))
        if vcpus <= self._vcpus and memory <= self._memory:
            return
        # It can grow: one that says it cannot do this has more already, from an attempt that failed late.
        if vcpus > self._vcpus and able.can(Kind.VCPU, Op.HOT):
            with contextlib.suppress(UnsupportedByHypervisor):
                self._vcpus = await self._hypervisor.resize_vcpu(vcpus)
        if target > self._memory:
            with contextlib.suppress(UnsupportedByHypervisor):
                self._memory = await self._hypervisor.resize_memory(target >> 20) << 20
        await self._guest().online_cpu_mem(self._vcpus)
        _log.info("the VM grew", vcpus=self._vcpus, memory_mib=self._memory >> 20)

    async def _block_size(self) -> int:
        if self._block == 0:
            said = await self._guest().memory_block_size()
            self._block = said if _BLOCK <= said <= _MAX_BLOCK and said & (said - 1) == 0 else _BLOCK
        return self._block

    async def _shrink_soon(self) -> None:
        vcpus, memory = self._wanted()
        if vcpus >= self._vcpus and memory >= self._memory:
            return
        able = await self._hypervisor.capabilities()
        if (vcpus < self._vcpus and able.can(Kind.VCPU, Op.UNPLUG)) or (
            memory < self._memory and able.less_memory
        ):
            self._spawn(self._shrink())

    async def _shrink(self) -> None:
        boot = self._bounds.boot
        async with self._lock:
            before = self.size
            vcpus, memory = self._wanted()
            able = await self._hypervisor.capabilities()
            try:
                vcpus = max(vcpus, math.ceil(boot.vcpus))
                # What fails may have been met all the same: from the request on there is no more than that.
                if vcpus < self._vcpus and able.can(Kind.VCPU, Op.UNPLUG):
                    self._vcpus = vcpus
                    self._vcpus = await self._hypervisor.resize_vcpu(vcpus)
                block = self._block or _BLOCK
                memory = boot.memory + _up(max(0, memory - boot.memory), block)
                if memory < self._memory and able.less_memory:
                    spare = max(0, await self._guest().memory_available() - _RESERVE)
                    memory = max(memory, self._memory - spare // block * block)
                if memory < self._memory and able.less_memory:
                    self._memory = memory
                    self._memory = await self._hypervisor.resize_memory(memory >> 20) << 20
            except KataError as error:
                _log.warning("the VM did not shrink", error=str(error))
                return
            if self.size != before:
                _log.info("the VM shrank", vcpus=self._vcpus, memory_mib=self._memory >> 20)


def _merged(before: Size, resources: oci_pb2.LinuxResources) -> Size:
    """An update names only what it changes: 0 is "as it was", -1 "no limit"."""
    new = wanted(resources)
    named_cpu = resources.CPU.Quota != 0 or resources.CPU.Cpus != ""
    return Size(
        new.vcpus if named_cpu else before.vcpus,
        new.memory if resources.Memory.Limit else before.memory,
        new.huge if resources.HugepageLimits else before.huge,
    )


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
