"""Cloud Hypervisor as a plugin: schema, defaults, checks, factory.

What: `plugin`, the object that the entry point names. Its section is [hypervisor.clh], as in Kata's files.
Invariants: `adjust_config` is idempotent; `validate_config` names key and value; `check` never raises.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil

from devices.errors import HostError
from devices.share_fs import find_virtiofsd
from devices.undo import UndoLog
from hypervisors.base import CheckResult
from hypervisors.cloud_hypervisor.abilities import MOST, vcpus
from hypervisors.cloud_hypervisor.config import ClhConfig
from hypervisors.cloud_hypervisor.vmm import CloudHypervisor
from hypervisors.rules import adjust_sandbox_section, check_program, check_sandbox_section, check_word, wrong

__all__ = ["ClhPlugin", "plugin"]

_PROGRAM = "cloud-hypervisor"
_MAX_VCPUS = 254
_PORTS = ("no-port", "root-port")
_BLK = "virtio-blk-pci"
_LANDLOCK_ABI = 3  # what Cloud Hypervisor asks for: Linux 6.2
_SYS_LANDLOCK_CREATE_RULESET, _VERSION = 444, 1


class ClhPlugin:
    """See `hypervisors.base.HypervisorPlugin`."""

    name = "clh"
    section = ClhConfig
    capabilities = MOST

    def adjust_config(self, section: ClhConfig) -> ClhConfig:
        """Kata's meanings of "", 0 and of values beyond this host. A card or a disk has at most as many
        queues as there are vCPUs at the start, or Cloud Hypervisor refuses it."""
        most = min(section.default_maxvcpus or _MAX_VCPUS, len(os.sched_getaffinity(0)), _MAX_VCPUS)
        host_memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
        adjusted = adjust_sandbox_section(section, max_vcpus=most)
        return dataclasses.replace(
            adjusted,
            path=section.path or shutil.which(_PROGRAM) or f"/usr/bin/{_PROGRAM}",
            vm_rootfs_driver=section.vm_rootfs_driver or _BLK,
            block_device_driver=section.block_device_driver or _BLK,
            cold_plug_vfio=section.cold_plug_vfio or "no-port",
            hot_plug_vfio=section.hot_plug_vfio or "no-port",
            network_queues=min(adjusted.network_queues, vcpus(adjusted)),
            num_queues=section.num_queues or 1,
            queue_size=section.queue_size or 128,
            default_maxvcpus=most,
            default_maxmemory=min(section.default_maxmemory or host_memory, host_memory),
        )

    def validate_config(self, section: ClhConfig) -> None:
        """Raise ConfigError for what cannot work."""
        check_program(self.name, "path", section.path, "install Cloud Hypervisor, or correct the path")
        check_sandbox_section(self.name, section)
        check_word(self.name, "vm_rootfs_driver", section.vm_rootfs_driver, (_BLK,))
        check_word(self.name, "block_device_driver", section.block_device_driver, (_BLK,))
        check_word(self.name, "cold_plug_vfio", section.cold_plug_vfio, _PORTS)
        check_word(self.name, "hot_plug_vfio", section.hot_plug_vfio, _PORTS)
        if not section.hotplug_timeout > 0:
            raise wrong(self.name, "hotplug_timeout", section.hotplug_timeout, "is no number of seconds")
        size = section.queue_size
        if size & (size - 1) or not 4 <= size <= 1024:
            raise wrong(self.name, "queue_size", size, "is no power of two from 4 to 1024")
        if not 1 <= section.num_queues <= _MAX_VCPUS:
            raise wrong(self.name, "num_queues", section.num_queues, f"is not in 1..{_MAX_VCPUS}")
        if section.rootless:
            why = "is not possible: Cloud Hypervisor opens disks by their paths, as root without other rights"
            raise wrong(self.name, "rootless", "true", why, "rootless = false")
        if section.landlock and landlock_abi() < _LANDLOCK_ABI:
            why = f"needs Landlock {_LANDLOCK_ABI} (Linux 6.2); this kernel has {landlock_abi() or 'none'}"
            hint = "landlock = false, or boot with landlock among lsm="
            raise wrong(self.name, "landlock", "true", why, hint)

    def check(self) -> list[CheckResult]:
        """Programs and devices that a Cloud Hypervisor sandbox needs on this host."""
        path = shutil.which(_PROGRAM) or ""
        kvm = os.access("/dev/kvm", os.R_OK | os.W_OK)
        hint = "install a release of Cloud Hypervisor, or set [hypervisor.clh] path"
        no_kvm = "modprobe kvm_intel or kvm_amd"
        try:
            daemon = CheckResult("virtiofsd", True, find_virtiofsd())
        except HostError as error:
            daemon = CheckResult("virtiofsd", False, error.cause, error.hint)
        return [
            CheckResult(_PROGRAM, bool(path), path or f"{_PROGRAM} is not on PATH", hint),
            CheckResult("kvm", kvm, "/dev/kvm" if kvm else "/dev/kvm cannot be opened", no_kvm),
            daemon,
        ]

    def create(
        self, section: ClhConfig, *, sandbox_id: str, state_dir: str, undo: UndoLog
    ) -> CloudHypervisor:
        """A VM that does not run yet."""
        return CloudHypervisor(section, sandbox_id=sandbox_id, state_dir=state_dir, undo=undo)


def landlock_abi() -> int:
    """Which Landlock this kernel has; 0 for none."""
    libc = ctypes.CDLL(None, use_errno=True)
    return max(0, int(libc.syscall(_SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)))


plugin = ClhPlugin()
