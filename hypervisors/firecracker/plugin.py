"""Firecracker as a plugin: schema, defaults, checks, factory.

What: `plugin`, the object that the entry point names.
Invariants: `adjust_config` is idempotent; `validate_config` names key and value; `check` never raises.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil

from devices.errors import ConfigError
from devices.undo import UndoLog
from hypervisors.base import Capabilities, CheckResult
from hypervisors.checks import kvm, on_path
from hypervisors.firecracker.abilities import abilities
from hypervisors.firecracker.config import FirecrackerConfig
from hypervisors.firecracker.vmm import Firecracker
from hypervisors.rules import adjust_sandbox_section, check_users, wrong

__all__ = ["FirecrackerPlugin", "plugin"]

_MIN_MEMORY = 128  # MiB, as in Kata
_MAX_VCPUS = 32
_MAX_SLOTS = 6  # of each kind: Firecracker has interrupts for 19 devices, and there are others
_CGROUP = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+=[^\s,=]+")


class FirecrackerPlugin:
    """See `hypervisors.base.HypervisorPlugin`."""

    name = "firecracker"
    section = FirecrackerConfig
    seen_with = ("1.12.1",)
    capabilities = Capabilities(
        devices=abilities(_MAX_SLOTS),
        tap_by_name=True,
        hybrid_vsock=True,
        own_vsock=True,
        pause=True,
        snapshot=True,
        restore=True,
    )

    def adjust_config(self, section: FirecrackerConfig) -> FirecrackerConfig:
        """Kata's meanings of "", 0 and of values beyond this host."""
        return dataclasses.replace(
            adjust_sandbox_section(section, max_vcpus=_MAX_VCPUS),
            path=section.path or shutil.which("firecracker") or "/usr/bin/firecracker",
            shared_fs=section.shared_fs or "none",
        )

    def validate_config(self, section: FirecrackerConfig) -> None:
        """Raise ConfigError for what cannot work."""
        for key in ("path", "jailer_path"):
            program = getattr(section, key)
            if program and not (os.path.isfile(program) and os.access(program, os.X_OK)):
                what = "is not executable" if os.path.exists(program) else "does not exist"
                raise wrong(self.name, key, program, what, "install Firecracker, or correct the path")
        if section.jailer_path and "firecracker" not in os.path.basename(section.path):
            raise wrong(
                self.name, "path", section.path, "is refused by the jailer: its name must contain firecracker"
            )
        if not section.kernel:
            raise wrong(self.name, "kernel", "", "is needed")
        if not section.initrd and not section.image:
            raise ConfigError(
                "[hypervisor.firecracker] has neither image nor initrd: the guest would have no root",
                key="image",
                phase="config",
                hint="set image (and initrd) to what `make guest` builds",
            )
        files = ["kernel", "initrd", "image"]
        if section.boot_from_template:
            files += ["device_state_path", "memory_path"]
        for key in files:
            path = getattr(section, key)
            if path and not os.path.isfile(path):
                raise wrong(self.name, key, path, "is no file" if os.path.exists(path) else "does not exist")
            if not path and key in ("device_state_path", "memory_path"):
                raise wrong(self.name, key, "", "is needed with boot_from_template = true")
        if section.shared_fs != "none":
            raise wrong(
                self.name,
                "shared_fs",
                section.shared_fs,
                "is nothing that Firecracker has",
                'shared_fs = "none"',
            )
        if section.default_memory < _MIN_MEMORY:
            raise wrong(
                self.name, "default_memory", section.default_memory, f"is less than {_MIN_MEMORY} MiB"
            )
        if not 0 <= section.block_device_slots <= _MAX_SLOTS:
            raise wrong(
                self.name, "block_device_slots", section.block_device_slots, f"is not in 0..{_MAX_SLOTS}"
            )
        check_users(self.name, section.rootless_users)
        for key in ("jailer_uid", "jailer_gid"):
            if getattr(section, key) < 0:
                raise wrong(self.name, key, getattr(section, key), "is no id")
        for setting in section.jailer_cgroups:
            if not _CGROUP.fullmatch(setting):
                raise wrong(self.name, "jailer_cgroups", setting, "is not FILE=VALUE, such as pids.max=64")

    def check(self) -> list[CheckResult]:
        """Programs and devices that a Firecracker sandbox needs on this host."""
        hint = "install a release of Firecracker, or set [hypervisor.firecracker] path"
        jailer = on_path("jailer", "jailer", "it comes with Firecracker's releases")
        return [on_path("firecracker", "firecracker", hint), jailer, kvm()]

    def create(
        self, section: FirecrackerConfig, *, sandbox_id: str, state_dir: str, undo: UndoLog
    ) -> Firecracker:
        """A VM that does not run yet."""
        return Firecracker(section, sandbox_id=sandbox_id, state_dir=state_dir, undo=undo)


plugin = FirecrackerPlugin()
