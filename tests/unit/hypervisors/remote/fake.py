"""A hypervisor service in this process: serves Kata's hypervisor.proto, and misbehaves as it is told.

What: `FakeService`, whose calls are kept in `calls`. Each method waits for its event of `holds`, raises what
`refuses` has for it, and answers; `socket` is what CreateVM says.
Source: cloud-api-adaptor's answers: an unknown VM is an error of code UNKNOWN, with a text.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any, Self

from proto import remote_pb2
from ttrpc import CallContext, Code, RpcError, Server

__all__ = ["FakeService"]


class FakeService:
    """See the module's docstring."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "hypervisor.sock")
        self.socket = str(directory / "agent.ttrpc")
        self.calls: list[tuple[str, Any, float | None]] = []
        self.vms: set[str] = set()
        self.holds: dict[str, asyncio.Event] = {}
        self.refuses: dict[str, RpcError] = {}
        self._called = asyncio.Condition()
        self._server = Server()
        self._server.register(remote_pb2.DESCRIPTOR.services_by_name["Hypervisor"], self, run_to_end=True)

    async def __aenter__(self) -> Self:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen()
        self._serving = asyncio.create_task(self._server.serve(listener))
        return self

    async def __aexit__(self, *_error: object) -> None:
        for event in self.holds.values():
            event.set()
        await self._server.close(1)

    async def close(self) -> None:
        """Die."""
        await self._server.close(0)

    @property
    def names(self) -> list[str]:
        """Of the calls so far."""
        return [name for name, _, _ in self.calls]

    async def called(self, name: str) -> None:
        """Return when it was."""
        async with self._called:
            await self._called.wait_for(lambda: name in self.names)

    async def create_vm(self, ctx: CallContext, request: Any) -> Any:
        await self._enter("CreateVM", ctx, request)
        self.vms.add(request.id)
        return remote_pb2.CreateVMResponse(agentSocketPath=self.socket)

    async def start_vm(self, ctx: CallContext, request: Any) -> Any:
        await self._enter("StartVM", ctx, request)
        self._known(request.id)
        return remote_pb2.StartVMResponse()

    async def stop_vm(self, ctx: CallContext, request: Any) -> Any:
        await self._enter("StopVM", ctx, request)
        self._known(request.id)
        self.vms.remove(request.id)
        return remote_pb2.StopVMResponse()

    async def version(self, ctx: CallContext, request: Any) -> Any:
        await self._enter("Version", ctx, request)
        return remote_pb2.VersionResponse(version="0.0.0")

    async def _enter(self, name: str, ctx: CallContext, request: Any) -> None:
        async with self._called:
            self.calls.append((name, request, ctx.deadline))
            self._called.notify_all()
        if name in self.holds:
            await self.holds[name].wait()
        if name in self.refuses:
            raise self.refuses[name]

    def _known(self, vm: str) -> None:
        if vm not in self.vms:
            raise RpcError(Code.UNKNOWN, f"getting sandbox: sandbox {vm} does not exist")
