"""Whatever QEMU refuses or answers too late and the guest ignores, keeps or gives back late: a VM never has
less than its last answer said, and in the end it has what is asked for, and nothing besides."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from devices.addresses import PciTopology
from devices.errors import KataError
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.kvm import Accelerator
from hypervisors.qemu.plan import first_plan, with_ports
from hypervisors.qemu.qmp import QmpClient
from hypervisors.qemu.sizing import Sizer
from tests.unit.hypervisors.machine import Machine

BASE, BLOCK, MOST_VCPUS = 256, 128, 4
SECTION = HypervisorConfig(
    default_memory=BASE, default_maxmemory=2048, default_maxvcpus=MOST_VCPUS, hotplug_timeout=0.02
)
COMMANDS = (
    *("device_add", "device_del", "object-add", "object-del", "qom-set", "qom-get"),
    *("query-hotpluggable-cpus", "query-memory-size-summary", "query-memory-devices"),
)

STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["vcpus", "cancel vcpus"]), st.integers(1, MOST_VCPUS)),
        st.tuples(st.sampled_from(["blocks", "blocks", "cancel blocks"]), st.integers(0, 6)),
        st.tuples(st.sampled_from(["refuse", "late"]), st.sampled_from(COMMANDS)),
        st.tuples(st.just("keep"), st.sampled_from(["cpu-1-0-0", "cpu-3-0-0", "dimm0", "dimm1"])),
        st.tuples(st.sampled_from(["mend", "ignore", "ignore", "look"]), st.none()),
    ),
    max_size=30,
)


class SlowClient:
    """A client some of whose commands are met, and not answered."""

    def __init__(self, client: QmpClient) -> None:
        self._client = client
        self.late: set[str] = set()
        self.expect = client.expect

    async def execute(self, command: str, arguments: Any = None, **keywords: Any) -> Any:
        answer = await self._client.execute(command, arguments, **keywords)
        if command in self.late:
            raise KataError(f"QEMU did not answer {command}", code="DEADLINE_EXCEEDED")
        return answer


class Play:
    """One VM, and what it said last that it has."""

    def __init__(self, *, virtio_mem: bool) -> None:
        self.machine = Machine()
        self.section = dataclasses.replace(SECTION, enable_virtio_mem=virtio_mem)
        self.promised = {"vcpus": 1, "blocks": 0}

    def has(self) -> dict[str, int]:
        """What the guest can count on, even if it gives back all that it was ever asked for."""
        machine = self.machine
        vcpus = sum(
            1 for path in machine.cpus.values() if path and path.split("/")[-1] not in machine.leaving
        )
        dimms = [d for name, d in machine.devices.items() if "memdev" in d and name not in machine.leaving]
        memory = sum(machine.objects[dimm["memdev"]]["size"] for dimm in dimms) + machine.virtio_mem["size"]
        return {"vcpus": vcpus, "blocks": memory // (BLOCK << 20)}

    async def run(self, steps: list[tuple[str, Any]]) -> None:
        """Every step, then mend everything, and grow and shrink in peace."""
        client = await self.machine.connect()
        try:
            await self.play(client, steps)
        finally:
            await client.close()
            await self.machine.close()

    async def play(self, client: QmpClient, steps: list[tuple[str, Any]]) -> None:
        self.client = SlowClient(client)
        plan = with_ports(first_plan(self.section, Accelerator.KVM, "vm"), PciTopology())
        self.sizer = Sizer(plan, self.client)  # type: ignore[arg-type]
        for action, what in steps:
            if isinstance(what, int):
                await self.resize(action, what)
            else:
                self.disturb(action, what)
            have = self.has()
            assert all(have[name] >= count for name, count in self.promised.items()), (action, what)
        self.disturb("mend", None)
        self.sizer._deadline = 20.0
        for vcpus, blocks in ((1, 0), (MOST_VCPUS, 6), (1, 0)):
            assert await self.sizer.resize_vcpu(vcpus) == vcpus
            assert await self.sizer.resize_memory(BASE + blocks * BLOCK) == BASE + blocks * BLOCK
        assert self.has() == {"vcpus": 1, "blocks": 0}
        assert (self.machine.devices, self.machine.objects) == ({}, {})

    def disturb(self, action: str, what: Any) -> None:
        machine = self.machine
        match action:
            case "refuse":
                machine.refuse.add(what)
            case "late":
                self.client.late.add(what)
            case "keep":
                machine.refusals[what] = 0x81
            case "ignore":
                machine.lazy = True
            case _:
                machine.lazy = False
                for name in list(machine.leaving & machine.devices.keys()):
                    machine.unplugged(name)
                if action == "mend":
                    machine.refuse.clear()
                    machine.refusals.clear()
                    self.client.late.clear()

    async def resize(self, action: str, count: int) -> None:
        name = action.rsplit(maxsplit=1)[-1]
        self.promised[name] = min(self.promised[name], count)  # whatever comes of it
        call = (
            self.sizer.resize_vcpu(count)
            if name == "vcpus"
            else self.sizer.resize_memory(BASE + count * BLOCK)
        )
        if action.startswith("cancel"):
            task = asyncio.create_task(call)
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            return
        with contextlib.suppress(KataError):
            answer = await call
            answer = answer if name == "vcpus" else (answer - BASE) // BLOCK
            assert answer >= count
            self.promised[name] = answer


@settings(max_examples=200, deadline=None)
@given(st.booleans(), STEPS)
@example(False, [("blocks", 3), ("ignore", None), ("blocks", 0), ("look", None), ("blocks", 2)])
@example(False, [("vcpus", 3), ("ignore", None), ("vcpus", 1), ("vcpus", 3), ("look", None)])
@example(False, [("keep", "cpu-1-0-0"), ("vcpus", 2), ("late", "device_del"), ("vcpus", 1)])
@example(False, [("keep", "dimm0"), ("blocks", 1), ("late", "device_del"), ("blocks", 0)])
@example(True, [("blocks", 3), ("ignore", None), ("blocks", 0), ("look", None), ("blocks", 2)])
def test_whatever_fails_the_answer_is_true(virtio_mem: bool, steps: list[tuple[str, Any]]) -> None:
    asyncio.run(Play(virtio_mem=virtio_mem).run(steps))
