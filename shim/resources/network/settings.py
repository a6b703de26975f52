"""What the configuration and a container's spec say about the pod's network.

What: `NetworkSettings`, and `network_settings`, which reads it.
Invariants: pure; nothing is opened here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hypervisors.config import HostedSection, VhostUserSection

__all__ = ["MACVTAP", "MODELS", "NO_MODEL", "TCFILTER", "NetworkSettings", "network_settings"]

TCFILTER, MACVTAP, NO_MODEL = "tcfilter", "macvtap", "none"
MODELS = (TCFILTER, MACVTAP, NO_MODEL)
"""How a link of the pod is joined to a card: by traffic filters, by a macvtap on it, or not at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSettings:
    """`path` of the namespace, "" for none; `own`: without a path the VM gets a new one, as runc gives each
    container. `queues` of each card; `vhost`: use vhost-net where there is one. `receive` and `send` are the
    most bits a second to and from the guest, 0 for no limit, where it is not the VMM's own matter. `dan`: the
    path of a file that, if it is there, says which cards there are (`dan.DanNetwork`); "" for none.
    `hosted`: whoever makes the VM is told the path, and the guest's network is his matter.
    """

    path: str = ""
    own: bool = False
    model: str = TCFILTER
    queues: int = 1
    vhost: bool = True
    receive: int = 0
    send: int = 0
    dan: str = ""
    hosted: bool = False


def network_settings(
    runtime: Any, section: Any, spec: Mapping[str, Any], sandbox_id: str = ""
) -> NetworkSettings:
    """From [runtime], the hypervisor's section, and `linux.namespaces` of the spec."""
    settings = _of_the_namespace(runtime, section, spec)
    if settings.hosted:
        return settings
    return replace(settings, dan=f"{runtime.dan_conf}/{sandbox_id}.json") if runtime.dan_conf else settings


def _of_the_namespace(runtime: Any, section: Any, spec: Mapping[str, Any]) -> NetworkSettings:
    hosted = isinstance(section, HostedSection)
    if runtime.disable_new_netns and not hosted:
        return NetworkSettings()
    path, own = "", False
    for space in (spec.get("linux") or {}).get("namespaces") or []:
        if space.get("type") == "network":
            path = space.get("path", "")
            own = not path
    if hosted:
        return NetworkSettings(path=path, own=own, hosted=True)
    model = runtime.internetworking_model or TCFILTER
    if isinstance(section, VhostUserSection):
        return NetworkSettings(
            path=path,
            own=own,
            model=model,
            queues=section.network_queues,
            vhost=not section.disable_vhost_net,
            receive=section.rx_rate_limiter_max_rate,
            send=section.tx_rate_limiter_max_rate,
        )
    return NetworkSettings(path=path, own=own, model=model)
