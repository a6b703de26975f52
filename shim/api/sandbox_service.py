"""The Sandbox service of containerd: a pod whose VM has no container of its own.

What: `SandboxService` has a method for each RPC of containerd.runtime.sandbox.v1.Sandbox; the sandbox's
life is `shim.sandbox.pod_sandbox`'s, what it is made of `shim.sandbox.pod_config`'s. Containers come into it
by the Task service of the same shim.
Why apart, and loaded with its first call: most shims serve a single container or a pod with a pause
container, and never hear of it.
Invariants:
- One shim, one sandbox, with the id that the shim was started for; any other id is NOT_FOUND.
- A sandbox is created once in a shim's life, and not beside containers that came without one.
- Shutdown ends the shim in any state, since containerd calls it after failures too; only containers that
  came without a sandbox keep it.
Source: containerd's api/runtime/sandbox/v1; facts/containerd-shim.md 3.2.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any, Protocol

import structlog
from google.protobuf.any_pb2 import Any as AnyMessage

from devices.errors import CallerError
from devices.threads import acquire, look
from proto import sandbox_v1_pb2 as messages
from shim.api.pod_info import describe, measure
from shim.sandbox.pod_config import (
    PodDefaults,
    files_of,
    parse_options,
    sandbox_spec,
    shares_pids,
    write_files,
)
from shim.sandbox.pod_sandbox import Call, PodSandbox, State
from shim.spec.documents import checked
from shim.state.trace import Trace
from shim.tasks.container_manager import ContainerManager

__all__ = ["Pods", "SandboxService"]

_log = structlog.get_logger("pod")

#: What containerd calls the machines; uname(2) has other names.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_PING_DEADLINE = 2.0  # seconds


class Pods(Protocol):
    """The layer below: it makes a sandbox that belongs to no container."""

    pod: PodSandbox | None
    trace: Trace

    async def load_spec(self, bundle: str) -> dict[str, Any]:
        """See `shim.tasks.container_manager.Runtime`."""
        ...

    async def make_pod(
        self, spec: dict[str, object], options: AnyMessage, defaults: PodDefaults
    ) -> PodSandbox:
        """`pod`, made (not started) from the spec that a pause container would have."""
        ...


class SandboxService:
    """The RPCs. `files` is a directory to make for the pod's files; `shutdown` ends the shim."""

    def __init__(
        self,
        pods: Pods,
        manager: ContainerManager,
        *,
        sandbox_id: str,
        bundle: str,
        files: str,
        shutdown: Callable[[], None],
    ) -> None:
        self._pods = pods
        self._manager = manager
        self._id = sandbox_id
        self._bundle = bundle
        self._files = files
        self._shutdown = shutdown
        self._creating = asyncio.Lock()

    def _check_id(self, sandbox_id: str) -> None:
        if sandbox_id != self._id:
            raise CallerError(f"sandbox {sandbox_id[:128]}: not found", code="NOT_FOUND")

    def _pod(self, sandbox_id: str) -> PodSandbox:
        self._check_id(sandbox_id)
        if self._pods.pod is None:
            raise CallerError(f"sandbox {sandbox_id}: not found", code="NOT_FOUND")
        return self._pods.pod

    async def create_sandbox(
        self, _ctx: object, request: messages.CreateSandboxRequest
    ) -> messages.CreateSandboxResponse:
        """Decide what the sandbox is; everything that can be refused is refused here."""
        self._check_id(request.sandbox_id)
        async with self._creating:
            if self._pods.pod is not None:
                raise CallerError(f"sandbox {self._id}: already exists", code="ALREADY_EXISTS")
            if not self._manager.idle:
                raise CallerError(
                    "this shim has containers without a sandbox: failed precondition",
                    code="FAILED_PRECONDITION",
                )
            await self._create(request)
        return messages.CreateSandboxResponse()

    async def _create(self, request: messages.CreateSandboxRequest) -> None:
        if request.rootfs:
            _log.info("a sandbox in a VM has no root file system of its own", mounts=len(request.rootfs))
        config = parse_options(request.options)
        bundle = request.bundle_path or self._bundle
        there = await look(os.path.exists, os.path.join(bundle, "config.json"))
        base = await self._pods.load_spec(bundle) if there else {}
        files = files_of(self._files)
        spec = checked(
            sandbox_spec(
                base,
                config,
                sandbox_id=self._id,
                netns=request.netns_path,
                annotations=request.annotations,
                files=files,
            ),
            "the sandbox",
        )
        await acquire(write_files, self._files, config)
        defaults = PodDefaults(files, dict(config.linux.sysctls), shares_pids(config))
        await self._pods.make_pod(spec, request.options, defaults)
        self._manager.kept = self._id

    async def start_sandbox(
        self, _ctx: object, request: messages.StartSandboxRequest
    ) -> messages.StartSandboxResponse:
        """Boot its VM; the same answer again if it is up."""
        pod = self._pod(request.sandbox_id)
        await pod.start()
        response = messages.StartSandboxResponse(pid=pod.sandbox.vmm_pid)
        response.created_at.FromNanoseconds(pod.started_at)
        return response

    async def platform(self, _ctx: object, request: messages.PlatformRequest) -> messages.PlatformResponse:
        """What its containers' images must be made for."""
        self._pod(request.sandbox_id)
        machine = os.uname().machine
        response = messages.PlatformResponse()
        response.platform.os = "linux"
        response.platform.architecture = _ARCHITECTURES.get(machine, machine)
        return response

    async def stop_sandbox(
        self, _ctx: object, request: messages.StopSandboxRequest
    ) -> messages.StopSandboxResponse:
        """End its VM, and containers in it that still run; they are given `timeout_secs` if that is set."""
        await self._pod(request.sandbox_id).stop(request.timeout_secs)
        return messages.StopSandboxResponse()

    async def wait_sandbox(
        self, _ctx: object, request: messages.WaitSandboxRequest
    ) -> messages.WaitSandboxResponse:
        """Answer when it has ended, by whatever cause; at once if it has."""
        ended = await self._pod(request.sandbox_id).wait()
        response = messages.WaitSandboxResponse(exit_status=ended.status)
        response.exited_at.FromNanoseconds(ended.at)
        return response

    async def sandbox_status(
        self, _ctx: object, request: messages.SandboxStatusRequest
    ) -> messages.SandboxStatusResponse:
        """Whether it is ready; from the host's books, within any deadline."""
        pod = self._pod(request.sandbox_id)
        response = messages.SandboxStatusResponse(
            sandbox_id=self._id,
            pid=pod.sandbox.vmm_pid,
            state="SANDBOX_READY" if pod.state is State.READY else "SANDBOX_NOTREADY",
        )
        if pod.started_at:
            response.created_at.FromNanoseconds(pod.started_at)
        if pod.ended.done():
            response.exited_at.FromNanoseconds(pod.ended.result().at)
        if request.verbose:
            response.info.update(await describe(pod.sandbox, self._pods.trace))
        return response

    async def ping_sandbox(self, _ctx: object, request: messages.PingRequest) -> messages.PingResponse:
        """Whether VMM and agent answer now. Raises what they did instead."""
        pod = self._pod(request.sandbox_id)
        pod.check(Call.PING)
        await pod.sandbox.check(_PING_DEADLINE)
        return messages.PingResponse()

    async def shutdown_sandbox(
        self, _ctx: object, request: messages.ShutdownSandboxRequest
    ) -> messages.ShutdownSandboxResponse:
        """Stop it if it was not, and end the shim."""
        self._check_id(request.sandbox_id)
        async with self._creating:
            pod = self._pods.pod
            if pod is None and not self._manager.idle:
                raise CallerError(
                    "this shim has containers without a sandbox: failed precondition",
                    code="FAILED_PRECONDITION",
                )
            if pod is not None:
                await pod.stop(0)
            self._shutdown()
        return messages.ShutdownSandboxResponse()

    async def sandbox_metrics(
        self, _ctx: object, request: messages.SandboxMetricsRequest
    ) -> messages.SandboxMetricsResponse:
        """What its processes use of the host."""
        pod = self._pod(request.sandbox_id)
        pod.check(Call.METRICS)
        response = messages.SandboxMetricsResponse()
        response.metrics.id = self._id
        response.metrics.timestamp.GetCurrentTime()
        response.metrics.data.CopyFrom(await measure(pod.sandbox))
        return response
