"""From a configuration to QEMU's arguments: pure functions, nothing is opened or probed here.

What: `arguments` gives argv (without the program), `kernel_command_line` the guest kernel's.
Why apart: golden tests hold every argument, and the bench boots a bare QEMU with the very same.
Invariants: nothing that came from outside is ever put into a comma-separated option: paths go as
JSON or as arguments of their own; ids are ours. Each PCI device and port has a fixed slot, so its guest
path is known before the start; on a microvm each device has a virtio-mmio transport of its own. What a
device is to QEMU: `hypervisors.qemu.recipes`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from devices.addresses import Place, Port
from devices.config import ConsoleConfig, PortConfig, ProtectionConfig, VfioConfig
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.kvm import Accelerator
from hypervisors.qemu.recipes import (
    IO_THREAD,
    Placed,
    argv,
    protection_object,
    recipe,
    reopened,
    scsi_controller,
)
from hypervisors.rules import guest_words

__all__ = ["MICROVM", "PMEM_DRIVER", "VIRTIO_MEM", "Plan", "arguments", "kernel_command_line"]

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
VIRTIO_MEM = "virtio-mem0"
"""Id of the VM's one virtio-mem device."""
MICROVM = "microvm"
"""The machine type without PCI: devices on virtio-mmio, no hot-plug, less to probe at boot."""
PMEM_DRIVER = "virtio-pmem"
"""The block_device_driver that makes disks memory of the guest: Kata's word for it, an NVDIMM with QEMU."""
_MEMORY_ID = "mem0"
_MONITOR_OBJECTS = (11, 1)  # since when -mon is deprecated


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that argv depends on. `qmp_fd` is a listening unix socket.

    `max_vcpus`, `max_memory` (MiB): what the VM can grow to; not more than it starts with means that it
    cannot. `virtio_mem`: its PCI slot, if memory grows so. `ports`: what opens PCI buses for hot-plug.
    `scsi`: where the SCSI controller sits, if disks behind it are there from the start.
    `version`: QEMU's, () if it is not known.
    `memory`: the descriptor of the file that the guest's memory is, -1 for memory of QEMU's own.
    `tsc_khz`: the host's clock, for a microvm under TCG, which hangs now and then while it measures it
    (facts/guest-vm.md); else 0.
    """

    sandbox_id: str
    section: HypervisorConfig
    accelerator: Accelerator
    vcpus: int
    qmp_fd: int
    devices: Sequence[Placed]
    home_port: int = 0
    max_vcpus: int = 0
    max_memory: int = 0
    virtio_mem: Place | None = None
    ports: Sequence[Port] = ()
    tsc_khz: int = 0
    scsi: Place | None = None
    version: tuple[int, ...] = ()
    memory: int = -1

    @property
    def all_vcpus_at_start(self) -> bool:
        """Whether the VM has all its vCPUs from the start, and the guest keeps those offline that nobody has
        asked for yet.

        So it is under TCG. Guests of Linux 6.12.y and later count what may be plugged only under a hypervisor
        that they recognise, and TCG is none; QEMU reports success all the same. And QEMU 7.2 corrupts its
        heap when a vCPU is unplugged there, 10.0 when more come over a VM's life than it began room for.
        """
        return self.accelerator is Accelerator.TCG and self.max_vcpus > self.vcpus

    @property
    def microvm(self) -> bool:
        """Whether the devices are on virtio-mmio."""
        return self.section.machine_type == MICROVM


def kernel_command_line(plan: Plan) -> str:
    """The guest kernel's parameters; the configuration's come last, so that they win.

    cryptomgr.notests saves 0.3 s of boot; swiotlb=noforce 65 MB and 0.5 s (facts/guest-vm.md).
    no_timer_check: the check counts ticks while the guest spins, and a guest under TCG on a busy host gets
    too few in that time: "IO-APIC + timer doesn't work", a panic. As Kata does.
    reboot=t with panic=-1 and QEMU's -no-reboot: a panic ends the VM at once. Memory that is plugged is
    used at once, three quarters of it movable at most: so it can be taken away again, and yet a VM that
    grew a lot has memory for the kernel's own tables.
    """
    section = plan.section
    words = ["reboot=t", "panic=-1", "cryptomgr.notests", "swiotlb=noforce", "no_timer_check"]
    if _protection(plan) is not None:
        words.remove("swiotlb=noforce")  # the pages that such a guest shares with the host
    if any(isinstance(placed.device, ConsoleConfig) for placed in plan.devices):
        words.insert(0, "console=ttyS0")
    if not section.enable_debug:
        words.append("quiet")
    if plan.max_memory > section.default_memory:
        words += ["memhp_default_state=online", "memory_hotplug.online_policy=auto-movable"]
    if plan.all_vcpus_at_start:
        words.append(f"maxcpus={plan.vcpus}")
    if section.enable_iommu:
        words += ["intel_iommu=on", "iommu=pt"]
    words += [
        f"agent.port={placed.device.name}" for placed in plan.devices if isinstance(placed.device, PortConfig)
    ]
    words += guest_words(section.image, section.rootfs_type, plan.home_port)
    if plan.tsc_khz:
        words += [f"tsc_early_khz={plan.tsc_khz}", "tsc=reliable"]
    if section.kernel_params:
        words.append(section.kernel_params)
    return " ".join(words)


def arguments(plan: Plan) -> list[str]:
    """argv[1:] of QEMU."""
    section = plan.section
    words = ["-name", f"sandbox-{plan.sandbox_id},debug-threads=on"]
    words += ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
    if not section.disable_seccomp:
        words += ["-sandbox", section.seccomp_sandbox or SANDBOX]
    words += ["-machine", _machine(plan), "-cpu", _cpu(plan)]
    words += ["-smp", _smp(plan), "-m", _memory(plan)]
    words += ["-object", _memory_backend(plan)]
    if (protection := _protection(plan)) is not None:
        words += ["-object", json.dumps(protection_object(protection))]
    if section.firmware:
        words += ["-bios", section.firmware]
    if section.boot_from_template:
        words += ["-incoming", "defer"]  # what to take x-ignore-shared for has to be told before
    else:
        words += ["-kernel", section.kernel]
        if section.initrd:
            words += ["-initrd", section.initrd]
        words += ["-append", kernel_command_line(plan)]
    words += ["-chardev", f"socket,id=qmp,fd={plan.qmp_fd},server=on,wait=off"]
    if plan.version >= _MONITOR_OBJECTS:
        words += ["-object", "monitor-qmp,id=control,chardev=qmp"]
    else:
        words += ["-mon", "chardev=qmp,mode=control"]
    words += ["-rtc", "base=utc,clock=host"]
    if plan.microvm:
        words += ["-global", "virtio-mmio.force-legacy=false"]  # vhost-user devices need virtio 1.0
    if section.enable_iommu:  # before what it translates for; caching-mode: VFIO has to hear of each mapping
        words += ["-device", "intel-iommu,intremap=on,device-iotlb=on,caching-mode=on"]
    behind_ports = [placed for placed in plan.devices if isinstance(placed.device, VfioConfig)]
    if section.enable_iothreads:
        words += ["-object", f"iothread,id={IO_THREAD}"]
    if plan.scsi is not None:
        controller = scsi_controller(plan.scsi.properties, io_thread=section.enable_iothreads)
        words += ["-device", json.dumps(controller)]
    for placed in plan.devices:
        if placed not in behind_ports and not isinstance(placed.device, ProtectionConfig):
            words += _device(placed, plan.microvm)
    for chassis, port in enumerate(plan.ports, 1):
        words += ["-device", _port(port, chassis)]
    for placed in behind_ports:
        words += _device(placed, plan.microvm)
    if plan.virtio_mem is not None:
        words += _virtio_mem(plan, plan.virtio_mem)
    return words


def _memory_backend(plan: Plan) -> str:
    """Shared, because vhost-user daemons map it; a memfd, because /dev/shm may be small. A template's is a
    file, which those that begin with it map privately: what they write is their own."""
    size = f"id={_MEMORY_ID},size={plan.section.default_memory}M"
    if plan.memory < 0:
        return f"memory-backend-memfd,{size},share=on"
    share = "off" if plan.section.boot_from_template else "on"
    return f"memory-backend-file,{size},share={share},mem-path={reopened(plan.memory)}"


def _protection(plan: Plan) -> ProtectionConfig | None:
    devices = (placed.device for placed in plan.devices)
    return next((device for device in devices if isinstance(device, ProtectionConfig)), None)


def _smp(plan: Plan) -> str:
    if plan.all_vcpus_at_start:
        return str(plan.max_vcpus)
    return f"{plan.vcpus},maxcpus={plan.max_vcpus}" if plan.max_vcpus > plan.vcpus else str(plan.vcpus)


def _memory(plan: Plan) -> str:
    size = f"{plan.section.default_memory}M"
    if plan.max_memory <= plan.section.default_memory:
        return size
    slots = "" if plan.virtio_mem else f",slots={plan.section.memory_slots}"
    return f"{size}{slots},maxmem={plan.max_memory}M"


def _virtio_mem(plan: Plan, place: Place) -> list[str]:
    """All that the VM may ever get, none of it yet; nothing of it is allocated or reserved on the host."""
    size = plan.max_memory - plan.section.default_memory
    at = f"bus={place.bus},addr={place.slot:#x}"
    return [
        "-object",
        f"memory-backend-memfd,id=mem-{VIRTIO_MEM},size={size}M,share=on,reserve=off",
        "-device",
        f"virtio-mem-pci,id={VIRTIO_MEM},memdev=mem-{VIRTIO_MEM},requested-size=0,{at}",
    ]


def _port(port: Port, chassis: int) -> str:
    at = f"id={port.name},bus={port.place.bus},addr={port.place.slot:#x}"
    match port.kind:
        case "root-port":
            return f"pcie-root-port,{at},chassis={chassis},slot={chassis}"
        case "switch-upstream":
            return f"x3130-upstream,{at}"
        case "switch-downstream":
            return f"xio3130-downstream,{at},chassis={chassis},slot={chassis}"
        case _:
            # Without a reserve the bridge opens no window, and what is plugged later has no room in it.
            room = "io-reserve=4k,mem-reserve=1m,pref64-reserve=1m"
            return f"pci-bridge,{at},chassis_nr={chassis},shpc=off,{room}"


def _machine(plan: Plan) -> str:
    parts = [plan.section.machine_type, f"accel={plan.accelerator.value}"]
    if plan.microvm:
        parts.append("pic=off,rtc=on")
    protection = _protection(plan)
    if plan.section.enable_iommu or (protection and protection.technology in ("snp", "tdx")):
        parts.append("kernel_irqchip=split")  # the IOMMU remaps interrupts; the others leave KVM no choice
    if plan.section.block_device_driver == PMEM_DRIVER and not plan.microvm:
        parts.append("nvdimm=on")
    if protection is not None:
        parts.append(f"confidential-guest-support={protection.id}")
    if plan.section.machine_accelerators:
        parts.append(plan.section.machine_accelerators.strip(","))
    parts.append(f"memory-backend={_MEMORY_ID}")
    return ",".join(parts)


def _cpu(plan: Plan) -> str:
    model = "host" if plan.accelerator is Accelerator.KVM else "max"
    protection = _protection(plan)
    if protection is not None and protection.technology == "snp":
        model = "EPYC-v4"  # its launch digest must not depend on the host
    return ",".join(part for part in (model, plan.section.cpu_features.strip(",")) if part)


def _device(placed: Placed, microvm: bool) -> list[str]:
    device = placed.device
    if isinstance(device, ConsoleConfig):
        listens = ",server=on,wait=off" if placed.path else ""
        chardev = f"socket,id={device.id},fd={placed.fd}{listens}"
        return ["-chardev", chardev, "-serial", f"chardev:{device.id}"]
    return argv(recipe(placed, "device" if microvm else "pci"))
