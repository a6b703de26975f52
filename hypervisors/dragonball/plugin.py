"""Dragonball as a plugin: schema, defaults, checks, factory.

What: `plugin`, the object that the entry point names. Its section is [hypervisor.dragonball], as in Kata's
files.
Invariants: `adjust_config` is idempotent; `validate_config` names key and value; `check` never raises.
"""

from __future__ import annotations

import dataclasses
import shutil

from devices.undo import UndoLog
from hypervisors.base import CheckResult
from hypervisors.checks import kvm, on_path
from hypervisors.dragonball.abilities import MOST
from hypervisors.dragonball.config import INLINE, DragonballConfig
from hypervisors.dragonball.vmm import Dragonball
from hypervisors.rules import (
    adjust_sandbox_section,
    check_power,
    check_program,
    check_sandbox_section,
    check_word,
    wrong,
)

__all__ = ["DragonballPlugin", "plugin"]

_PROGRAM = "dragonball-process"
_MAX_VCPUS = 32  # that our kernel's tables have
_MMIO, _PCI = "virtio-blk-mmio", "virtio-blk-pci"


class DragonballPlugin:
    """See `hypervisors.base.HypervisorPlugin`."""

    name = "dragonball"
    section = DragonballConfig
    capabilities = MOST
    seen_with = ("4.1.0",)

    def adjust_config(self, section: DragonballConfig) -> DragonballConfig:
        """Kata's meanings of "", 0 and of values beyond this host. Kata's files say "virtio-blk-pci": its
        own shim leaves the guest's image on virtio-mmio all the same, and here all disks are there."""
        return dataclasses.replace(
            adjust_sandbox_section(section, max_vcpus=_MAX_VCPUS),
            path=section.path or shutil.which(_PROGRAM) or f"/usr/bin/{_PROGRAM}",
            shared_fs=section.shared_fs or INLINE,
            virtio_fs_cache="never" if section.virtio_fs_cache in ("", "none") else section.virtio_fs_cache,
            vm_rootfs_driver=_on_mmio(section.vm_rootfs_driver),
            block_device_driver=_on_mmio(section.block_device_driver),
        )

    def validate_config(self, section: DragonballConfig) -> None:
        """Raise ConfigError for what cannot work."""
        hint = "build it, docs/dragonball.md says how it talks, or correct the path"
        check_program(self.name, "path", section.path, hint)
        check_sandbox_section(self.name, dataclasses.replace(section, shared_fs="none"))
        check_word(self.name, "shared_fs", section.shared_fs, ("none", INLINE))
        check_word(self.name, "virtio_fs_cache", section.virtio_fs_cache, ("never", "auto", "always"))
        check_power(self.name, "virtio_fs_queue_size", section.virtio_fs_queue_size, 2, 1024)
        check_word(self.name, "vm_rootfs_driver", section.vm_rootfs_driver, (_MMIO, _PCI))
        check_word(self.name, "block_device_driver", section.block_device_driver, (_MMIO, _PCI))
        check_power(self.name, "queue_size", section.queue_size, 4, 1024)
        if not section.hotplug_timeout > 0:
            raise wrong(self.name, "hotplug_timeout", section.hotplug_timeout, "is no number of seconds")
        for key in ("rx_rate_limiter_max_rate", "tx_rate_limiter_max_rate"):
            rate = getattr(section, key)
            if rate and not section.disable_vhost_net:
                why = "does not go with vhost, which has no limits"
                raise wrong(self.name, key, rate, why, "disable_vhost_net = true")
        if section.rootless:
            why = "is not possible: it serves the shared directory, with the rights of the guest's users"
            raise wrong(self.name, "rootless", "true", why, "rootless = false")

    def check(self) -> list[CheckResult]:
        """Programs and devices that a Dragonball sandbox needs on this host."""
        hint = "Dragonball is a library: build the process around it, see docs/dragonball.md"
        return [on_path(self.name, _PROGRAM, hint), kvm()]

    def create(
        self, section: DragonballConfig, *, sandbox_id: str, state_dir: str, undo: UndoLog
    ) -> Dragonball:
        """A VM that does not run yet."""
        return Dragonball(section, sandbox_id=sandbox_id, state_dir=state_dir, undo=undo)


def _on_mmio(driver: str) -> str:
    return _MMIO if driver in ("", _PCI) else driver


plugin = DragonballPlugin()
