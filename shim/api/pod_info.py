"""What a sandbox is and uses, for SandboxStatus (verbose) and SandboxMetrics.

What: `describe` gives names and values for people (`crictl inspectp` shows them); `measure` what the
VM and its helpers use of the host, in the form of a container's statistics.
Why of the host: each container's own figures come by the Task service; the pod is what its processes
on the host use, VMM and overhead included.
Invariants: neither fails for a VM that is gone, or that goes meanwhile.
"""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage

from devices.errors import KataError
from proto import agent_pb2
from shim.resources.network.netns import OURS
from shim.sandbox.sandbox import VirtSandbox
from shim.state.trace import Trace
from shim.tasks.stats import host_is_unified, to_any

__all__ = ["describe", "measure"]

_NET_DEV = (
    "rx_bytes", "rx_packets", "rx_errors", "rx_dropped", "", "", "", "",
    "tx_bytes", "tx_packets", "tx_errors", "tx_dropped",
)  # fmt: skip


async def describe(sandbox: VirtSandbox, trace: Trace) -> dict[str, str]:
    """The sandbox's properties; what is not known (any more) is left out."""
    section = await sandbox.hypervisor.hypervisor_config()
    settings = sandbox.settings
    info = {
        "guest.kernel": section.kernel,
        "guest.image": section.image or section.initrd,
        "guest.memory_mib": str(sandbox.size.memory >> 20),
        "guest.vcpus": f"{sandbox.size.vcpus:g}",
        "guest.hostname": settings.hostname,
        "share": settings.share_path,
        "netns": settings.network.path,
        "phases": json.dumps(trace.durations()),
    }
    try:
        state = await sandbox.hypervisor.save_state()
        info["hypervisor"] = state.hypervisor
        info["accelerator"] = state.accelerator
        info["vmm.pid"] = str(state.pid)
        info["processes"] = json.dumps(await sandbox.hypervisor.get_pids())
        info["vmm.netns"] = await sandbox.hypervisor.get_ns_path()
    except KataError:
        info["vmm.pid"] = ""
    return {name: value for name, value in info.items() if value}


async def measure(sandbox: VirtSandbox) -> AnyMessage:
    """io.containerd.cgroups Metrics of the host's cgroup version: CPU, memory, processes, network."""
    figures = await sandbox.hypervisor.get_hypervisor_metrics()
    usage = agent_pb2.StatsContainerResponse()
    usage.cgroup_stats.cpu_stats.cpu_usage.total_usage = int(figures.get("cpu_seconds_total", 0) * 1e9)
    memory = usage.cgroup_stats.memory_stats.usage
    memory.usage = int(figures.get("resident_bytes", 0))
    memory.limit = sandbox.size.memory
    usage.cgroup_stats.pids_stats.current = int(figures.get("processes", 0))
    if sandbox.settings.network.path:
        for link in _links(f"/proc/{sandbox.vmm_pid}/net/dev"):
            usage.network_stats.add(**link)
    return to_any(usage, unified=host_is_unified())


def _links(path: str) -> list[dict[str, Any]]:
    """The network devices of a /proc/PID/net/dev, but for the loopback. Source: proc(5)."""
    links = []
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            lines = file.readlines()[2:]
    except OSError:
        return []
    for line in lines:
        name, _, numbers = line.partition(":")
        values = numbers.split()
        # What we joined to the pod's links counts the same packets again.
        if name.strip() != "lo" and not name.strip().endswith(OURS) and len(values) >= len(_NET_DEV):
            fields = {key: int(value) for key, value in zip(_NET_DEV, values, strict=False) if key}
            links.append({"name": name.strip(), **fields})
    return links
