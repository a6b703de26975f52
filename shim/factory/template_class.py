"""Which VMs can begin with the same template: the class, named by the hash of all that makes a difference.

What: `template_class` reads from a configuration what its VMs are made of before a pod is known;
`TemplateClass` has that, and the digest.
Why a digest: a template is good for as long as nothing of it has changed, and whoever changes something (a
new kernel, a package's upgrade, a key) need not know of templates: its class is another one then.
Invariants: everything that decides about the VM's arguments or about what its guest has in memory is an
input: section, devices, the files that are named (by inode, size and time), the driver's own code, KVM.
Nothing of a pod is: what a tenant asks for makes no template.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from devices.config import DeviceConfig, PortConfig, VsockConfig
from hypervisors.registry import get_plugin
from shim.config import Config
from shim.resources.sizing import sized
from shim.sandbox.cold_devices import cold_devices, with_agent_params

__all__ = ["TemplateClass", "template_class", "template_devices"]

_FORMAT = 1
_FILES = ("path", "kernel", "initrd", "image", "firmware")
_DIGITS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateClass:
    """`section`: of the hypervisor, as each VM of the class has it; `config`: the file that it is from."""

    hypervisor: str
    section: Any
    devices: tuple[DeviceConfig, ...]
    config: str
    digest: str


def template_class(config: Config) -> TemplateClass:
    """Raises OSError for a file that is named and not there. Blocks for a millisecond."""
    plugin = get_plugin(config.hypervisor_name)
    static = config.runtime.static_sandbox_resource_mgmt
    section, _ = sized(with_agent_params(config, 0), {}, static=static, pod=True)
    devices = template_devices(config, section)
    files = {getattr(section, key, "") for key in _FILES} - {""}
    code = os.path.dirname(str(sys.modules[type(plugin).__module__].__file__))
    inputs = {
        "format": _FORMAT,
        "hypervisor": config.hypervisor_name,
        "section": repr(section),
        "devices": repr(devices),
        "files": sorted(_identity(path) for path in files),
        "code": sorted(_identity(entry.path) for entry in os.scandir(code) if entry.name.endswith(".py")),
        "kvm": os.access("/dev/kvm", os.R_OK | os.W_OK),
    }
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:_DIGITS]
    return TemplateClass(
        hypervisor=config.hypervisor_name,
        section=section,
        devices=tuple(devices),
        config=config.path,
        digest=digest,
    )


def template_devices(config: Config, section: Any) -> Sequence[DeviceConfig]:
    """What each VM of the class has from its start: as others, with a port in the place of vsock."""
    return tuple(
        PortConfig() if isinstance(device, VsockConfig) else device
        for device in cold_devices(config, section, "")
    )


def _identity(path: str) -> tuple[str, int, int, int, int]:
    info = os.stat(path)
    return path, info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns
