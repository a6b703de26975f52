"""VMs of somebody else, as a plugin: schema, defaults, checks, factory.

What: `plugin`. Its section is [hypervisor.remote], as in Kata's files for peer pods.
Invariants: `adjust_config` is idempotent, and takes this host's size for no bound; `check` never raises.
"""

from __future__ import annotations

import asyncio
import dataclasses

from devices.errors import ConfigError, HypervisorError
from devices.undo import UndoLog
from hypervisors.base import CheckResult
from hypervisors.remote.abilities import MOST
from hypervisors.remote.channel import MAX_PATH
from hypervisors.remote.config import DEFAULT_SOCKET, RemoteConfig
from hypervisors.remote.service import Service
from hypervisors.remote.vmm import RemoteVm
from hypervisors.rules import check_word, wrong

__all__ = ["RemotePlugin", "answers", "plugin"]

_GUEST = ("kernel", "initrd", "image")
_CHECK = 2.0  # seconds


class RemotePlugin:
    """See `hypervisors.base.HypervisorPlugin`."""

    name = "remote"
    section = RemoteConfig
    capabilities = MOST
    seen_with = ()  # a stand-in only: tests/e2e/peer_pods.py

    def adjust_config(self, section: RemoteConfig) -> RemoteConfig:
        """Kata's meanings of "" and 0."""
        return dataclasses.replace(
            section,
            default_vcpus=section.default_vcpus if section.default_vcpus > 0 else 1.0,
            default_memory=section.default_memory or 2048,
            shared_fs=section.shared_fs or "none",
        )

    def validate_config(self, section: RemoteConfig) -> None:
        """Raise ConfigError for what cannot work."""
        path = section.remote_hypervisor_socket
        if not path.startswith("/") or len(path.encode()) > MAX_PATH:
            what = f"is no absolute path of at most {MAX_PATH} bytes"
            raise wrong(self.name, "remote_hypervisor_socket", path, what)
        if not 1 <= section.remote_hypervisor_timeout <= 86400:
            value = section.remote_hypervisor_timeout
            raise wrong(self.name, "remote_hypervisor_timeout", value, "is not in 1..86400 seconds")
        for key in _GUEST:
            if value := getattr(section, key):
                hint = "take the key out; the service has a setting of its own for it"
                raise wrong(self.name, key, value, "cannot be: the VM's maker has its own", hint)
        if section.shared_fs != "none":
            why = "cannot be: nothing of this host can be shared with another machine; the guest pulls images"
            raise wrong(self.name, "shared_fs", section.shared_fs, why, 'shared_fs = "none", or no such key')
        check_word(self.name, "shared_fs", section.shared_fs, ("none",))
        if section.default_gpus < 0:
            raise wrong(self.name, "default_gpus", section.default_gpus, "is less than 0")
        if section.default_memory < 1:
            raise ConfigError(
                f"[hypervisor.remote] default_memory = {section.default_memory} is no size",
                key="default_memory",
                phase="config",
            )

    def check(self) -> list[CheckResult]:
        """Whether a service answers where Kata's files say."""
        return [answers(DEFAULT_SOCKET)]

    def create(self, section: RemoteConfig, *, sandbox_id: str, state_dir: str, undo: UndoLog) -> RemoteVm:
        """A VM that nobody has asked for yet."""
        return RemoteVm(section, sandbox_id=sandbox_id, state_dir=state_dir, undo=undo)


def answers(path: str) -> CheckResult:
    """Whether a service answers there, within two seconds. Never raises; not where an event loop runs."""
    try:
        version = asyncio.run(Service(path).version(_CHECK))
    except HypervisorError as error:
        return CheckResult(RemotePlugin.name, False, error.cause, error.hint)
    return CheckResult(RemotePlugin.name, True, f"{path}, version {version or 'not told'}")


plugin = RemotePlugin()
