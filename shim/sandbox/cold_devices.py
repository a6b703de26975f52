"""What a VM starts with, by its configuration: devices, kernel parameters for the agent, swap.

What: `cold_devices`, `with_agent_params` and `swap`; `key` reads a key of any hypervisor's section.
Invariants: nothing is opened or made here.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from devices.config import (
    BalloonConfig,
    BlockConfig,
    CacheMode,
    ConsoleConfig,
    DeviceConfig,
    RngConfig,
    ShareFsConfig,
    VsockConfig,
)
from hypervisors.config import HostedSection, HypervisorConfig
from shim.config import Config
from shim.resources.shared_dir import ROOTS, ROOTS_TAG

if TYPE_CHECKING:
    from shim.resources.guest_swap import SwapSettings

__all__ = ["cold_devices", "key", "swap", "with_agent_params"]

_DEFAULTS = HypervisorConfig()
_STOCK = (
    "systemd.unit=kata-containers.target",
    "systemd.mask=systemd-networkd.service",
    "systemd.mask=systemd-networkd.socket",
)


def cold_devices(config: Config, section: Any, share: str, *, rng: bool = True) -> list[DeviceConfig]:
    """What every sandbox is cold-plugged with, in the order of the guest's PCI slots. `rng`: its VMM has
    one; the guest of another has its entropy from the processor. A VM of somebody else's has what he gave
    it, and the way to its agent."""
    if isinstance(section, HostedSection):
        return [VsockConfig(home_call=config.agent.home_call)]
    devices: list[DeviceConfig] = []
    if section.image:
        devices.append(BlockConfig(id="image", path=section.image, read_only=True, ours=True))
    devices.append(VsockConfig(home_call=config.agent.home_call, daemon=key(section, "vsock_daemon")))
    if key(section, "shared_fs") != "none":
        devices += _shares(section, share)
    if rng:
        devices.append(RngConfig(source=key(section, "entropy_source")))
    if key(section, "reclaim_guest_freed_memory"):
        devices.append(BalloonConfig())
    devices.append(ConsoleConfig())
    if getattr(section, "confidential_guest", False):
        from devices.protection import choose, probe

        devices.append(
            choose(
                snp=section.sev_snp_guest,
                policy=section.snp_guest_policy,
                quote_port=section.tdx_quote_generation_service_socket_port,
                found=probe(),
            )
        )
    return devices


def _shares(section: Any, share: str) -> list[DeviceConfig]:
    """What virtio-fs serves: everything in one directory, or root file systems apart (`SharedDir`)."""
    one = ShareFsConfig(
        source=os.path.join(share, "ro"),
        daemon=key(section, "virtio_fs_daemon"),
        cache=CacheMode(key(section, "virtio_fs_cache")),
        queue_size=key(section, "virtio_fs_queue_size"),
        extra_args=tuple(key(section, "virtio_fs_extra_args")),
    )
    if not key(section, "virtio_fs_rootfs_mknod"):
        return [one]
    roots = dataclasses.replace(
        one, id="share-roots", tag=ROOTS_TAG, source=os.path.join(share, ROOTS, "ro"), mknod=True
    )
    return [one, roots]


def with_agent_params(config: Config, stream_port: int) -> Any:
    """The hypervisor's section with the kernel parameters that speak to the agent (kata.md 4.4), and to the
    init of a stock guest, which Kata's shims tell what to start."""
    params = [] if config.agent.home_call else list(_STOCK)
    if config.stock_root:
        params.append(f"root={config.stock_root}")
    if config.agent.enable_debug:
        params.append("agent.log=debug")
    if stream_port:
        params.append(f"agent.stream_port={stream_port}")
    params.append(f"agent.hotplug_timeout={key(config.hypervisor, 'hotplug_timeout'):g}")
    own = [config.hypervisor.kernel_params] if config.hypervisor.kernel_params else []
    return dataclasses.replace(config.hypervisor, kernel_params=" ".join(params + own))


def swap(section: Any) -> SwapSettings | None:
    """The guest's swap, if there is to be some: whole pages."""
    if not getattr(section, "enable_guest_swap", False):
        return None
    from shim.resources.guest_swap import SwapSettings

    size = section.default_memory * section.guest_swap_size_percent * (1 << 20) // 100
    return SwapSettings(section.guest_swap_path, size >> 12 << 12)


def key(section: Any, name: str) -> Any:
    """A key of the hypervisor's section; what the key means by default where its schema has no such key."""
    return getattr(section, name, getattr(_DEFAULTS, name))
