"""What our own shim asks beyond Kata's protocol: to take over (proto/recovery.proto), and what carries the
pod's localhost (proto/loopback.proto).

What: `register` has a server answer one of the two services.
Why apart from `agent.service`: those are Kata's RPCs, loaded before the first container; these are asked for
when containers run, if ever.
Invariants: as there; a guest whose host opens no streams answers UNIMPLEMENTED.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ttrpc import CallContext, Code, RpcError, Server

if TYPE_CHECKING:
    from agent.network.loopback import Dialler, Watch
    from agent.sandbox import Sandbox
    from agent.stdio.streams import StreamListener
    from proto import loopback_pb2, recovery_pb2

__all__ = ["LoopbackService", "RecoveryService", "register"]


class RecoveryService:
    """kata_shim.Recovery."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    async def reattach(
        self, _: CallContext, request: recovery_pb2.ReattachRequest
    ) -> recovery_pb2.ReattachResponse:
        """New stdio connections for a process."""
        from proto import recovery_pb2

        process = self._sandbox.container(request.container_id).process(request.exec_id)
        await process.stdio.reattach((request.stdin_port, request.stdout_port, request.stderr_port))
        return recovery_pb2.ReattachResponse(alive=process.alive)


class LoopbackService:
    """kata_shim.Loopback."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._dialler: Dialler | None = None
        self._watch: Watch | None = None
        self._own_ports: set[int] = set()

    async def listening(
        self, _: CallContext, request: loopback_pb2.ListeningRequest
    ) -> loopback_pb2.ListeningResponse:
        """The ports of the guest's loopback, once they are others than those known."""
        from proto import loopback_pb2

        known = frozenset(request.known.v4), frozenset(request.known.v6)
        v4, v6 = await self._watcher().wait(known, request.wait_ms / 1000)
        ports = loopback_pb2.LoopbackPorts(v4=sorted(v4), v6=sorted(v6))
        return loopback_pb2.ListeningResponse(ports=ports)

    async def dial(self, _: CallContext, request: loopback_pb2.DialRequest) -> loopback_pb2.DialResponse:
        """A connection of the loopback for one of the host's streams."""
        from agent.network.loopback import Dialler
        from proto import loopback_pb2

        if self._dialler is None:
            self._dialler = Dialler(self._streams(), self._watcher().stir)
        await self._dialler.dial(request.port, request.v6, request.stream)
        return loopback_pb2.DialResponse()

    async def resolve(
        self, _: CallContext, request: loopback_pb2.ResolveRequest
    ) -> loopback_pb2.ResolveResponse:
        """What the guest asks these addresses goes to the host."""
        from agent.network.resolver import Resolver
        from proto import loopback_pb2

        stream = await self._streams().take(request.stream)
        resolver = Resolver()
        try:
            await resolver.start(request.addresses, stream)
        except BaseException:
            resolver.close()
            await resolver.ended()
            stream.close()
            raise
        self._own_ports.update(resolver.ports)
        return loopback_pb2.ResolveResponse()

    def _watcher(self) -> Watch:
        """The one that looks for ports, woken by each process that starts."""
        from agent.network.loopback import Watch

        if self._watch is None:
            self._watch = Watch(self._own_ports)
            self._sandbox.on_start = self._watch.stir
        return self._watch

    def _streams(self) -> StreamListener:
        """Where the host's streams arrive. Raises RpcError."""
        if self._sandbox.streams is None:
            raise RpcError(Code.UNIMPLEMENTED, "there is no port for the host's streams")
        return self._sandbox.streams


def register(server: Server, sandbox: Sandbox, name: str) -> None:
    """`name`: the service's, such as "kata_shim.Loopback"."""
    if name == "kata_shim.Recovery":
        from proto import recovery_pb2

        descriptor = recovery_pb2.DESCRIPTOR.services_by_name["Recovery"]
        server.register(descriptor, RecoveryService(sandbox), run_to_end=True)
    else:
        from proto import loopback_pb2

        descriptor = loopback_pb2.DESCRIPTOR.services_by_name["Loopback"]
        server.register(descriptor, LoopbackService(sandbox), run_to_end=["Dial", "Resolve"])
