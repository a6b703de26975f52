"""vCPUs and memory under KVM: a VM grows, and gives back what it got."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from devices.kinds import Kind, Op
from proto import agent_pb2 as agent
from tests.benchhost.conftest import KERNEL_PARAMS
from tests.e2e.guests import STREAM_PORT, Guest
from tests.e2e.vms import booting

_COUNT = "grep -c ^processor /proc/cpuinfo; cat /sys/devices/system/cpu/online; grep MemTotal /proc/meminfo"


async def _seen(guest: Guest) -> tuple[int, str, int]:
    """Of the guest: vCPUs in use, which, and MiB of memory."""
    code, out, _ = await guest.run("sh", "-c", _COUNT)
    assert code == 0
    number, which, _, memory, _ = out.split()
    return int(number), which.decode(), int(memory) >> 10


@pytest.mark.benchhost
async def test_vcpus_and_dimms_come_and_go_under_kvm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU's word and the guest's agree after each step; what has gone comes again."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})  # KVM takes more vCPUs than CPUs
    async with booting(tmp_path) as boot:
        params = f"{KERNEL_PARAMS} agent.stream_port={STREAM_PORT}"
        vm, guest, _ = await boot(
            accelerator="kvm", kernel_params=params, default_maxvcpus=3, default_maxmemory=1024
        )
        able = await vm.capabilities()
        assert able.can(Kind.VCPU, Op.UNPLUG)
        assert able.can(Kind.DIMM, Op.UNPLUG)
        _, _, before = await _seen(guest)
        for vcpus, memory in ((3, 640), (2, 256), (3, 512), (1, 256)):
            assert await vm.resize_vcpu(vcpus) == vcpus
            assert await vm.resize_memory(memory) == memory
            await guest.agent.online_cpu_mem(agent.OnlineCPUMemRequest(wait=True, nb_cpus=vcpus))
            assert len((await vm.get_thread_ids()).vcpus) == vcpus
            number, which, now = await _seen(guest)
            assert (number, which) == (vcpus, f"0-{vcpus - 1}" if vcpus > 1 else "0")
            assert abs(now - before - (memory - 256)) < 20
