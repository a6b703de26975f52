"""Publishing task events to containerd.

What: `EventPublisher` implements `EventSink`: it queues, and one task sends in order over ttrpc.
Why: containerd may be away (a restart) or slow while containers live on, and neither may an exit
event get lost nor may a container wait for containerd.
Invariants:
- Order: an event leaves the queue only when containerd answered for it, or refused it for good.
  A reply lost with its connection makes the event arrive twice, never out of order.
- Bounded by what the guest alone can cause: of a container's OOM events one waits, further ones are merged
  into it, which is logged. All other events come of a call of containerd's or of a process's one end, and
  none of them is ever dropped: without an exit its client waits for ever.
- `publish` never blocks, never raises.
- Nothing here waits without a limit: 5 s for a call and for a connection, back-off up to two seconds,
  and `flush` takes the time that it is given. An event is not given up because time goes by.

Source of the envelope's form: containerd's events service, which refuses a zero timestamp and, in
1.6, looks types up by their bare message name.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque

import structlog
from google.protobuf.message import Message

from proto import events_pb2, events_ttrpc_pb2
from ttrpc import Client, Code, ConnectionClosed, RpcError

__all__ = ["EventPublisher"]

_MANY = 2048
"""Events that wait, from which on it is logged that they do; containerd's own shims drop the rest."""
_OOM = "/tasks/oom"  # how often a container ran out of memory is in its statistics
_CALL_TIMEOUT = 5.0  # seconds
_FIRST_DELAY = 0.05  # seconds before the second attempt; doubles
_LAST_DELAY = 2.0  # to dial a socket where nobody listens is cheap; an exit told late is not

# containerd understood and refuses: the same bytes will never be welcome.
_REFUSALS = frozenset({Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED, Code.ALREADY_EXISTS, Code.OUT_OF_RANGE})

_FORWARD = events_ttrpc_pb2.DESCRIPTOR.services_by_name["Events"].methods_by_name["Forward"]

_log = structlog.get_logger("events")


class EventPublisher:
    """Sends events to the ttrpc socket at path `address`; with an empty one it only logs them."""

    def __init__(self, namespace: str, address: str) -> None:
        self._namespace = namespace
        self._address = address.removeprefix("unix://")
        self._queue: deque[events_ttrpc_pb2.ForwardRequest] = deque()
        self._wake = asyncio.Event()  # something is queued
        self._hurry = asyncio.Event()  # no back-off: somebody waits in `flush`
        self._empty = asyncio.Event()
        self._empty.set()
        self._client: Client | None = None
        self._sender: asyncio.Task[None] | None = None
        self._told = _MANY
        self._head: events_ttrpc_pb2.ForwardRequest | None = None  # what is on its way, however often
        self._ooms: dict[bytes, int] = {}  # OOM events that wait and are not on their way; merged into each

    def publish(self, topic: str, event: Message) -> None:
        """Queue `event` (a message of proto.events_pb2) under `topic`. Call it on the event loop."""
        _log.debug("event", topic=topic, type=event.DESCRIPTOR.full_name)
        if not self._address:
            return
        request = events_ttrpc_pb2.ForwardRequest()
        envelope = request.envelope
        envelope.timestamp.FromNanoseconds(time.time_ns())
        envelope.namespace = self._namespace
        envelope.topic = topic
        envelope.event.type_url = event.DESCRIPTOR.full_name
        envelope.event.value = event.SerializeToString()
        if topic == _OOM:
            if envelope.event.value in self._ooms:
                self._ooms[envelope.event.value] += 1
                return
            self._ooms[envelope.event.value] = 0
        self._queue.append(request)
        if len(self._queue) >= self._told:
            self._told *= 2
            _log.warning("events wait for containerd", count=len(self._queue))
        self._empty.clear()
        self._wake.set()
        if self._sender is None:
            self._sender = asyncio.create_task(self._run(), name="event sender")

    @property
    def pending(self) -> int:
        """How many events containerd has not answered for."""
        return len(self._queue)

    async def flush(self, timeout: float) -> bool:
        """Wait until everything is sent, at most `timeout` seconds; whether it was."""
        self._hurry.set()
        try:
            async with asyncio.timeout(timeout):
                await self._empty.wait()
        except TimeoutError:
            return False
        finally:
            self._hurry.clear()
        return True

    async def close(self) -> None:
        """Stop sending; what is still queued is lost, and logged."""
        if self._sender is not None:
            self._sender.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sender
            self._sender = None
        await self._disconnect()
        if self._queue:
            topics = [request.envelope.topic for request in list(self._queue)[:8]]
            _log.warning("events lost: containerd did not take them", count=len(self._queue), first=topics)
            self._queue.clear()
            self._ooms.clear()
            self._empty.set()

    async def _run(self) -> None:
        delay = _FIRST_DELAY
        while True:
            await self._wake.wait()
            if not self._queue:
                self._wake.clear()
                self._empty.set()
                self._told = _MANY
                continue
            request = self._queue[0]
            if request is not self._head:
                self._head = request
                self._begin(request)
            if await self._send(request):
                delay = _FIRST_DELAY
                self._queue.popleft()
                continue
            await self._pause(delay)
            delay = min(delay * 2, _LAST_DELAY)

    def _begin(self, request: events_ttrpc_pb2.ForwardRequest) -> None:
        """It is on its way: what comes from now on happened after it."""
        said = request.envelope.event.value
        if request.envelope.topic == _OOM and (merged := self._ooms.pop(said, 0)):
            container_id = events_pb2.TaskOOM.FromString(said).container_id
            _log.warning(f"{merged} OOM events merged into one", container=container_id)

    async def _pause(self, delay: float) -> None:
        """Wait `delay` seconds, or a tenth of a second when somebody waits for us."""
        if not self._hurry.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._hurry.wait()
                return
        await asyncio.sleep(0.1)

    async def _send(self, request: events_ttrpc_pb2.ForwardRequest) -> bool:
        """Whether `request` is done with: taken by containerd, or refused for good."""
        topic = request.envelope.topic
        try:
            if self._client is None:
                self._client = await Client.connect_unix(self._address, timeout=_CALL_TIMEOUT)
            await self._client.call(
                _FORWARD,
                request,
                timeout=_CALL_TIMEOUT,
                metadata={"containerd-namespace-ttrpc": [self._namespace]},
            )
        except RpcError as error:
            if error.code in _REFUSALS:
                _log.error("event refused by containerd", topic=topic, error=error.message)
                return True
            _log.warning("event not taken yet", topic=topic, code=error.code.name, error=error.message)
        except (ConnectionClosed, OSError, TimeoutError) as error:
            _log.info("containerd is away; event kept", topic=topic, error=str(error) or type(error).__name__)
        else:
            return True
        await self._disconnect()
        return False

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):
                await client.close()
