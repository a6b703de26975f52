"""Devices of VFIO under QEMU: what argv and QMP say of them, where they sit, and what has to be so before."""

from __future__ import annotations

import dataclasses
import itertools
import json
import resource
from pathlib import Path
from typing import Any

import pytest

from devices.addresses import PciTopology
from devices.config import VfioConfig
from devices.errors import BugError, ConfigError, HostError, UnsupportedByHypervisor
from devices.kinds import Kind, Op
from devices.undo import MemoryUndo
from hypervisors.config import HypervisorConfig
from hypervisors.qemu import vfio
from hypervisors.qemu.abilities import abilities
from hypervisors.qemu.cmdline import arguments, kernel_command_line
from hypervisors.qemu.kvm import Accelerator
from hypervisors.qemu.plan import first_plan, with_ports
from hypervisors.qemu.plugin import plugin
from hypervisors.qemu.recipes import Placed, recipe

GPU = VfioConfig(id="gpu", address="0000:65:00.0")
SECTION = HypervisorConfig(path="/bin/true", kernel="/k", image="/i", default_memory=256)


def options(argv: list[str], option: str) -> list[str]:
    return [word for name, word in itertools.pairwise(argv) if name == option]


def test_a_function_is_its_address_and_with_iommufd_a_context_of_its_own() -> None:
    made = recipe(Placed(device=GPU, at={"bus": "rp0", "addr": "0x0"}))
    assert made.front == {
        "driver": "vfio-pci", "host": "0000:65:00.0", "id": "gpu", "bus": "rp0", "addr": "0x0",
    }  # fmt: skip
    assert made.back_ends == ()
    made = recipe(Placed(device=dataclasses.replace(GPU, iommufd=True)))
    assert made.front["iommufd"] == "iommufd-gpu"
    (context,) = made.back_ends
    assert (context.option, context.properties) == ("object", {"qom-type": "iommufd", "id": "iommufd-gpu"})


@pytest.mark.parametrize(
    "wrong", [{"address": "65:00.0"}, {"address": "0000:65:00.0,x=y"}, {"port": "no-port"}, {"id": "a,b"}]
)
def test_nothing_else_gets_into_qemus_syntax(wrong: dict[str, str]) -> None:
    with pytest.raises(BugError):
        dataclasses.replace(GPU, **wrong)  # type: ignore[arg-type]


def test_ports_come_before_what_sits_behind_them_and_the_iommu_before_all() -> None:
    section = dataclasses.replace(SECTION, enable_iommu=True, pcie_root_port=1, default_bridges=0)
    topology = PciTopology()
    place = topology.open_port("gpu", "root-port")
    plan = first_plan(section, Accelerator.KVM, "s")
    plan = dataclasses.replace(plan, devices=[Placed(device=GPU, at=place.properties)])
    argv = arguments(with_ports(plan, topology))

    assert "kernel_irqchip=split" in options(argv, "-machine")[0].split(",")
    iommu, own, later, gpu = options(argv, "-device")
    assert iommu == "intel-iommu,intremap=on,device-iotlb=on,caching-mode=on"
    assert own == "pcie-root-port,id=cp0,bus=pcie.0,addr=0x1,chassis=1,slot=1"
    assert later == "pcie-root-port,id=rp0,bus=pcie.0,addr=0x2,chassis=2,slot=2"
    assert json.loads(gpu)["bus"] == "cp0"
    assert "intel_iommu=on iommu=pt" in kernel_command_line(plan)
    assert "iommu" not in kernel_command_line(dataclasses.replace(plan, section=SECTION))


def test_other_devices_leave_the_ports_of_vfio_free() -> None:
    section = dataclasses.replace(SECTION, hot_plug_vfio="root-port", pcie_root_port=1)
    topology = PciTopology()
    with_ports(first_plan(section, Accelerator.KVM, "s"), topology)
    assert topology.allocate("disk", hotplug=True).bus == "pci-bridge-0"
    assert topology.allocate("gpu", hotplug=True, behind="root-port").bus == "rp0"


@pytest.mark.parametrize(
    ("changes", "cold", "hot"),
    [
        ({}, 'cold_plug_vfio = "no-port"', 'hot_plug_vfio = "no-port"'),
        ({"cold_plug_vfio": "switch-port"}, "", 'hot_plug_vfio = "no-port"'),
        ({"hot_plug_vfio": "bridge-port"}, 'cold_plug_vfio = "no-port"', ""),
        ({"machine_type": "microvm"}, "a microvm has no PCI", "a microvm has no PCI"),
    ],
)
def test_who_does_not_say_where_gets_none(changes: dict[str, Any], cold: str, hot: str) -> None:
    section = dataclasses.replace(SECTION, **changes)
    able = abilities(section, first_plan(section, Accelerator.KVM, "s"))[Kind.VFIO]
    assert (able.reason(Op.COLD), able.reason(Op.HOT), able.reason(Op.UNPLUG)) == (cold, hot, hot)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cold_plug_vfio": "bridge-port"}, "allowed: no-port, root-port, switch-port"),
        ({"hot_plug_vfio": "port"}, "allowed: no-port, root-port, switch-port, bridge-port"),
        ({"hot_plug_vfio": "root-port"}, "needs pcie_root_port to be 1 or more"),
        ({"hot_plug_vfio": "switch-port"}, "needs pcie_switch_port to be 1 or more"),
        ({"hot_plug_vfio": "bridge-port", "default_bridges": 0}, "needs default_bridges to be 1 or more"),
        ({"machine_type": "microvm", "cold_plug_vfio": "root-port"}, "needs PCI, which microvm lacks"),
        ({"machine_type": "microvm", "enable_iommu": True}, "needs PCI, which microvm lacks"),
        (
            {"cold_plug_vfio": "root-port", "enable_iommu": True, "enable_virtio_mem": True},
            "does not go with devices of VFIO and enable_iommu",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_by_their_key(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "k").write_text("")
    base = dataclasses.replace(
        SECTION, kernel=str(tmp_path / "k"), image=str(tmp_path / "k"), shared_fs="none"
    )
    plugin.validate_config(plugin.adjust_config(base))
    with pytest.raises(ConfigError, match=words) as caught:
        plugin.validate_config(plugin.adjust_config(dataclasses.replace(base, **changes)))
    assert caught.value.key in changes


class FakeQmp:
    def __init__(self, types: list[dict[str, str]]) -> None:
        self.types = types

    async def execute(self, command: str, arguments: dict[str, str]) -> list[dict[str, str]]:
        assert (command, arguments) == ("qom-list-types", {"implements": "iommufd"})
        return self.types


async def admit(tmp_path: Path, *, iommu: bool = True, qmp: FakeQmp | None = None, lists: str = "") -> None:
    (tmp_path / "iommu").touch() if iommu else None
    program = tmp_path / "qemu"
    program.write_text(f"#!/bin/sh\necho 'List of user creatable objects:\n  rng-random\n  {lists}'\n")
    program.chmod(0o755)
    await vfio.admit(
        dataclasses.replace(GPU, iommufd=True),
        program=str(program),
        qmp=qmp,  # type: ignore[arg-type]
        undo=MemoryUndo(),
        iommu=str(tmp_path / "iommu"),
    )


async def test_iommufd_is_asked_of_host_and_qemu(tmp_path: Path) -> None:
    """Before the start by the program's own list, later by QMP; each lack is named."""
    with pytest.raises(HostError, match=r"by iommufd, and this host has no .*/iommu"):
        await admit(tmp_path, iommu=False)
    with pytest.raises(
        UnsupportedByHypervisor, match=r"iommufd, for 0000:65:00\.0: .*/qemu is older than 8\.2"
    ):
        await admit(tmp_path)
    await admit(tmp_path, lists="iommufd")
    with pytest.raises(UnsupportedByHypervisor, match=r"older than 8\.2"):
        await admit(tmp_path, qmp=FakeQmp([]), lists="iommufd")
    await admit(tmp_path, qmp=FakeQmp([{"name": "iommufd"}]))


def test_a_running_qemu_gets_its_limit_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the size of the VM's memory and room for its devices; a limit that cannot be raised is told."""
    limits, privileged = {7: (65536, 65536), 8: (65536, resource.RLIM_INFINITY)}, True

    def prlimit(pid: int, which: int, wanted: tuple[int, int] | None = None) -> tuple[int, int]:
        assert which == resource.RLIMIT_MEMLOCK
        before = limits[pid]
        if wanted is not None:
            if wanted[1] != before[1] and not privileged:
                raise PermissionError
            limits[pid] = wanted
        return before

    monkeypatch.setattr(resource, "prlimit", prlimit)
    needed = (256 << 20) + (1 << 30)
    for pid, hard in ((7, needed), (8, resource.RLIM_INFINITY)):
        vfio.raise_limit(pid, vfio.locked_bytes(256))
        assert limits[pid] == (needed, hard)
        vfio.raise_limit(pid, 4096)  # never lower
        assert limits[pid] == (needed, hard)
    limits[7], privileged = (65536, 65536), False
    with pytest.raises(HostError, match="1280 MiB, and the limit is 0 MiB; try: LimitMEMLOCK=infinity"):
        vfio.raise_limit(7, vfio.locked_bytes(256))
    limits[7] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    vfio.raise_limit(7, vfio.locked_bytes(256))
