"""The VM has what its containers' limits add up to, from the start or by growing, and never by lying."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Coroutine
from typing import Any

import pytest

from devices.errors import CallerError, GuestError, HypervisorError, UnsupportedByHypervisor
from devices.kinds import YES, Kind, Support
from hypervisors.base import Capabilities
from hypervisors.config import HypervisorConfig
from hypervisors.remote.config import RemoteConfig
from proto import oci_pb2
from shim.resources.sizing import Bounds, Sizing, boot_size, sized
from shim.spec.limits import Size

MIB = 1 << 20
BASE = Size(1.0, 256 * MIB)
LARGEST = Size(8.0, 8192 * MIB)


class Host:
    """A hypervisor and its guest, which remember what was asked of them."""

    def __init__(self, *, shrinks: bool = True) -> None:
        self.vcpus, self.memory = 1, 256
        self.calls: list[str] = []
        both = Support(hot=YES, unplug=YES if shrinks else "it grows only")
        self.able = Capabilities(devices={Kind.VCPU: both, Kind.DIMM: both})
        self.fail: Exception | None = None
        self.block = 128 * MIB
        self.spare = 64 << 30  # bytes that the guest could do without
        self.busy = False

    async def capabilities(self) -> Capabilities:
        return self.able

    async def _enter(self, call: str) -> None:
        assert not self.busy, "two changes at once"
        self.busy = True
        self.calls.append(call)
        await asyncio.sleep(0)
        self.busy = False
        if self.fail is not None:
            raise self.fail

    async def resize_vcpu(self, count: int) -> int:
        await self._enter(f"vcpus {count}")
        self.vcpus = count
        return count

    async def resize_memory(self, mib: int) -> int:
        await self._enter(f"memory {mib}")
        self.memory = mib
        return mib

    async def memory_block_size(self) -> int:
        return self.block

    async def memory_available(self) -> int:
        if self.spare < 0:
            raise GuestError("the agent does not say")
        return self.spare

    async def online_cpu_mem(self, vcpus: int) -> None:
        assert vcpus == self.vcpus, "the guest is told of what is not plugged"
        await self._enter("online")


class Pod:
    """A sizing with its host; `settle` awaits what goes on in the background."""

    def __init__(self, bounds: Bounds | None = None, *, shrinks: bool = True) -> None:
        self.host = Host(shrinks=shrinks)
        self.tasks: list[asyncio.Task[None]] = []
        bounds = bounds or Bounds(BASE, BASE, LARGEST)
        self.sizing = Sizing(bounds, self.host, lambda: self.host, self._spawn)  # type: ignore[arg-type]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.create_task(work))

    @staticmethod
    async def met_late(mib: int) -> int:
        raise HypervisorError(f"{mib} MiB: QEMU did not answer", code="DEADLINE_EXCEEDED")

    async def settle(self) -> tuple[int, int]:
        await asyncio.gather(*self.tasks)
        return self.host.vcpus, self.host.memory


def limits(cpus: float = 0, memory: int = 0) -> oci_pb2.LinuxResources:
    """CPUs, and MiB."""
    return oci_pb2.LinuxResources(
        CPU=oci_pb2.LinuxCPU(Quota=int(cpus * 100_000), Period=100_000),
        Memory=oci_pb2.LinuxMemory(Limit=memory * MIB if memory > 0 else memory),
    )


def spec(cpus: float = 0, memory: int = 0) -> dict[str, Any]:
    resources: dict[str, Any] = {"cpu": {"quota": int(cpus * 100_000), "period": 100_000}}
    if memory:
        resources["memory"] = {"limit": memory * MIB}
    return {"linux": {"resources": resources}}


def pod_spec(quota: str, period: str, memory: str) -> dict[str, Any]:
    """A pod's sandbox container as the CRI plugin writes it."""
    values = {"cpu-quota": quota, "cpu-period": period, "memory": memory}
    return {"annotations": {f"io.kubernetes.cri.sandbox-{name}": value for name, value in values.items()}}


# --- at the start


@pytest.mark.parametrize(
    ("document", "is_pod", "size"),
    [
        ({}, False, BASE),
        (spec(cpus=1.5), False, Size(2.5, 256 * MIB)),
        (spec(memory=600), False, Size(1.0, (256 + 640) * MIB)),  # whole memory blocks
        (spec(cpus=2, memory=600), True, BASE),
    ],
)
def test_a_vm_that_grows_starts_with_its_first_container(
    document: dict[str, Any], is_pod: bool, size: Size
) -> None:
    assert boot_size(BASE, Size(), document, static=False, pod=is_pod) == size


@pytest.mark.parametrize(
    ("overhead", "document", "is_pod", "size"),
    [
        (Size(), {}, False, BASE),
        (Size(), spec(cpus=0.5), False, BASE),
        (Size(0.5, 64 * MIB), spec(cpus=2), False, Size(2.5, 256 * MIB)),  # no memory limit: the default
        (Size(0.5, 64 * MIB), spec(memory=100), False, Size(1.0, 164 * MIB)),
        (Size(), spec(memory=100), False, Size(1.0, 356 * MIB)),
        (
            Size(),
            pod_spec("300000", "100000", str(512 * MIB)),
            True,
            Size(3.0, 768 * MIB),
        ),
        (Size(), pod_spec("-1", "100000", "0"), True, BASE),
        (Size(), pod_spec("many", "-5", "9" * 40), True, BASE),
    ],
)
def test_a_static_vm_has_what_is_known(
    overhead: Size, document: dict[str, Any], is_pod: bool, size: Size
) -> None:
    assert boot_size(BASE, overhead, document, static=True, pod=is_pod) == size


@dataclasses.dataclass(frozen=True)
class Fixed:
    """The section of a VMM whose VMs do not grow."""

    default_vcpus: float = 1.0
    default_memory: int = 256


def test_a_section_gets_the_size_that_the_vm_starts_with() -> None:
    section = HypervisorConfig(default_memory=256, default_maxvcpus=2, default_maxmemory=1024)
    document = spec(cpus=4, memory=512)
    grown, bounds = sized(section, document, static=False, pod=False)
    assert (grown.default_vcpus, grown.default_memory) == (2, 768)
    assert (grown.default_maxvcpus, grown.default_maxmemory) == (2, 1024)
    assert bounds == Bounds(BASE, Size(2, 768 * MIB), Size(2, 1024 * MIB))

    fixed, bounds = sized(section, document, static=True, pod=False)
    assert (fixed.default_maxvcpus, fixed.default_maxmemory) == (2, 768)
    assert bounds.boot == bounds.largest

    other, bounds = sized(Fixed(), spec(memory=128), static=False, pod=False)
    assert other == Fixed(default_memory=384)
    assert bounds.boot == bounds.largest == Size(1.0, 384 * MIB)


def test_a_vm_on_another_machine_is_not_bounded_by_this_one() -> None:
    section, bounds = sized(RemoteConfig(), spec(cpus=999, memory=1 << 24), static=True, pod=False)
    assert (section.default_vcpus, section.default_memory) == (999, 2048 + (1 << 24))
    assert bounds.boot == bounds.largest


# --- while it runs


async def test_containers_add_up() -> None:
    pod = Pod()
    await pod.sizing.fit("none", limits())
    assert pod.host.calls == []
    await pod.sizing.fit("a", limits(cpus=1.5, memory=600))
    assert pod.host.calls == ["vcpus 3", "memory 896", "online"]
    await pod.sizing.fit("b", limits(cpus=0.5))
    assert (pod.host.vcpus, pod.host.memory) == (3, 896)
    await pod.sizing.fit("c", limits(memory=100))
    assert (pod.host.vcpus, pod.host.memory) == (3, 1024)


async def test_it_shrinks_when_one_goes() -> None:
    pod = Pod()
    await pod.sizing.fit("a", limits(cpus=2, memory=600))
    await pod.sizing.fit("b", limits(cpus=1, memory=128))
    await pod.sizing.forget("a")
    assert await pod.settle() == (2, 384)
    await pod.sizing.forget("b")
    await pod.sizing.forget("b")
    assert await pod.settle() == (1, 256)


@pytest.mark.parametrize(
    ("spare", "memory"),
    [(64 << 10, 256), (704, 256), (703, 384), (192, 768), (191, 896), (0, 896), (-1, 896)],
)
async def test_the_guest_keeps_what_it_cannot_spare(spare: int, memory: int) -> None:
    """MiB that it says it has; 64 of them stay, and whole blocks go."""
    pod = Pod()
    await pod.sizing.fit("a", limits(cpus=1, memory=640))
    pod.host.spare = spare * MIB
    await pod.sizing.forget("a")
    assert await pod.settle() == (1, memory)

    pod.host.spare = 64 << 30  # it is asked again when the next one goes
    await pod.sizing.fit("b", limits(memory=1))
    await pod.sizing.forget("b")
    assert await pod.settle() == (1, 256)


async def test_a_shrink_that_failed_is_not_counted_on() -> None:
    """It may have been met, in part or late: the next container has what it needs made for it."""
    pod = Pod()
    await pod.sizing.fit("a", limits(cpus=2, memory=640))
    resize, pod.host.resize_memory = pod.host.resize_memory, Pod.met_late  # type: ignore[method-assign]
    await pod.sizing.forget("a")
    await pod.settle()
    pod.host.resize_memory = resize  # type: ignore[method-assign]
    pod.host.memory = 256
    await pod.sizing.fit("b", limits(cpus=2, memory=640))
    assert (pod.host.vcpus, pod.host.memory) == (3, 896)


async def test_a_vm_that_cannot_shrink_is_not_asked_to() -> None:
    pod = Pod(shrinks=False)
    await pod.sizing.fit("a", limits(cpus=2, memory=600))
    await pod.sizing.forget("a")
    assert await pod.settle() == (3, 896)
    await pod.sizing.fit("b", limits(cpus=2, memory=600))
    assert pod.host.calls == ["vcpus 3", "memory 896", "online"]


async def test_it_never_gets_smaller_than_it_started() -> None:
    boot = Size(3.0, 1024 * MIB)
    pod = Pod(Bounds(BASE, boot, LARGEST))
    pod.host.vcpus, pod.host.memory = 3, 1024
    await pod.sizing.fit("a", limits(cpus=4))
    await pod.sizing.forget("a")
    assert await pod.settle() == (3, 1024)


async def test_an_update_changes_what_it_names() -> None:
    pod = Pod()
    await pod.sizing.fit("a", limits(cpus=1, memory=256))
    await pod.sizing.fit("a", limits(memory=1024), strict=True)
    assert await pod.settle() == (2, 1280)
    await pod.sizing.fit("a", limits(memory=-1), strict=True)
    assert await pod.settle() == (2, 256)


async def test_more_than_possible_is_refused_to_updates_only() -> None:
    pod = Pod()
    await pod.sizing.fit("a", limits(memory=256))
    with pytest.raises(CallerError, match="a cannot have 9 CPUs: its VM can have 8") as caught:
        await pod.sizing.fit("a", limits(cpus=9), strict=True)
    assert caught.value.code == "FAILED_PRECONDITION"
    assert "default_maxvcpus" in caught.value.hint
    with pytest.raises(CallerError, match="9000 MiB of memory"):
        await pod.sizing.fit("a", limits(memory=9000), strict=True)
    assert (pod.host.vcpus, pod.host.memory) == (1, 512)

    await pod.sizing.fit("b", limits(cpus=9, memory=9000))
    assert (pod.host.vcpus, pod.host.memory) == (8, 8192)


async def test_a_vm_that_is_fixed_stays() -> None:
    pod = Pod(Bounds(BASE, BASE, BASE))
    await pod.sizing.fit("a", limits(cpus=1, memory=200))
    await pod.sizing.fit("b", limits(cpus=1, memory=200), strict=True)
    with pytest.raises(CallerError, match="its VM can have 256"):
        await pod.sizing.fit("b", limits(memory=257), strict=True)
    assert pod.host.calls == []


async def test_what_failed_does_not_count() -> None:
    pod = Pod()
    await pod.sizing.fit("a", limits(memory=128))
    pod.host.fail = HypervisorError("no")
    for container in ("a", "b"):
        with pytest.raises(HypervisorError):
            await pod.sizing.fit(container, limits(memory=2048))
    pod.host.fail = None
    await pod.sizing.fit("c", limits(memory=128))

    assert pod.host.memory == 512


async def test_a_vm_that_has_more_than_we_knew_is_large_enough() -> None:
    """An attempt to grow that failed late may have grown it all the same."""
    pod = Pod(shrinks=False)

    async def resize(mib: int) -> int:
        raise UnsupportedByHypervisor("qemu", f"taking memory away (to {mib} MiB)")

    pod.host.resize_memory = resize  # type: ignore[method-assign]
    await pod.sizing.fit("a", limits(memory=100))
    assert pod.host.calls == ["online"]


async def test_changes_come_one_by_one() -> None:
    pod = Pod()
    await asyncio.gather(*(pod.sizing.fit(f"c{n}", limits(cpus=0.5, memory=100)) for n in range(10)))
    assert (pod.host.vcpus, pod.host.memory) == (6, 256 + 1024)
    await asyncio.gather(*(pod.sizing.forget(f"c{n}") for n in range(10)))
    assert await pod.settle() == (1, 256)


@pytest.mark.parametrize(("said", "memory"), [(2048 * MIB, 2304), (0, 384), (3, 384), (1 << 60, 384)])
async def test_memory_comes_in_the_guests_blocks_within_reason(said: int, memory: int) -> None:
    pod = Pod()
    pod.host.block = said
    await pod.sizing.fit("a", limits(memory=1))
    assert pod.host.memory == memory
