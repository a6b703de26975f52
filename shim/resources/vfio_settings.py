"""What the configuration says about devices of VFIO, and whether a container may want any.

Why apart from `vfio_devices`: every sandbox asks, few need the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from devices.threads import look
from shim.config.schema import RuntimeConfig
from shim.spec.guest_devices import may_have_vfio, vfio_nodes

__all__ = ["VfioSettings", "vfio_settings", "wants"]

_CDI = "cdi.k8s.io/"  # devices.cdi.ANNOTATION


@dataclass(frozen=True, slots=True, kw_only=True)
class VfioSettings:
    """`mode`: "guest-kernel" or "vfio". `cold`, `hot`: what devices sit behind, "no-port" for nothing.
    `bind`: take functions from drivers of the host. `cdi`: patterns of the names that annotations may
    select. `own_agent`: the guest's agent is ours, which makes nodes by itself."""

    mode: str = "guest-kernel"
    cold: str = "no-port"
    hot: str = "no-port"
    bind: bool = False
    cdi: tuple[str, ...] = ()
    own_agent: bool = True


def vfio_settings(runtime: RuntimeConfig, section: Any) -> VfioSettings:
    """From [runtime] and the hypervisor's section, which has no such keys if its VMM has no VFIO."""
    return VfioSettings(
        mode=runtime.vfio_mode,
        cold=getattr(section, "cold_plug_vfio", "no-port"),
        hot=getattr(section, "hot_plug_vfio", "no-port"),
        bind=runtime.vfio_bind,
        cdi=runtime.valid_cdi_devices,
        own_agent=runtime.use_passfd_io,
    )


async def wants(spec: Mapping[str, Any], settings: VfioSettings) -> bool:
    """Whether this container names devices of VFIO, or annotations that may."""
    if settings.cdi and any(key.startswith(_CDI) for key in spec.get("annotations") or {}):
        return True
    return may_have_vfio(spec) and bool(await look(vfio_nodes, spec))
