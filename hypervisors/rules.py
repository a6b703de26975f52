"""Rules and defaults that the sections of all VMMs share, for plugins' `adjust_config` and `validate_config`.

What: `adjust_sandbox_section` and `check_sandbox_section` for the keys of the shared sections; `wrong`,
`check_file`, `check_program` and `check_word` for a plugin's own keys.
Invariants: each error carries its key, from which the loader finds file and line, and says what is allowed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, TypeVar

from devices.errors import ConfigError
from devices.users import parse_range
from hypervisors.config import DiskSection, GrowingSection, SandboxSection, VhostUserSection

__all__ = [
    "adjust_sandbox_section",
    "check_file",
    "check_power",
    "check_program",
    "check_sandbox_section",
    "check_users",
    "check_word",
    "guest_words",
    "wrong",
]

_DEFAULT_MEMORY = 128  # MiB, Kata's meaning of 0
_MIN_MEMORY = 64  # MiB, as in Kata
_MAX_QUEUES = 256  # of a tap device
_RATES = range(8_000, 8 << 32)  # bits a second that the kernel's tbf can hold

SectionT = TypeVar("SectionT", bound=SandboxSection)


def adjust_sandbox_section(section: SectionT, *, max_vcpus: int) -> SectionT:
    """Kata's meanings of "", 0 and of values beyond this host. `max_vcpus`: what the VMM can do."""
    most = min(len(os.sched_getaffinity(0)), max_vcpus)
    if isinstance(section, GrowingSection):
        most = min(section.default_maxvcpus or most, most)
    vcpus = section.default_vcpus
    host_memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    changes: dict[str, Any] = {
        "default_vcpus": 1.0 if vcpus == 0 else float(most) if vcpus < 0 or vcpus > most else vcpus,
        "default_memory": min(section.default_memory or _DEFAULT_MEMORY, host_memory),
        "shared_fs": section.shared_fs or "none",
    }
    if isinstance(section, VhostUserSection):
        cache = section.virtio_fs_cache
        changes["shared_fs"] = section.shared_fs or "virtio-fs"
        changes["virtio_fs_cache"] = "never" if cache in ("", "none") else cache
        changes["network_queues"] = section.network_queues or 1
        changes["entropy_source"] = section.entropy_source or "/dev/urandom"
    if isinstance(section, GrowingSection):
        changes["default_maxvcpus"] = min(section.default_maxvcpus or most, most)
        changes["default_maxmemory"] = min(section.default_maxmemory or host_memory, host_memory)
    if isinstance(section, DiskSection):
        changes["num_queues"] = section.num_queues or 1
        changes["queue_size"] = section.queue_size or 128
    return dataclasses.replace(section, **changes)


def check_sandbox_section(name: str, section: SandboxSection) -> None:
    """Raise ConfigError for what no sandbox can work with. `name` is that of [hypervisor.NAME]."""
    if not section.kernel:
        raise wrong(name, "kernel", "", "is needed")
    check_file(name, "kernel", section.kernel)
    if not section.initrd and not section.image:
        raise ConfigError(
            f"[hypervisor.{name}] has neither image nor initrd: the guest would have no root file system",
            key="image",
            phase="config",
            hint="set image (and initrd) to what `make guest` builds",
        )
    for key in ("initrd", "image"):
        if getattr(section, key):
            check_file(name, key, getattr(section, key))
    if section.default_memory < _MIN_MEMORY:
        raise wrong(name, "default_memory", section.default_memory, f"is less than {_MIN_MEMORY} MiB")
    if not isinstance(section, VhostUserSection):
        check_word(name, "shared_fs", section.shared_fs, ("none",))
        return
    if isinstance(section, GrowingSection) and not section.hotplug_timeout > 0:
        raise wrong(name, "hotplug_timeout", section.hotplug_timeout, "is no number of seconds")
    check_word(name, "shared_fs", section.shared_fs, ("none", "virtio-fs"))
    check_word(name, "virtio_fs_cache", section.virtio_fs_cache, ("never", "auto", "always"))
    check_power(name, "virtio_fs_queue_size", section.virtio_fs_queue_size, 2, 1024)
    if section.virtio_fs_cache_size:
        raise wrong(
            name,
            "virtio_fs_cache_size",
            section.virtio_fs_cache_size,
            "is not possible: virtiofsd's DAX window is in no released QEMU",
            hint="set it to 0",
        )
    queues = section.network_queues
    if not 0 <= queues <= _MAX_QUEUES:
        raise wrong(name, "network_queues", queues, f"is not in 0..{_MAX_QUEUES}")
    for key in ("rx_rate_limiter_max_rate", "tx_rate_limiter_max_rate"):
        rate = getattr(section, key)
        if rate and rate not in _RATES:
            raise wrong(
                name, key, rate, f"is neither 0 nor in {_RATES.start}..{_RATES.stop - 1} bits a second"
            )
    if section.virtio_fs_daemon and section.shared_fs != "none":
        check_program(name, "virtio_fs_daemon", section.virtio_fs_daemon)
    if section.vsock_daemon:
        check_program(name, "vsock_daemon", section.vsock_daemon)


def wrong(name: str, key: str, value: str | float, what: str, hint: str = "") -> ConfigError:
    """The error for `key` of [hypervisor.NAME]; `what` goes on after the value: "is less than 64 MiB"."""
    shown = f'"{value}"' if isinstance(value, str) else str(value)
    return ConfigError(f"[hypervisor.{name}] {key} = {shown} {what}", key=key, phase="config", hint=hint)


def check_file(
    name: str, key: str, path: str, hint: str = "build it with `make guest`, or correct the path"
) -> None:
    """Raise ConfigError unless `path` is a readable file."""
    if not os.path.isfile(path):
        raise wrong(name, key, path, "is no file" if os.path.exists(path) else "does not exist", hint)
    if not os.access(path, os.R_OK):
        raise wrong(name, key, path, "is not readable")


def check_program(name: str, key: str, path: str, hint: str = "") -> None:
    """Raise ConfigError unless `path` can be run."""
    if not os.path.isfile(path) or not os.access(path, os.X_OK):
        what = "is not executable" if os.path.exists(path) else "does not exist"
        raise wrong(name, key, path, what, hint)


def check_users(name: str, text: str) -> None:
    """Raise ConfigError unless `text` is a range of users."""
    try:
        parse_range(text)
    except ValueError as error:
        raise wrong(name, "rootless_users", text, str(error)) from None


def check_power(name: str, key: str, value: int, least: int, most: int) -> None:
    """Raise ConfigError unless `value` is a power of two in this range."""
    if value & (value - 1) or not least <= value <= most:
        raise wrong(name, key, value, f"is no power of two from {least} to {most}")


def check_word(name: str, key: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise wrong(name, key, value, f"is not allowed; allowed: {', '.join(allowed)}")


def guest_words(image: str, rootfs_type: str, home_port: int) -> list[str]:
    """What our guest reads on its kernel's command line, whatever VMM runs it: where its root is, if it has
    an image, and the port of the host's that its agent calls (0: none)."""
    words = ["root=/dev/vda", f"rootfstype={rootfs_type}", "ro"] if image else []
    return [*words, f"agent.home_vport={home_port}"] if home_port else words
