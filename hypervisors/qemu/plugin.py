"""QEMU as a plugin: schema, defaults, checks, factory.

What: `plugin`, the object that the entry point names.
Invariants: `adjust_config` is idempotent; `validate_config` names the key, the value and the file it
looked at; `check` never raises.
"""

from __future__ import annotations

import dataclasses
import os
import shutil

from devices.errors import ConfigError, HostError
from devices.share_fs import find_virtiofsd
from devices.undo import UndoLog
from devices.vsock_daemon import find_vsock_daemon
from hypervisors.base import Capabilities, CheckResult
from hypervisors.checks import found, on_path
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.abilities import MOST, why_not_restored
from hypervisors.qemu.cmdline import MICROVM, PMEM_DRIVER
from hypervisors.qemu.kvm import choose_accelerator
from hypervisors.qemu.vmm import VHOST_VSOCK, Qemu
from hypervisors.rules import (
    adjust_sandbox_section,
    check_power,
    check_program,
    check_sandbox_section,
    check_users,
    check_word,
    wrong,
)

__all__ = ["QemuPlugin", "plugin"]

_PROGRAM = "qemu-system-x86_64"
_MAX_VCPUS = 240  # as in Kata; APIC ids that need no interrupt remapping
_MOST = {  # QEMU's own limit of DIMMs; Kata's of ports and bridges
    "memory_slots": 256,
    "pcie_root_port": 16,
    "pcie_switch_port": 16,
    "default_bridges": 5,
}
_MAX_QUEUES = 256
_MAX_SWAP = 1000  # percent of the memory
_MAX_RATE = 10**15  # QEMU's own
_MACHINES = ("q35", MICROVM)
_COLD_PORTS = ("no-port", "root-port", "switch-port")
_HOT_PORTS = {  # and how many of each there are
    "no-port": "",
    "root-port": "pcie_root_port",
    "switch-port": "pcie_switch_port",
    "bridge-port": "default_bridges",
}


class QemuPlugin:
    """See `hypervisors.base.HypervisorPlugin`."""

    name = "qemu"
    section = HypervisorConfig
    seen_with = ("7.2.22", "10.0.13", "11.1.3")  # Debian 12, 13 and sid: docs/hosts.md
    capabilities = Capabilities(
        devices=MOST, hybrid_vsock=True, pause=True, snapshot=True, restore=True, adopt=True
    )

    def adjust_config(self, section: HypervisorConfig) -> HypervisorConfig:
        """Kata's meanings of "", 0 and of values beyond this host."""
        return dataclasses.replace(
            adjust_sandbox_section(section, max_vcpus=_MAX_VCPUS),
            path=section.path or shutil.which(_PROGRAM) or f"/usr/bin/{_PROGRAM}",
            machine_type=section.machine_type or "q35",
            cold_plug_vfio=section.cold_plug_vfio or "no-port",
            hot_plug_vfio=section.hot_plug_vfio or "no-port",
            block_device_driver=section.block_device_driver or _blk(section),
            block_device_aio=section.block_device_aio or "threads",
            vm_rootfs_driver=section.vm_rootfs_driver or _blk(section),
        )

    def validate_config(self, section: HypervisorConfig) -> None:
        """Raise ConfigError for what cannot work."""
        check_program(self.name, "path", section.path, "install QEMU (Debian: qemu-system-x86)")
        check_sandbox_section(self.name, section)
        check_word(self.name, "machine_type", section.machine_type, _MACHINES)
        check_word(self.name, "accelerator", section.accelerator, ("auto", "kvm", "tcg"))
        check_users(self.name, section.rootless_users)
        for key, most in _MOST.items():
            value = getattr(section, key)
            if not 0 <= value <= most:
                raise wrong(self.name, key, value, f"is not in 0..{most}")
        for key in ("pcie_root_port", "cold_plug_vfio", "hot_plug_vfio", "enable_iommu"):
            value = getattr(section, key)
            if section.machine_type == MICROVM and value not in (0, False, "no-port"):
                raise wrong(self.name, key, value, f"needs PCI, which {MICROVM} lacks")
        check_word(self.name, "cold_plug_vfio", section.cold_plug_vfio, _COLD_PORTS)
        check_word(self.name, "hot_plug_vfio", section.hot_plug_vfio, tuple(_HOT_PORTS))
        needs = _HOT_PORTS[section.hot_plug_vfio]
        if section.sev_snp_guest and not section.confidential_guest:
            raise wrong(self.name, "sev_snp_guest", "true", "needs confidential_guest = true")
        if section.confidential_guest:
            self._check_protection(section)
        passes = (section.cold_plug_vfio, section.hot_plug_vfio) != ("no-port", "no-port")
        if passes and section.enable_iommu and section.enable_virtio_mem:
            # QEMU warns that such a guest can have more pinned than it has, and was seen not to answer for
            # 20 seconds while it grew.
            why = "does not go with devices of VFIO and enable_iommu; memory can grow by DIMMs (memory_slots)"
            raise wrong(self.name, "enable_virtio_mem", "true", why)
        if needs and not getattr(section, needs):
            raise wrong(self.name, "hot_plug_vfio", section.hot_plug_vfio, f"needs {needs} to be 1 or more")
        for key in ("boot_to_be_template", "boot_from_template"):
            if getattr(section, key):
                why = "is the factory's to set: enable_template = true in [hypervisor.qemu.factory]"
                raise wrong(self.name, key, "true", why)
        _check_disks(self.name, section)

    def why_no_template(self, section: HypervisorConfig) -> str:
        """See `hypervisors.base.TemplatePlugin`."""
        return why_not_restored(section)

    def _check_protection(self, section: HypervisorConfig) -> None:
        from devices.protection import choose, probe

        if section.machine_type == MICROVM:
            raise wrong(self.name, "confidential_guest", "true", f"needs a machine other than {MICROVM}")
        try:
            choose(
                snp=section.sev_snp_guest,
                policy=section.snp_guest_policy,
                quote_port=section.tdx_quote_generation_service_socket_port,
                found=probe(),
            )
        except HostError as error:
            raise ConfigError(
                error.cause, key="confidential_guest", phase="config", hint=error.hint, code=error.code
            ) from error

    def check(self) -> list[CheckResult]:
        """Programs and devices that a QEMU sandbox needs on this host."""
        results = [on_path("qemu", _PROGRAM, "install qemu-system-x86")]
        choice = choose_accelerator("auto")
        reason = f": {choice.reason}" if choice.reason else ""
        results.append(CheckResult("accelerator", True, f"{choice.accelerator.value}{reason}"))
        if os.path.exists(VHOST_VSOCK):
            results.append(CheckResult("vsock", True, VHOST_VSOCK))
        else:
            results.append(found("vsock", find_vsock_daemon))
        results.append(found("virtiofsd", find_virtiofsd))
        results.append(CheckResult("confidential", True, _confidential()))
        return results

    def create(self, section: HypervisorConfig, *, sandbox_id: str, state_dir: str, undo: UndoLog) -> Qemu:
        """A VM that does not run yet."""
        return Qemu(section, sandbox_id=sandbox_id, state_dir=state_dir, undo=undo)


def _blk(section: HypervisorConfig) -> str:
    return "virtio-blk-mmio" if section.machine_type == MICROVM else "virtio-blk-pci"


def _check_disks(name: str, section: HypervisorConfig) -> None:
    """How disks are served. Raises ConfigError."""
    # The image is the guest's /dev/vda (`hypervisors.qemu.cmdline`): it is nothing else.
    check_word(name, "vm_rootfs_driver", section.vm_rootfs_driver, (_blk(section),))
    drivers: tuple[str, ...] = (_blk(section),)
    if section.machine_type != MICROVM:
        drivers += ("virtio-scsi", PMEM_DRIVER)
    check_word(name, "block_device_driver", section.block_device_driver, drivers)
    check_word(name, "block_device_aio", section.block_device_aio, ("threads", "native", "io_uring"))
    direct = section.block_device_cache_set and section.block_device_cache_direct
    if section.block_device_aio == "native" and not direct:
        why = "needs block_device_cache_set and block_device_cache_direct, both true"
        raise wrong(name, "block_device_aio", section.block_device_aio, why)
    for key, least, most in (
        ("queue_size", 2, 1024),
        ("block_device_logical_sector_size", 512, 65536),
        ("block_device_physical_sector_size", 512, 65536),
    ):
        value = getattr(section, key)
        if value:
            check_power(name, key, value, least, most)
    logical, physical = section.block_device_logical_sector_size, section.block_device_physical_sector_size
    if physical and physical < logical:
        raise wrong(
            name, "block_device_physical_sector_size", physical, f"is less than the logical {logical}"
        )
    if not 1 <= section.num_queues <= _MAX_QUEUES:
        raise wrong(name, "num_queues", section.num_queues, f"is not in 1..{_MAX_QUEUES}")
    if section.enable_guest_swap:
        percent = section.guest_swap_size_percent
        if section.machine_type == MICROVM:
            raise wrong(name, "enable_guest_swap", "true", f"needs hot-plug, which {MICROVM} lacks")
        if not section.guest_swap_path.startswith("/"):
            raise wrong(name, "guest_swap_path", section.guest_swap_path, "is no absolute path")
        if not 1 <= percent <= _MAX_SWAP:
            raise wrong(name, "guest_swap_size_percent", percent, f"is not in 1..{_MAX_SWAP}")
    for key in ("bw_max_rate", "bw_one_time_burst", "ops_max_rate", "ops_one_time_burst"):
        rate = getattr(section, f"disk_rate_limiter_{key}")
        if not 0 <= rate <= _MAX_RATE:
            raise wrong(name, f"disk_rate_limiter_{key}", rate, f"is not in 0..{_MAX_RATE}")


def _confidential() -> str:
    """Which confidential guests this host can have; none is no fault."""
    from devices.protection import NAMES, probe

    found = probe()
    have = [NAMES[name] for name, reason in found.items() if not reason]
    if have:
        return ", ".join(have)
    return f"no confidential guests: {'; '.join(dict.fromkeys(found.values()))}"


plugin = QemuPlugin()
