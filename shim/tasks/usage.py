"""What a container uses, and who in a pod is charged with what the VM itself uses.

What: `Usage.stats` is a container's counters from the guest; `Usage.processes` its processes.
Why here: the guest knows each container's cgroup. The network's links and the VM's own cost belong to
the pod, and must be told once: who adds up the containers of a pod gets what the pod costs the host.
Invariants:
- Counters of the links are told with the sandbox's own container only.
- A pod's sandbox container is charged, besides its own use, with what VMM and daemons use on the host
  less what the guest's containers account for: CPU time as kernel time, memory as usage. A single
  container is not: its limit is for what runs in the guest, and its use never exceeds it.
- The charged CPU time never goes back, whatever containers come and go.
Source: facts/containerd-shim.md 3.3 and section 5 (pod-wide numbers in `crictl stats`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

from devices.errors import KataError
from proto import agent_pb2
from shim.protocols import GuestProcess, Sandbox

__all__ = ["Usage"]

_MOST = (1 << 64) - 1  # what a counter can hold; a guest may say it of its own

_log = structlog.get_logger("usage")


class Usage:
    """The accounts of one sandbox's containers."""

    def __init__(self) -> None:
        self._cpu: dict[str, int] = {}  # ns of each container, as last seen
        self._cpu_of_deleted = 0
        self._charged_cpu = 0

    async def stats(
        self, sandbox: Sandbox, container_id: str, others: Iterable[str]
    ) -> agent_pb2.StatsContainerResponse:
        """A container's counters. `others` are the further containers of its sandbox."""
        response = await sandbox.agent.stats_container(container_id)
        if container_id != sandbox.id:
            del response.network_stats[:]
        elif sandbox.is_pod:
            await self._charge(sandbox, response, list(others))
        return response

    async def last(self, sandbox: Sandbox, container_id: str) -> agent_pb2.StatsContainerResponse:
        """The counters of a container that has ended: its cgroup is in the guest until Delete. A pod's own
        container keeps the CPU time that it was charged with."""
        charged = self._charged_cpu if container_id == sandbox.id and sandbox.is_pod else 0
        response = await sandbox.agent.stats_container(container_id)
        if container_id != sandbox.id:
            del response.network_stats[:]
        _add_cpu(response, charged)
        return response

    async def _charge(
        self, sandbox: Sandbox, own: agent_pb2.StatsContainerResponse, others: list[str]
    ) -> None:
        answers = await asyncio.gather(
            *(sandbox.agent.stats_container(other) for other in others), return_exceptions=True
        )
        figures = {sandbox.id: own}
        for other, answer in zip(others, answers, strict=True):
            if isinstance(answer, KataError):  # it goes just now
                _log.debug("no statistics", container=other, error=str(answer))
            elif isinstance(answer, BaseException):
                raise answer
            else:
                figures[other] = answer
        memory = 0
        for name, answer in figures.items():
            group = answer.cgroup_stats
            memory += group.memory_stats.usage.usage
            self._cpu[name] = max(self._cpu.get(name, 0), group.cpu_stats.cpu_usage.total_usage)
        for name in self._cpu.keys() - {sandbox.id, *others}:
            self._cpu_of_deleted += self._cpu.pop(name)
        host = await sandbox.host_usage()
        rest = host.cpu - sum(self._cpu.values()) - self._cpu_of_deleted
        self._charged_cpu = max(self._charged_cpu, rest)
        _add_cpu(own, self._charged_cpu)
        used = own.cgroup_stats.memory_stats.usage
        used.usage = min(_MOST, used.usage + max(0, host.memory - memory))
        used.max_usage = max(used.max_usage, used.usage)

    @staticmethod
    async def processes(sandbox: Sandbox, container_id: str) -> list[GuestProcess]:
        """Those of the container in the guest; none where the guest does not say (a stock agent), in time."""
        try:
            return list(await sandbox.agent.list_processes(container_id))
        except KataError as error:
            _log.debug("the guest does not list processes", container=container_id, error=str(error))
            return []


def _add_cpu(response: agent_pb2.StatsContainerResponse, charged: int) -> None:
    cpu = response.cgroup_stats.cpu_stats.cpu_usage
    cpu.total_usage = min(_MOST, cpu.total_usage + charged)
    cpu.usage_in_kernelmode = min(_MOST, cpu.usage_in_kernelmode + charged)
