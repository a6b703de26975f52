"""How a VM under QEMU is laid out before it starts: its size, what it may grow to, its ports for hot-plug.

What: `first_plan` decides what follows from the configuration, `with_ports` what comes behind the devices
that are cold-plugged.
Why before the start: QEMU wants to know the most vCPUs and memory and all ports when it starts; what is
not announced then can never be plugged.
Invariants: a VM that may not grow gets none of it.
"""

from __future__ import annotations

import dataclasses
import math

from devices.addresses import PciTopology
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.cmdline import MICROVM, VIRTIO_MEM, Plan
from hypervisors.qemu.kvm import Accelerator, host_khz

__all__ = ["HOTPLUG_MACHINES", "first_plan", "with_ports"]

_MEMORY_UNIT = 128  # MiB; a Linux guest's memory block on x86_64
HOTPLUG_MACHINES = ("q35",)
"""On others neither CPUs nor DIMMs nor ports can be plugged."""


def first_plan(
    section: HypervisorConfig, accelerator: Accelerator, sandbox_id: str, version: tuple[int, ...] = ()
) -> Plan:
    """The plan without devices and descriptors."""
    vcpus, memory = max(1, math.ceil(section.default_vcpus)), section.default_memory
    grows = section.machine_type in HOTPLUG_MACHINES
    more_memory = grows and (section.enable_virtio_mem or section.memory_slots > 0)
    room = max(0, section.default_maxmemory - memory) // _MEMORY_UNIT * _MEMORY_UNIT
    return Plan(
        sandbox_id=sandbox_id,
        section=section,
        accelerator=accelerator,
        vcpus=vcpus,
        qmp_fd=-1,
        devices=(),
        max_vcpus=max(vcpus, section.default_maxvcpus) if grows else vcpus,
        max_memory=memory + room if more_memory else memory,
        version=version,
        tsc_khz=host_khz() if section.machine_type == MICROVM and accelerator is Accelerator.TCG else 0,
    )


def with_ports(plan: Plan, topology: PciTopology) -> Plan:
    """Take the slots of ports, bridges and virtio-mem. Raises HypervisorError when there are too many."""
    section = plan.section
    if section.machine_type not in HOTPLUG_MACHINES:
        return plan
    topology.kept_for_vfio = section.hot_plug_vfio
    topology.add_root_ports(section.pcie_root_port)
    topology.add_switch(section.pcie_switch_port)
    topology.add_bridges(section.default_bridges)
    grows = plan.max_memory > section.default_memory
    virtio_mem = topology.allocate(VIRTIO_MEM) if grows and section.enable_virtio_mem else None
    return dataclasses.replace(plan, ports=topology.ports, virtio_mem=virtio_mem)
