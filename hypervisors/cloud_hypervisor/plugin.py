"""Cloud Hypervisor as a plugin: schema, defaults, checks, factory.

What: `plugin`, the object that the entry point names. Its section is [hypervisor.clh], as in Kata's files.
Invariants: `adjust_config` is idempotent; `validate_config` names key and value; `check` never raises.
"""

from __future__ import annotations

import ctypes
import dataclasses
import shutil

from devices.share_fs import find_virtiofsd
from devices.undo import UndoLog
from hypervisors.base import CheckResult
from hypervisors.checks import found, kvm, on_path
from hypervisors.cloud_hypervisor.abilities import MOST, vcpus
from hypervisors.cloud_hypervisor.config import ClhConfig
from hypervisors.cloud_hypervisor.vmm import CloudHypervisor
from hypervisors.rules import (
    adjust_sandbox_section,
    check_power,
    check_program,
    check_sandbox_section,
    check_word,
    wrong,
)

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
    seen_with = ("53.0",)

    def adjust_config(self, section: ClhConfig) -> ClhConfig:
        """Kata's meanings of "", 0 and of values beyond this host. A card or a disk has at most as many
        queues as there are vCPUs at the start, or Cloud Hypervisor refuses it."""
        adjusted = adjust_sandbox_section(section, max_vcpus=_MAX_VCPUS)
        return dataclasses.replace(
            adjusted,
            path=section.path or shutil.which(_PROGRAM) or f"/usr/bin/{_PROGRAM}",
            vm_rootfs_driver=section.vm_rootfs_driver or _BLK,
            block_device_driver=section.block_device_driver or _BLK,
            cold_plug_vfio=section.cold_plug_vfio or "no-port",
            hot_plug_vfio=section.hot_plug_vfio or "no-port",
            network_queues=min(adjusted.network_queues, vcpus(adjusted)),
        )

    def validate_config(self, section: ClhConfig) -> None:
        """Raise ConfigError for what cannot work."""
        check_program(self.name, "path", section.path, "install Cloud Hypervisor, or correct the path")
        check_sandbox_section(self.name, section)
        check_word(self.name, "vm_rootfs_driver", section.vm_rootfs_driver, (_BLK,))
        check_word(self.name, "block_device_driver", section.block_device_driver, (_BLK,))
        check_word(self.name, "cold_plug_vfio", section.cold_plug_vfio, _PORTS)
        check_word(self.name, "hot_plug_vfio", section.hot_plug_vfio, _PORTS)
        check_power(self.name, "queue_size", section.queue_size, 4, 1024)
        if not 1 <= section.num_queues <= _MAX_VCPUS:
            raise wrong(self.name, "num_queues", section.num_queues, f"is not in 1..{_MAX_VCPUS}")
        passes = (section.cold_plug_vfio, section.hot_plug_vfio) != ("no-port", "no-port")
        if passes and section.enable_virtio_mem:
            # Seen: what virtio-mem brought could not be mapped for the devices, and the guest got none of it.
            why = "does not go with devices of VFIO; memory can grow by DIMMs"
            raise wrong(self.name, "enable_virtio_mem", "true", why)
        if section.rootless:
            why = "is not possible: Cloud Hypervisor opens disks by their paths, as root without other rights"
            raise wrong(self.name, "rootless", "true", why, "rootless = false")
        if section.landlock and landlock_abi() < _LANDLOCK_ABI:
            why = f"needs Landlock {_LANDLOCK_ABI} (Linux 6.2); this kernel has {landlock_abi() or 'none'}"
            hint = "landlock = false, or boot with landlock among lsm="
            raise wrong(self.name, "landlock", "true", why, hint)

    def check(self) -> list[CheckResult]:
        """Programs and devices that a Cloud Hypervisor sandbox needs on this host."""
        hint = "install a release of Cloud Hypervisor, or set [hypervisor.clh] path"
        return [on_path(self.name, _PROGRAM, hint), kvm(), found("virtiofsd", find_virtiofsd)]

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
