"""What the process around Dragonball may.

What: `confinement` says it for one VM; `meeting_place` is the directory of the sockets that it makes.
Why two ways: it serves the shared directory itself, so it has the rights of virtiofsd, and must see no more
than virtiofsd and a VMM do together; that is known at the start, since nothing is plugged later. Where disks
come later (upcall), are block devices, or nothing is shared (so that the VM can be saved to a directory that
nobody knows yet), it sees the host's files.
Invariants: it is root, with the capabilities to act as the guest's users do, and never mknod: a device node
that a guest makes is the host's. Nobody filters its system calls: the library's filter is not part of it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection

from devices.config import BlockConfig, DeviceConfig, NetworkConfig, ShareFsConfig
from devices.confine import Bind, Confinement, View
from hypervisors.dragonball.config import DragonballConfig

__all__ = ["confinement", "meeting_place"]

_FILES = 4096
_PLACES = "/sys/devices/system"  # of CPUs: what the libraries ask
_SHARED_FILES = 1 << 20  # what a guest has open is open here
_ROOT = ("dac_override",)  # disks may belong to anybody
_AS_USERS = ("chown", "dac_override", "fowner", "fsetid", "setgid", "setuid", "setfcap")


def meeting_place(state_dir: str) -> str:
    """The directory of the sockets that Dragonball makes, and connects to, by their paths."""
    return f"{state_dir}/m"


def confinement(
    section: DragonballConfig, devices: Collection[DeviceConfig], *, netns: str | None, state_dir: str
) -> Confinement:
    """For one VM with these devices. Blocks. Raises OSError for a disk that is not there."""
    shares = [device for device in devices if isinstance(device, ShareFsConfig)]
    disks = [device for device in devices if isinstance(device, BlockConfig)]
    capabilities, files = (_AS_USERS, _SHARED_FILES) if shares else (_ROOT, _FILES)
    on_devices = any(stat.S_ISBLK(os.stat(disk.path).st_mode) for disk in disks)  # a view has no such nodes
    if not shares or section.upcall or on_devices:
        return Confinement(capabilities=capabilities, network=netns, view=None, files=files)
    binds = [Bind(path=meeting_place(state_dir), writable=True), Bind(path=_PLACES)]
    binds += [Bind(path=path) for path in (section.kernel, section.initrd) if path]
    binds += [Bind(path=share.source, follows=True) for share in shares]
    binds += [Bind(path=disk.path, writable=not disk.read_only) for disk in disks]
    nodes = ["/dev/kvm"]
    if any(isinstance(device, NetworkConfig) for device in devices):
        nodes += ["/dev/net/tun"] if section.disable_vhost_net else ["/dev/net/tun", "/dev/vhost-net"]
    view = View(binds=tuple(binds), nodes=tuple(nodes))
    return Confinement(capabilities=capabilities, network=netns, view=view, files=files)
