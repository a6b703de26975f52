"""Where the agent is reached: on two listening sockets of vsock, or on a port of virtio-serial.

What: `serve` and `serve_port` run the event loop until the sandbox is destroyed.
Invariants: both serve the same (`_server`). What is loaded before the first answer counts: on the sockets
the rest is loaded after it (`AgentService.preload`), on a port before it is opened, as a template is made of
such a guest.
"""

from __future__ import annotations

import asyncio
from functools import partial

from agent import log
from agent.service import MAY_BE_CANCELLED, AgentService, HealthService
from agent.vsock import Listener
from proto import agent_pb2, health_pb2
from ttrpc import Server

__all__ = ["serve", "serve_port"]


def _server(service: AgentService) -> Server:
    server = Server()
    descriptor = agent_pb2.DESCRIPTOR.services_by_name["AgentService"]
    to_end = [name for name in descriptor.methods_by_name if name not in MAY_BE_CANCELLED]
    server.register(descriptor, service, run_to_end=to_end)
    server.register(health_pb2.DESCRIPTOR.services_by_name["Health"], HealthService())
    for name in ("kata_shim.Recovery", "kata_shim.Loopback"):
        server.register_later(name, partial(_register_ours, server, service, name))
    return server


async def _serve(agent_fd: int, stream_fd: int) -> None:
    service = AgentService(stream_fd)
    server = _server(service)
    listener = Listener(fileno=agent_fd)
    listener.setblocking(False)
    serving = asyncio.ensure_future(server.serve(listener))
    asyncio.get_running_loop().call_soon(service.preload)
    await service.stopped.wait()
    log.debug("the sandbox is destroyed")
    await server.close(1.0)
    await serving


async def _serve_port(name: str) -> None:
    """As a template: all that a pod's first calls need is here before the port is opened."""
    from agent.port import Port
    from agent.warm import warm_up

    service = AgentService(-1)
    server = _server(service)
    _ = service.sandbox
    await warm_up(service.reaper)
    port = await Port.find(name, server)
    await service.stopped.wait()
    port.close()
    await server.close(1.0)


def _register_ours(server: Server, service: AgentService, name: str) -> None:
    from agent.shim_service import register  # asked for when containers run, if ever

    register(server, service.sandbox, name)


def serve(agent_fd: int, stream_fd: int) -> None:
    """Serve on two listening descriptors (`stream_fd` may be -1) until the sandbox is destroyed."""
    asyncio.run(_serve(agent_fd, stream_fd))


def serve_port(name: str) -> None:
    """Serve on the port of virtio-serial with this name until the sandbox is destroyed."""
    asyncio.run(_serve_port(name))
