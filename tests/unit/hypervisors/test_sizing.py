"""A VM grows and shrinks as far as it can, waits for its guest, and says in words what it cannot."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from devices.addresses import PciTopology
from devices.errors import HypervisorError, UnsupportedByHypervisor
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.kvm import Accelerator
from hypervisors.qemu.plan import first_plan, with_ports
from hypervisors.qemu.qmp import QmpClient
from hypervisors.qemu.sizing import Sizer
from tests.unit.hypervisors.machine import Machine

SECTION = HypervisorConfig(
    default_memory=256, default_maxmemory=64 << 10, default_maxvcpus=4, hotplug_timeout=10.0
)

Make = Callable[..., Awaitable[Sizer]]


@pytest.fixture
async def machine() -> AsyncIterator[Machine]:
    made = Machine()
    yield made
    await made.close()


@pytest.fixture
async def make(machine: Machine) -> AsyncIterator[Make]:
    """A sizer of the machine; keywords change the section."""
    clients = []

    async def _make(*, kvm: bool = False, **changes: object) -> Sizer:
        section = dataclasses.replace(SECTION, **changes)  # type: ignore[arg-type]
        plan = first_plan(section, Accelerator.KVM if kvm else Accelerator.TCG, "vm")
        clients.append(await machine.connect())
        return Sizer(with_ports(plan, PciTopology()), clients[-1])

    yield _make
    for client in clients:
        await client.close()


def in_use(machine: Machine) -> list[int]:
    return [number for number, path in machine.cpus.items() if path]


async def test_vcpus_come_lowest_first_and_once(machine: Machine, make: Make) -> None:
    sizer = await make(kvm=True)
    counts = await asyncio.gather(sizer.resize_vcpu(3), sizer.resize_vcpu(3))
    assert list(counts) == [3, 3]

    assert in_use(machine) == [0, 1, 2]
    assert machine.commands.count("device_add") == 2
    assert machine.devices["cpu-1-0-0"]["driver"] == "max-x86_64-cpu"


async def test_more_vcpus_than_announced_are_refused(machine: Machine, make: Make) -> None:
    with pytest.raises(HypervisorError, match="5 vCPUs are asked for; this VM can have 4") as caught:
        await (await make(kvm=True)).resize_vcpu(5)

    assert "default_maxvcpus" in caught.value.hint
    assert in_use(machine) == [0]


async def test_under_kvm_plugged_vcpus_go_again_but_not_the_first(machine: Machine, make: Make) -> None:
    sizer = await make(kvm=True)
    await sizer.resize_vcpu(4)
    assert await sizer.resize_vcpu(2) == 2
    assert in_use(machine) == [0, 1]
    with pytest.raises(UnsupportedByHypervisor, match=r"fewer vCPUs than it started with \(1\)"):
        await sizer.resize_vcpu(0)


async def test_under_tcg_all_vcpus_are_there_and_none_goes(machine: Machine, make: Make) -> None:
    """QEMU is not asked: the guest brings online what it is granted, and has no more than that."""
    sizer = await make()
    assert [sizer.is_granted(index) for index in range(3)] == [True, False, False]
    assert await sizer.resize_vcpu(2) == 2
    assert [sizer.is_granted(index) for index in range(3)] == [True, True, False]
    assert await sizer.resize_vcpu(2) == 2
    with pytest.raises(UnsupportedByHypervisor, match="unplug of a vCPU: under TCG"):
        await sizer.resize_vcpu(1)
    with pytest.raises(HypervisorError, match="5 vCPUs are asked for; this VM can have 4"):
        await sizer.resize_vcpu(5)

    assert not {"device_add", "device_del", "query-hotpluggable-cpus"} & set(machine.commands)


async def test_a_guest_that_does_not_look_meets_the_deadline(machine: Machine, make: Make) -> None:
    sizer = await make(kvm=True, hotplug_timeout=0.05)
    machine.lazy = True
    for call in (sizer.resize_vcpu(2), sizer.resize_memory(512)):
        with pytest.raises(HypervisorError, match=r"the guest did not take .* within 0.05 s") as caught:
            await call
        assert (caught.value.code, caught.value.phase) == ("DEADLINE_EXCEEDED", "sizing")

    # QEMU has both now, so asking again does nothing.
    assert await sizer.resize_vcpu(2) == 2
    assert await sizer.resize_memory(512) == 512


async def test_a_guest_that_refuses_is_an_error(machine: Machine, make: Make) -> None:
    machine.ost_status = 0x81
    with pytest.raises(HypervisorError, match="the guest refused the vCPU cpu-1-0-0 with ACPI status 129"):
        await (await make(kvm=True)).resize_vcpu(2)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("what", ["resize_vcpu", "resize_memory"])
async def test_a_vm_that_dies_ends_the_wait(machine: Machine, make: Make, what: str, size: int) -> None:
    """Growing and shrinking."""
    sizer = await make(kvm=True)
    unit = 1 if what == "resize_vcpu" else 256
    await getattr(sizer, what)(2 * unit)
    machine.lazy = True
    machine.commands.clear()
    resizing = asyncio.create_task(getattr(sizer, what)(size * unit))
    await machine.saw("device_add" if size > 2 else "device_del")
    await machine.close()
    with pytest.raises(HypervisorError, match="closed its control socket"):
        await resizing


async def test_memory_comes_by_dimms(machine: Machine, make: Make) -> None:
    sizer = await make()
    assert await sizer.resize_memory(512) == 512
    assert await sizer.resize_memory(512) == 512
    assert await sizer.resize_memory(1024) == 1024

    assert [device["id"] for device in machine.devices.values()] == ["dimm0", "dimm1"]
    backend = machine.objects["mem-dimm1"]
    assert (backend["qom-type"], backend["share"]) == ("memory-backend-memfd", True)
    assert backend["size"] == 512 << 20


async def test_memory_beside_nvdimms_is_whole_blocks_of_the_guests(machine: Machine, make: Make) -> None:
    """An nvdimm is no memory of the guest's, and leaves the next DIMM at an address that Linux cannot use."""

    def nvdimm(name: str, address: int) -> None:
        machine.objects[name] = {"size": 1 << 20}
        machine.devices[name] = {"id": name, "driver": "nvdimm", "memdev": name, "addr": address}

    nvdimm("pmem1", 4 << 30)
    sizer = await make(block_device_driver="virtio-pmem")
    assert await sizer.resize_memory(384) == 384
    nvdimm("pmem2", (4 << 30) + (256 << 20))
    assert await sizer.resize_memory(512) == 512

    dimms = [machine.devices[name] for name in ("dimm0", "dimm1")]
    assert [machine.objects[dimm["memdev"]]["size"] >> 20 for dimm in dimms] == [128, 128]
    assert [dimm["addr"] - (4 << 30) >> 20 for dimm in dimms] == [128, 384]
    assert await sizer.resize_memory(256) == 256


async def test_dimms_go_whole_and_their_back_ends_with_them(machine: Machine, make: Make) -> None:
    sizer = await make(kvm=True)
    for mib in (768, 1024, 1152):  # 512, 256, 128
        await sizer.resize_memory(mib)
    assert await sizer.resize_memory(1100) == 1152  # no DIMM is that small
    assert await sizer.resize_memory(640) == 640  # the largest fits
    assert list(machine.devices) == ["dimm1", "dimm2"]
    assert sorted(machine.objects) == ["mem-dimm1", "mem-dimm2"]
    assert await sizer.resize_memory(1280) == 1280
    assert list(machine.devices) == ["dimm1", "dimm2", "dimm3"]
    assert await sizer.resize_memory(256) == 256
    assert machine.objects == {}
    with pytest.raises(UnsupportedByHypervisor, match=r"less memory than it started with \(256 MiB\)"):
        await sizer.resize_memory(128)


async def test_no_dimm_has_a_name_that_was_there_before(machine: Machine, make: Make) -> None:
    """QEMU 10 and 11 give a memfd of such a name the descriptor of the one that has gone, and close it."""
    sizer = await make(kvm=True)
    seen: list[str] = []
    for _ in range(3):
        await sizer.resize_memory(640)
        seen += machine.objects
        await sizer.resize_memory(256)

    assert len(seen) == 3
    assert len(set(seen)) == 3


async def test_under_tcg_back_ends_stay_for_the_next_dimm_of_their_size(machine: Machine, make: Make) -> None:
    """A guest's programs die with a new one there (QEMU 10 and 11). What lies idle is no more than the VM may
    have; the guest keeps the rest."""
    sizer = await make(default_maxmemory=1024)
    for _ in range(3):
        assert await sizer.resize_memory(640) == 640
        assert await sizer.resize_memory(256) == 256
    assert list(machine.objects) == ["mem-dimm0"]
    assert await sizer.resize_memory(512) == 512  # of another size: one of its own
    assert await sizer.resize_memory(256) == 256
    assert list(machine.objects) == ["mem-dimm0", "mem-dimm3"]
    assert await sizer.resize_memory(768) == 768
    assert await sizer.resize_memory(256) == 768  # 384 and 256 MiB lie idle
    assert await sizer.resize_memory(1024) == 1024
    assert machine.devices["dimm5"]["memdev"] == "mem-dimm3"


async def test_under_tcg_what_no_dimm_ever_had_goes(machine: Machine, make: Make) -> None:
    sizer = await make()
    machine.refuse = {"device_add"}
    with pytest.raises(HypervisorError):
        await sizer.resize_memory(512)
    assert machine.objects == {}


async def test_what_another_process_plugged_goes_too_and_its_names_are_taken(
    machine: Machine, make: Make
) -> None:
    """A shim that takes over a VM knows its DIMMs by QEMU's word only."""
    sizer = await make(kvm=True)
    await sizer.resize_memory(256 + 128)
    heir = Sizer(sizer._plan, sizer._qmp)

    assert await heir.resize_memory(256 + 128 + 256) == 256 + 128 + 256
    assert sorted(machine.devices) == ["dimm0", "dimm1"]
    assert await heir.resize_memory(256) == 256
    assert (machine.devices, machine.objects) == ({}, {})


async def test_of_equal_dimms_the_last_one_goes(machine: Machine, make: Make) -> None:
    sizer = await make()
    for mib in (384, 512, 640):
        await sizer.resize_memory(mib)
    assert await sizer.resize_memory(512) == 512
    assert list(machine.devices) == ["dimm0", "dimm1"]


@pytest.mark.parametrize("answer", [0x1, 0x81, "DEVICE_UNPLUG_GUEST_ERROR", "MEM_UNPLUG_ERROR"])
async def test_what_the_guest_keeps_it_keeps(machine: Machine, make: Make, answer: int | str) -> None:
    """Its answer ends the wait, and is no error; it may be asked again."""
    sizer = await make(kvm=True)
    await sizer.resize_vcpu(3)
    await sizer.resize_memory(512)
    machine.refusals = {"cpu-2-0-0": answer, "dimm0": answer}
    assert await sizer.resize_vcpu(1) == 3
    assert await sizer.resize_memory(256) == 512
    assert list(machine.objects) == ["mem-dimm0"]

    machine.refusals = {}
    assert await sizer.resize_vcpu(1) == 1
    assert await sizer.resize_memory(256) == 256


async def test_what_may_go_at_any_moment_is_not_counted_on(machine: Machine, make: Make) -> None:
    """A guest that does not answer in time may give it back later, so growing does not build on it."""
    sizer = await make(kvm=True, hotplug_timeout=0.05)
    await sizer.resize_vcpu(2)
    await sizer.resize_memory(512)
    machine.lazy = True
    assert await sizer.resize_vcpu(1) == 1
    assert await sizer.resize_memory(256) == 256
    assert list(machine.devices) == ["cpu-1-0-0", "dimm0"]
    machine.lazy = False
    assert await sizer.resize_vcpu(2) == 2
    assert await sizer.resize_memory(512) == 512
    assert in_use(machine) == [0, 1, 2]
    machine.unplugged("dimm0")
    machine.unplugged("cpu-1-0-0")

    assert await sizer.resize_memory(512) == 512
    assert await sizer.resize_memory(640) == 640
    assert sorted(machine.objects) == ["mem-dimm1", "mem-dimm2"]
    assert await sizer.resize_vcpu(2) == 2
    assert await sizer.resize_vcpu(3) == 3
    assert in_use(machine) == [0, 1, 2]


@pytest.mark.parametrize("command", ["device_del", "object-del", "query-memory-devices"])
async def test_an_unplug_that_qemu_refuses_can_be_tried_again(
    machine: Machine, make: Make, command: str
) -> None:
    sizer = await make(kvm=True)
    await sizer.resize_memory(512)
    machine.refuse.add(command)
    with pytest.raises(HypervisorError, match=f"QEMU refused {command}"):
        await sizer.resize_memory(256)
    machine.refuse.clear()

    assert await sizer.resize_memory(256) == 256
    assert await sizer.resize_memory(512) == 512
    assert await sizer.resize_memory(256) == 256
    assert machine.objects == {}


async def test_a_small_vm_grows_large_in_steps(machine: Machine, make: Make) -> None:
    """The page table of a DIMM comes out of the memory that is there already."""
    assert await (await make()).resize_memory(32 << 10) == 32 << 10

    sizes = [machine.objects[f"mem-dimm{number}"]["size"] >> 20 for number in range(len(machine.objects))]
    assert sizes == [2048, 18432, 12032]
    assert all(size % 128 == 0 for size in sizes)


async def test_more_memory_than_announced_is_refused(make: Make) -> None:
    sizer = await make(default_maxmemory=1024)
    with pytest.raises(HypervisorError, match="1152 MiB of memory are asked for; this VM can have 1024"):
        await sizer.resize_memory(1152)


async def test_a_dimm_that_qemu_refuses_leaves_nothing(machine: Machine, make: Make) -> None:
    sizer = await make()
    machine.refuse.add("device_add")
    with pytest.raises(HypervisorError, match="QEMU refused device_add") as caught:
        await sizer.resize_memory(512)
    assert "enable_virtio_mem" in caught.value.hint
    assert machine.objects == {}

    machine.refuse.clear()
    assert await sizer.resize_memory(512) == 512


@pytest.mark.parametrize("command", ["object-add", "device_add"])
async def test_what_qemu_answers_too_late_is_not_forgotten(
    machine: Machine, make: Make, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """It has it all the same: the next attempt finds the DIMM, or makes another and removes the back end."""
    sizer = await make(kvm=True)
    execute = QmpClient.execute

    async def slow(client: QmpClient, name: str, *args: Any, **keywords: Any) -> Any:
        answer = await execute(client, name, *args, **keywords)
        if name == command:
            raise HypervisorError(f"QEMU did not answer {name} within 5 s", code="DEADLINE_EXCEEDED")
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(QmpClient, "execute", slow)
        with pytest.raises(HypervisorError, match=f"did not answer {command}"):
            await sizer.resize_memory(512)
    assert await sizer.resize_memory(512) == 512
    (dimm,) = machine.devices
    assert list(machine.objects) == [f"mem-{dimm}"]
    assert await sizer.resize_memory(256) == 256
    assert machine.objects == {}


async def test_virtio_mem_goes_both_ways(machine: Machine, make: Make) -> None:
    sizer = await make(enable_virtio_mem=True)
    assert await sizer.resize_memory(1000) == 1000
    assert machine.virtio_mem["size"] == 744 << 20
    assert await sizer.resize_memory(256) == 256
    with pytest.raises(UnsupportedByHypervisor, match=r"less memory than it started with \(256 MiB\)"):
        await sizer.resize_memory(128)


async def test_a_size_that_qemu_tells_late_is_asked_for(machine: Machine, make: Make) -> None:
    sizer = await make(enable_virtio_mem=True)
    machine.throttled = True
    assert await sizer.resize_memory(1024) == 1024
    assert await sizer.resize_memory(256) == 256


async def test_a_guest_may_keep_what_it_uses(machine: Machine, make: Make) -> None:
    sizer = await make(enable_virtio_mem=True, hotplug_timeout=0.05)
    await sizer.resize_memory(1024)
    machine.keeps = 100 << 20

    assert await sizer.resize_memory(256) == 356
    assert machine.virtio_mem == {"requested-size": 100 << 20, "size": 100 << 20}  # it is asked no more
    machine.keeps = 0
    assert await sizer.resize_memory(256) == 256


async def test_a_vm_that_may_not_grow_says_so(make: Make) -> None:
    sizer = await make(default_maxvcpus=1, default_maxmemory=256)
    assert await sizer.resize_vcpu(1) == 1
    assert await sizer.resize_memory(256) == 256
    with pytest.raises(UnsupportedByHypervisor, match="other than 1 vCPUs"):
        await sizer.resize_vcpu(2)
    with pytest.raises(UnsupportedByHypervisor, match="other than 256 MiB"):
        await sizer.resize_memory(512)
