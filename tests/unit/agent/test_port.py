"""What comes through the port reaches the server and comes back whole, and each host meets a new
connection."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import port as port_module
from agent.port import Port
from agent.service import HealthService
from proto import health_pb2
from ttrpc import Client, Server

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]


class Socketed(Port):
    """Its device is a socket; `hosts` are the other ends, one for each time that it was opened."""

    hosts: list[socket.socket]

    def _open(self) -> None:
        host, device = socket.socketpair()
        host.setblocking(False)
        device.setblocking(False)
        self._port = device.detach()
        self._epoll.register(self._port, port_module._EDGES)
        self.hosts = [*getattr(self, "hosts", []), host]


@pytest.fixture
async def port() -> Iterator[Socketed]:  # type: ignore[misc]
    server = Server()
    server.register(HEALTH, HealthService())
    made = Socketed("/dev/vport0p1", server)
    yield made
    made.close()
    await server.close(0.1)
    for host in made.hosts:
        host.close()


async def check(host: socket.socket) -> None:
    client = Client(host.dup())
    answer = await client.call(HEALTH.methods_by_name["Check"], health_pb2.CheckRequest(), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await client.close()


async def test_a_host_calls_through_it_and_so_does_the_next(port: Socketed) -> None:
    await check(port.hosts[0])
    port.hosts[0].send(b"\0\0\0\7half")  # of a message that never ends
    port.hosts[0].close()
    async with asyncio.timeout(10):
        while len(port.hosts) < 2:  # noqa: ASYNC110  (nothing tells)
            await asyncio.sleep(0.01)
    await check(port.hosts[1])


async def test_much_in_both_directions_arrives_whole(port: Socketed) -> None:
    """4 MiB of a refused call there and its answers back, with a host that reads late."""
    client = Client(port.hosts[0].dup())
    calls = [
        client.call(
            HEALTH.methods_by_name["Version"], health_pb2.CheckRequest(service="x" * (1 << 20)), timeout=30
        )
        for _ in range(4)
    ]
    answers = await asyncio.gather(*calls)
    assert all(answer.agent_version for answer in answers)
    await client.close()


async def test_a_host_that_breaks_the_protocol_is_cut_off(port: Socketed) -> None:
    port.hosts[0].send(b"\0\0\0\0\0\0\0\1\2\0")  # an answer, to no question
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(10):
        while await loop.sock_recv(port.hosts[0], 100):
            pass
    assert len(port.hosts) == 2


def test_the_port_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_module, "_PORTS", str(tmp_path))
    assert port_module._path_of("kata.agent") == ""
    for name, text in (("vport0p1", "other\n"), ("vport1p1", "kata.agent\n"), ("vport2p1", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(text)
    (tmp_path / "vport3p1").mkdir()
    assert port_module._path_of("kata.agent") in ("/dev/vport1p1", "")
    (tmp_path / "vport3p1").rmdir()
    assert port_module._path_of("kata.agent") == "/dev/vport1p1"
    assert select.EPOLLET & port_module._EDGES
