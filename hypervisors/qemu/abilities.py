"""What a VM under QEMU can do with each kind of device, and why not what it cannot.

What: `abilities` answers for one VM, `MOST` for the plugin: the most that any of its VMs can.
Invariants: a function of configuration and accelerator alone; the reasons are what a user reads, in errors
and in docs/devices.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from devices.kinds import YES, Kind, Support
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.cmdline import MICROVM, PMEM_DRIVER, Plan
from hypervisors.qemu.kvm import Accelerator
from hypervisors.qemu.plan import HOTPLUG_MACHINES

__all__ = ["MOST", "TCG_KEEPS_VCPUS", "abilities", "why_not_restored"]

_AT_START = "it is part of the VM from its start"
_NO_PORT = "no port or bridge is configured (pcie_root_port, pcie_switch_port, default_bridges)"
_NO_PCI = f"a {MICROVM} has no PCI, and nothing is plugged while it runs"
TCG_KEEPS_VCPUS = "under TCG what the guest has brought online stays"
_STAYS = Support(cold=YES, hot=_AT_START, unplug=_AT_START)

_PMEM = Support(
    cold=YES, hot=YES, unplug="QEMU 7.2 cannot unplug an nvdimm", resize="an nvdimm has its size for good"
)

MOST: Mapping[Kind, Support] = {
    Kind.BLK: Support(cold=YES, hot=YES, unplug=YES, resize=YES),
    Kind.SCSI: Support(cold=YES, hot=YES, unplug=YES, resize=YES),
    Kind.PMEM: _PMEM,
    Kind.NET: Support(cold=YES, hot=YES, unplug=YES),
    Kind.VFIO: Support(cold=YES, hot=YES, unplug=YES),
    Kind.SHARE_FS: Support(cold=YES, hot=YES, unplug=YES),
    Kind.VHOST_USER_BLK: Support(cold=YES, hot=YES, unplug=YES, resize="its back end decides its size"),
    Kind.VHOST_USER_NET: Support(cold=YES, hot=YES, unplug=YES),
    Kind.PROTECTION: Support(cold=YES),
    Kind.VSOCK: _STAYS,
    Kind.PORT: _STAYS,
    Kind.RNG: _STAYS,
    Kind.BALLOON: _STAYS,
    Kind.CONSOLE: _STAYS,
    Kind.VCPU: Support(cold=YES, hot=YES, unplug=YES),
    Kind.DIMM: Support(hot=YES, unplug=YES),
    Kind.VIRTIO_MEM: Support(hot=YES, unplug=YES),
}


def abilities(section: HypervisorConfig, plan: Plan) -> dict[Kind, Support]:
    """Of the VM with this section, which is planned like this."""
    able = dict(MOST)
    hot = _why_no_hotplug(section)
    for kind in (Kind.BLK, Kind.NET, Kind.SHARE_FS, Kind.VHOST_USER_BLK, Kind.VHOST_USER_NET):
        able[kind] = _unless(hot, able[kind])
    able[Kind.VFIO] = _vfio(section)
    able[Kind.SCSI] = _unless(hot, able[Kind.SCSI]) if section.machine_type != MICROVM else _all(_NO_PCI)
    able[Kind.PMEM] = _pmem(section, plan)
    if not section.confidential_guest:
        able[Kind.PROTECTION] = Support(cold="confidential_guest is false")
    if section.shared_fs == "none":
        able[Kind.SHARE_FS] = Support(*['shared_fs = "none"'] * 3)
    if section.machine_type == MICROVM:
        able[Kind.PORT] = _all(_NO_PCI)
    able[Kind.VCPU] = _vcpus(plan, able[Kind.VCPU])
    able[Kind.DIMM], able[Kind.VIRTIO_MEM] = _memory(section, plan)
    return able


def why_not_restored(section: HypervisorConfig) -> str:
    """Why a VM cannot begin with one that was saved, "" if it can. What vhost-user devices do with private
    memory hangs; the rest has a state that is the host's, or gives memory back that is not its own."""
    if section.machine_type not in HOTPLUG_MACHINES:
        return f"{_NO_PCI}, and its disks and cards come afterwards"
    reasons = {
        'shared_fs is not "none", and virtio-fs is served by a daemon that does not see its private memory': (
            section.shared_fs != "none"
        ),
        "confidential_guest: the host cannot read its memory": section.confidential_guest,
        'cold_plug_vfio is not "no-port", and a device of the host has a state there': (
            section.cold_plug_vfio != "no-port"
        ),
        "enable_iommu: devices of VFIO would follow": section.enable_iommu,
        "reclaim_guest_freed_memory: what its memory begins with is not its own to give back": (
            section.reclaim_guest_freed_memory
        ),
        "rootless is false, and QEMU would own the memory that others begin with": not section.rootless,
        _NO_PORT: bool(_why_no_hotplug(section)),
    }
    return next((reason for reason, holds in reasons.items() if holds), YES)


def _why_no_hotplug(section: HypervisorConfig) -> str:
    if section.machine_type not in HOTPLUG_MACHINES:
        return _NO_PCI
    ports = section.pcie_root_port + section.pcie_switch_port + section.default_bridges
    return YES if ports else _NO_PORT


def _unless(reason: str, support: Support) -> Support:
    """The same, but what happens while the VM runs is refused if there is a reason."""
    return Support(cold=support.cold, hot=reason, unplug=reason, resize=support.resize) if reason else support


def _vfio(section: HypervisorConfig) -> Support:
    """An administrator says whether the host's devices go to guests, by saying where."""
    if section.machine_type not in HOTPLUG_MACHINES:
        return Support(*[f"a {MICROVM} has no PCI"] * 3)
    cold, hot = (
        f'{key} = "no-port"' if getattr(section, key) == "no-port" else YES
        for key in ("cold_plug_vfio", "hot_plug_vfio")
    )
    return Support(cold=cold, hot=hot, unplug=hot)


def _all(reason: str) -> Support:
    return Support(cold=reason, hot=reason, unplug=reason, resize=reason)


def _pmem(section: HypervisorConfig, plan: Plan) -> Support:
    """A disk as memory takes one of the slots for memory, and a part of the room for it."""
    if section.machine_type not in HOTPLUG_MACHINES:
        return _all(f"a {MICROVM} has no slots for memory")
    if section.block_device_driver != PMEM_DRIVER:
        return _all(f'block_device_driver is not "{PMEM_DRIVER}"')
    if section.enable_virtio_mem:
        return _all("virtio-mem takes all the room for memory (enable_virtio_mem)")
    if plan.max_memory <= section.default_memory:
        return _all("there is no room for memory (default_maxmemory, memory_slots)")
    return _PMEM


def _vcpus(plan: Plan, most: Support) -> Support:
    if plan.section.machine_type not in HOTPLUG_MACHINES:
        return _unless(_NO_PCI, most)
    if plan.max_vcpus <= plan.vcpus:
        return _unless("the VM has as many as it can have (default_maxvcpus)", most)
    if plan.accelerator is Accelerator.TCG:
        return Support(cold=YES, hot=YES, unplug=TCG_KEEPS_VCPUS)
    return most


def _memory(section: HypervisorConfig, plan: Plan) -> tuple[Support, Support]:
    if section.machine_type not in HOTPLUG_MACHINES:
        refused = Support(hot=_NO_PCI, unplug=_NO_PCI)
        return refused, refused
    if plan.max_memory <= section.default_memory:
        why = "the VM has as much as it can have (default_maxmemory, memory_slots)"
        return Support(hot=why, unplug=why), Support(hot=why, unplug=why)
    if section.enable_virtio_mem:
        why = "memory grows by virtio-mem (enable_virtio_mem)"
        return Support(hot=why, unplug=why), MOST[Kind.VIRTIO_MEM]
    why = "enable_virtio_mem is false"
    return MOST[Kind.DIMM], Support(hot=why, unplug=why)
