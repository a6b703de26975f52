"""The pod's localhost: what dials it in the pod's network namespace reaches the guest's.

What: `mirror` has, in the namespace that the VMM stands in, a listener at 127.0.0.1 and ::1 for each TCP
port at which something in the guest listens, and carries each connection to the guest
(`shim.resources.network.relay`). So `kubectl port-forward` works: containerd dials localhost in that
namespace.
Why a listener for each, and not one for all ports by a rule of netfilter: nothing listens where nobody in
the guest does, so who dials there is refused as he would be without a VM; and nothing is left in the
namespace that would have to be removed. The sockets are made by a thread inside and belong to the namespace
for life; they go with the daemon, kill -9 included, and that is why no journal has them.
Invariants: the guest chooses numbers of ports, never an address. At most `PORTS` of a family, the lowest,
and `CONNECTIONS` connections; the guest is asked once in `PACE` seconds at most. A port that is somebody
else's in the namespace stays his. What fails here fails nothing else.
Source: containerd's CRI plugin (sandbox_portforward_linux.go) dials 127.0.0.1, then ::1, in the pod's
namespace.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

import structlog

from devices.errors import KataError
from shim.resources.network.netns import Netns
from shim.resources.network.relay import relay, reset

__all__ = ["CONNECTIONS", "PACE", "PORTS", "LoopbackAgent", "Ports", "mirror"]

#: Ports of a family that are listened at. A shim may have no more than 1024 descriptors.
PORTS = 64
#: Connections at a time, two descriptors each.
CONNECTIONS = 128
#: Seconds between two questions to the guest.
PACE = 0.5
#: Seconds until the guest answers that nothing has changed; ports that could not be had are tried again then.
_WAIT = 30.0
_RETRY = 5.0  # seconds after a question that failed
_BACKLOG = 16
_BURST = 16  # connections that one turn of the loop accepts at a port

_log = structlog.get_logger("network")

Ports = tuple[frozenset[int], frozenset[int]]
"""At 127.0.0.1, at ::1."""
_Key = tuple[int, int]
"""The family, the port."""
_ADDRESSES = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
OpenStream = Callable[[], Awaitable[tuple[socket.socket, int]]]


class LoopbackAgent(Protocol):
    """What is asked of the guest's agent. Each raises KataError."""

    async def has_loopback(self) -> bool:
        """Whether it can do the other two."""
        ...

    async def listening(self, known: Ports, wait: float) -> Ports:
        """The guest's ports, once they are others than `known`, or after `wait` seconds."""
        ...

    async def dial(self, port: int, v6: bool, stream: int) -> None:
        """Join the stream of this number with a new connection to a port of the guest's loopback."""
        ...


async def mirror(pid: int, agent: LoopbackAgent, open_stream: OpenStream) -> None:
    """For the namespace that the process `pid` stands in, until it is cancelled or the guest is gone. Does
    nothing if that is the host's or our own. Never raises but for cancellation."""
    try:
        netns = Netns.open(f"/proc/{pid}/ns/net")
        if netns is None:
            return
        try:
            await _mirror(netns, agent, open_stream)
        finally:
            netns.close()
    except (KataError, OSError) as error:
        _log.warning("the pod's localhost does not reach the guest", error=str(error))


async def _mirror(netns: Netns, agent: LoopbackAgent, open_stream: OpenStream) -> None:
    if not await agent.has_loopback():
        _log.info("the guest's agent is not ours: the pod's localhost does not reach the guest")
        return
    one = _Mirror(netns, agent, open_stream)
    try:
        await one.follow()
    finally:
        await one.close()


class _Mirror:
    """The listeners and connections of one namespace."""

    def __init__(self, netns: Netns, agent: LoopbackAgent, open_stream: OpenStream) -> None:
        self._netns = netns
        self._agent = agent
        self._open_stream = open_stream
        self._listeners: dict[_Key, socket.socket] = {}
        self._not_had: set[_Key] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._full = False

    async def follow(self) -> None:
        """Have listeners where the guest has some."""
        known: Ports = frozenset(), frozenset()
        while True:
            try:
                known = await self._agent.listening(known, _WAIT)
                await self._match(_bounded(known))
            except KataError as error:
                if error.code == "UNAVAILABLE":
                    return  # the agent's connection has ended, and with it this pod
                _log.debug("the guest does not say where it listens", error=str(error))
                await asyncio.sleep(_RETRY)
            except OSError as error:
                _log.warning("the pod's localhost is not the guest's", error=str(error))
                await asyncio.sleep(_RETRY)
            await asyncio.sleep(PACE)

    async def _match(self, wanted: set[_Key]) -> None:
        for key in self._listeners.keys() - wanted:
            self._drop(key)
        missing = sorted(wanted - self._listeners.keys())
        if not missing:
            self._not_had.clear()
            return
        made: dict[_Key, socket.socket] = {}
        try:
            why = await self._netns.run(_listen, missing, made)
        finally:
            loop = asyncio.get_running_loop()
            for key, listener in made.items():
                self._listeners[key] = listener
                loop.add_reader(listener, self._accept, key)
        not_had = set(missing) - made.keys()
        if not_had - self._not_had:
            ports = sorted({port for _, port in not_had})
            _log.info("ports of the pod's localhost cannot be the guest's", ports=ports, why=sorted(why))
        self._not_had = not_had
        _log.debug("the pod's localhost", ports=sorted(self._listeners))

    def _drop(self, key: _Key) -> None:
        listener = self._listeners.pop(key)
        asyncio.get_running_loop().remove_reader(listener)
        listener.close()

    def _accept(self, key: _Key) -> None:
        for _ in range(_BURST):
            try:
                client, _peer = self._listeners[key].accept()
            except BlockingIOError:
                return
            except OSError as error:  # no descriptors: it is made again with the next look
                _log.warning("no connection to the guest's loopback", port=key[1], error=str(error))
                self._drop(key)
                return
            full = len(self._connections) >= CONNECTIONS
            if full:
                reset(client)
                if not self._full:
                    _log.warning("too many connections to the guest's loopback", most=CONNECTIONS)
            else:
                client.setblocking(False)
                task = asyncio.create_task(self._serve(client, key), name=f"loopback {key[1]}")
                self._connections.add(task)
                task.add_done_callback(self._connections.discard)
            self._full = full

    async def _serve(self, client: socket.socket, key: _Key) -> None:
        family, port = key
        try:
            guest, stream = await self._open_stream()
            try:
                await self._agent.dial(port, family == socket.AF_INET6, stream)
            except BaseException:
                guest.close()
                raise
        except (KataError, OSError) as error:
            _log.debug("the guest's loopback did not answer", port=port, error=str(error))
            reset(client)
        except BaseException:
            reset(client)
            raise
        else:
            await relay(client, guest)

    async def close(self) -> None:
        """Nothing of ours listens, and no connection is left."""
        for key in list(self._listeners):
            self._drop(key)
        while self._connections:
            for task in self._connections:
                task.cancel()
            await asyncio.wait(self._connections)


def _bounded(ports: Ports) -> set[_Key]:
    """Of what the guest says: what is a port, the lowest ones, 0 and what is too large left out."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        (family, port)
        for family, some in zip(families, ports, strict=True)
        for port in sorted(one for one in some if 0 < one < 1 << 16)[:PORTS]
    }


def _listen(keys: Iterable[_Key], made: dict[_Key, socket.socket]) -> set[str]:
    """In the namespace: what of it can be had goes into `made`. Why the rest cannot."""
    why: set[str] = set()
    for family, port in keys:
        try:
            listener = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            why.add(str(error.strerror))  # there is no IPv6, or no descriptor
            continue
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past who is in TIME_WAIT
            listener.bind((_ADDRESSES[socket.AddressFamily(family)], port))
            listener.listen(_BACKLOG)
            listener.setblocking(False)
        except OSError as error:
            listener.close()  # it is in use, or lo is down or has no such address
            why.add(str(error.strerror))
        else:
            made[family, port] = listener
    return why
