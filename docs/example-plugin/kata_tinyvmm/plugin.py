"""The kind of VMM: its section of the configuration, its rules, and the factory."""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass

from devices.undo import UndoLog
from hypervisors.base import Capabilities, CheckResult
from hypervisors.config import VhostUserSection
from hypervisors.rules import adjust_sandbox_section, check_program, check_sandbox_section, wrong
from kata_tinyvmm.vmm import DEVICES, TinyVm

__all__ = ["TinyConfig", "TinyPlugin", "plugin"]

_PROGRAM = "qemu-system-x86_64"
_MAX_VCPUS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyConfig(VhostUserSection):
    """[hypervisor.tiny]: what every sandbox has, and two keys of our own."""

    path: str = ""
    cpu_model: str = "max"


class TinyPlugin:
    """See `hypervisors.base.HypervisorPlugin`."""

    name = "tiny"
    section = TinyConfig
    capabilities = Capabilities(devices=DEVICES, hybrid_vsock=True)

    def adjust_config(self, section: TinyConfig) -> TinyConfig:
        """What was left to default."""
        return dataclasses.replace(
            adjust_sandbox_section(section, max_vcpus=_MAX_VCPUS),
            path=section.path or shutil.which(_PROGRAM) or f"/usr/bin/{_PROGRAM}",
        )

    def validate_config(self, section: TinyConfig) -> None:
        """What cannot work."""
        check_program(self.name, "path", section.path, "install QEMU (Debian: qemu-system-x86)")
        check_sandbox_section(self.name, section)
        if not section.image:
            raise wrong(self.name, "image", "", "is needed")
        if not section.cpu_model.replace("-", "").isalnum():  # it becomes part of an argument
            raise wrong(self.name, "cpu_model", section.cpu_model, "is no name of a CPU model")

    def check(self) -> list[CheckResult]:
        """For `kata-ctl check`."""
        path = shutil.which(_PROGRAM) or ""
        found = path if os.access(path, os.X_OK) else f"{_PROGRAM} is not on PATH"
        return [CheckResult("tiny", bool(path), found, "" if path else "install qemu-system-x86")]

    def create(self, section: TinyConfig, *, sandbox_id: str, state_dir: str, undo: UndoLog) -> TinyVm:
        """A VM that does not run yet."""
        return TinyVm(section, sandbox_id=sandbox_id, state_dir=state_dir, undo=undo)


plugin = TinyPlugin()
