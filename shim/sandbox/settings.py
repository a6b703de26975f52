"""What a sandbox is made of, decided before anything is done.

Why apart: `shim.runtime` fills it in from configuration and spec; the sandbox and what its containers are
given read it.
Invariants: data only; nothing is opened here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from devices.config import DeviceConfig
from shim.protocols import Deadlines
from shim.resources.disks import DiskStyle
from shim.resources.network.settings import NetworkSettings
from shim.resources.sizing import Bounds
from shim.resources.vfio_settings import VfioSettings
from shim.sandbox.health import HealthSettings

if TYPE_CHECKING:
    from shim.resources.guest_swap import SwapSettings
    from shim.resources.host_cgroup import CgroupSettings
    from shim.resources.vfio_devices import Wanted
    from shim.sandbox.pod_config import PodDefaults

__all__ = ["SandboxSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSettings:
    """What a sandbox is made of, decided before anything is done.

    `key`, `alias`, `state_dir`: see `shim.protocols.DaemonContext`. `network`: see `shim.resources.network`.
    `shm_size` is in bytes, `shm_source` what is the pod's /dev/shm on the host ("" where only its name tells,
    see `shim.spec.guest_spec`).
    `bounds`: the sizes that its VM can have. `kernel_modules`: each a name and parameters, by blanks.
    `direct_stdio`: the agent takes stdio on connections of its own (ours does, a stock one does not).
    `cgroup`: the host's; None leaves everything where it is.
    `first_spec`: the OCI spec of its single container, None for a pod's. `disks`: how its containers' disks
    are served; `swap`: the guest's. `vfio`: how devices of VFIO are passed on; `passed`: those that the VM
    starts with. `hosted`: see `hypervisors.config.HostedSection`; `annotations`: what the maker of such a VM
    learns of the pod. `template`: the directory of a saved VM that it begins with, "" for one that boots.
    `pod`: what each container gets that does not bring it, with the Sandbox API.
    """

    sandbox_id: str
    key: str
    alias: str
    state_dir: str
    container_type: str
    network: NetworkSettings
    hostname: str
    dns: Sequence[str]
    shm_size: int
    shm_source: str = ""
    share_path: str
    devices: Sequence[DeviceConfig]
    deadlines: Deadlines
    bounds: Bounds
    template: str = ""
    agent_port: int = 1024
    direct_stdio: bool = True
    guest_hook_path: str = ""
    kernel_modules: Sequence[str] = ()
    disable_guest_seccomp: bool = False
    pod: PodDefaults | None = None
    disks: DiskStyle = field(default_factory=DiskStyle)
    vfio: VfioSettings = field(default_factory=VfioSettings)
    health: HealthSettings = field(default_factory=HealthSettings)
    passed: Wanted | None = None
    swap: SwapSettings | None = None
    cgroup: CgroupSettings | None = None
    first_spec: Mapping[str, Any] | None = None
    hosted: bool = False
    annotations: Mapping[str, str] = field(default_factory=dict)
    host_mounts: int | None = None  # see `shim.protocols.DaemonContext`
