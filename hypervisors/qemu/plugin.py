"""QEMU as a plugin: schema, defaults, checks, factory.

What: `plugin`, the object that the entry point names.
Invariants: `adjust_config` is idempotent; `validate_config` names the key, the value and the file it
looked at; `check` never raises.
"""

from __future__ import annotations

import dataclasses
import os
import shutil

from devices.errors import ConfigError, KataError
from devices.share_fs import find_virtiofsd
from devices.undo import UndoLog
from devices.vsock_daemon import find_vsock_daemon
from hypervisors.base import CheckResult
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.kvm import choose_accelerator
from hypervisors.qemu.vmm import VHOST_VSOCK, Qemu

__all__ = ["QemuPlugin", "plugin"]

_PROGRAM = "qemu-system-x86_64"
_MIN_MEMORY = 64  # MiB, as in Kata
_DEFAULT_MEMORY = 128  # MiB, Kata's meaning of 0
_MAX_VCPUS = 240  # as in Kata; APIC ids that need no interrupt remapping
_MOST = {  # QEMU's own limit of DIMMs; Kata's of ports and bridges
    "memory_slots": 256,
    "pcie_root_port": 16,
    "pcie_switch_port": 16,
    "default_bridges": 5,
}
_MACHINES = ("q35",)
_SHARED_FS = ("none", "virtio-fs")
_CACHES = ("never", "auto", "always")


class QemuPlugin:
    """See `hypervisors.base.HypervisorPlugin`."""

    name = "qemu"
    section = HypervisorConfig

    def adjust_config(self, section: HypervisorConfig) -> HypervisorConfig:
        """Kata's meanings of "", 0 and of values beyond this host."""
        cpus = len(os.sched_getaffinity(0))
        vcpus = section.default_vcpus
        most = min(section.default_maxvcpus or cpus, cpus, _MAX_VCPUS)
        vcpus = 1.0 if vcpus == 0 else float(most) if vcpus < 0 or vcpus > most else vcpus
        host_memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
        memory = section.default_memory or _DEFAULT_MEMORY
        cache = section.virtio_fs_cache
        return dataclasses.replace(
            section,
            path=section.path or shutil.which(_PROGRAM) or f"/usr/bin/{_PROGRAM}",
            machine_type=section.machine_type or "q35",
            default_vcpus=vcpus,
            default_maxvcpus=most,
            default_memory=min(memory, host_memory),
            default_maxmemory=min(section.default_maxmemory or host_memory, host_memory),
            shared_fs=section.shared_fs or "virtio-fs",
            virtio_fs_cache="never" if cache in ("", "none") else cache,
            entropy_source=section.entropy_source or "/dev/urandom",
        )

    def validate_config(self, section: HypervisorConfig) -> None:
        """Raise ConfigError for what cannot work."""
        _file("path", section.path, "install QEMU (Debian: qemu-system-x86)")
        if not os.access(section.path, os.X_OK):
            raise _wrong("path", section.path, "is not executable")
        if not section.kernel:
            raise _wrong("kernel", "", "is needed")
        _file("kernel", section.kernel, "build it with `make guest`, or correct the path")
        if not section.initrd and not section.image:
            raise ConfigError(
                "[hypervisor.qemu] has neither image nor initrd: the guest would have no root file system",
                key="image",
                phase="config",
                hint="set image (and initrd) to what `make guest` builds",
            )
        for key, path in (("initrd", section.initrd), ("image", section.image)):
            if path:
                _file(key, path, "build it with `make guest`, or correct the path")
        _one_of("machine_type", section.machine_type, _MACHINES)
        _one_of("accelerator", section.accelerator, ("auto", "kvm", "tcg"))
        _one_of("shared_fs", section.shared_fs, _SHARED_FS)
        _one_of("virtio_fs_cache", section.virtio_fs_cache, _CACHES)
        size = section.virtio_fs_queue_size
        if size & (size - 1) or not 2 <= size <= 1024:
            raise _wrong("virtio_fs_queue_size", size, "is no power of two from 2 to 1024")
        if section.default_memory < _MIN_MEMORY:
            raise _wrong("default_memory", section.default_memory, f"is less than {_MIN_MEMORY} MiB")
        if not section.hotplug_timeout > 0:
            raise _wrong("hotplug_timeout", section.hotplug_timeout, "is no number of seconds")
        for key, most in _MOST.items():
            value = getattr(section, key)
            if not 0 <= value <= most:
                raise _wrong(key, value, f"is not in 0..{most}")
        for key, path in (
            ("virtio_fs_daemon", section.virtio_fs_daemon),
            ("vsock_daemon", section.vsock_daemon),
        ):
            if path and not os.access(path, os.X_OK):
                raise _wrong(key, path, "is not executable" if os.path.exists(path) else "does not exist")

    def check(self) -> list[CheckResult]:
        """Programs and devices that a QEMU sandbox needs on this host."""
        path = shutil.which(_PROGRAM) or ""
        results = [
            CheckResult("qemu", bool(path), path or f"{_PROGRAM} is not on PATH", "install qemu-system-x86")
        ]
        choice = choose_accelerator("auto")
        reason = f": {choice.reason}" if choice.reason else ""
        results.append(CheckResult("accelerator", True, f"{choice.accelerator.value}{reason}"))
        if os.path.exists(VHOST_VSOCK):
            results.append(CheckResult("vsock", True, VHOST_VSOCK))
        else:
            results.append(_found("vsock", find_vsock_daemon))
        results.append(_found("virtiofsd", find_virtiofsd))
        return results

    def create(self, section: HypervisorConfig, *, sandbox_id: str, state_dir: str, undo: UndoLog) -> Qemu:
        """A VM that does not run yet."""
        return Qemu(section, sandbox_id=sandbox_id, state_dir=state_dir, undo=undo)


def _wrong(key: str, value: str | float, what: str) -> ConfigError:
    shown = f'"{value}"' if isinstance(value, str) else str(value)
    return ConfigError(f"[hypervisor.qemu] {key} = {shown} {what}", key=key, phase="config")


def _file(key: str, path: str, hint: str) -> None:
    if not os.path.isfile(path):
        error = _wrong(key, path, "is no file" if os.path.exists(path) else "does not exist")
        error.hint = hint
        raise error
    if not os.access(path, os.R_OK):
        raise _wrong(key, path, "is not readable")


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise _wrong(key, value, f"is not allowed; allowed: {', '.join(allowed)}")


def _found(name: str, find: object) -> CheckResult:
    assert callable(find)
    try:
        return CheckResult(name, True, str(find()))
    except KataError as error:
        return CheckResult(name, False, error.cause, error.hint)


plugin = QemuPlugin()
