"""A client for QMP, QEMU's control protocol: one JSON object per line, over a unix stream socket.

What: `QmpClient.connect` reads the greeting and negotiates; `execute` runs one command under a
deadline; events go to one callback, and to whoever awaits one by `expect`; `sensible` is for who takes an
answer apart.
Why our own: 200 lines without a dependency, and the peer runs guests, so what it sends is bounded
and checked.
Invariants:
- Each command carries an id; replies may come in any order, between events, late or never.
- A peer that breaks the protocol (garbage, a line over 1 MiB, an unknown greeting, an end of stream)
  ends the connection: every pending and every later `execute` raises HypervisorError at once.
- A command that timed out does not: its late reply is dropped.
- One turn of the loop reads 64 KiB at most and takes `TURN` messages, however fast they come.
- Who `expect`s an event before the command that causes it never misses it.
Source: docs/interop/qmp-spec.txt of QEMU 7.2.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json  # to write; what is read goes through foreign_json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from devices import foreign_json
from devices.errors import HypervisorError

__all__ = ["LINE_LIMIT", "NOT_FOUND", "TURN", "QmpClient", "QmpError", "QmpEvent", "sensible"]

NOT_FOUND = "DeviceNotFound"
"""The error class of a device or object that is not there."""
LINE_LIMIT = 1 << 20  # bytes of one message; query-qmp-schema, the longest known reply, has 0.4 MiB
TURN = 64  # messages: a few milliseconds
_READ_SIZE = 64 << 10

QmpEvent = dict[str, Any]
EventHandler = Callable[[QmpEvent], None]


class QmpError(HypervisorError):
    """QEMU's own refusal of a command: `kind` is its error class, such as "GenericError"."""

    def __init__(self, command: str, kind: str, text: str) -> None:
        super().__init__(f"QEMU refused {command}: {text}")
        self.command = command
        self.kind = kind


@contextlib.contextmanager
def sensible(command: str) -> Iterator[None]:
    """Taking the answer to `command` apart: whatever Python says of its shape is QEMU's fault."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, StopIteration) as error:
        raise HypervisorError(f"QEMU's answer to {command} makes no sense: {error!r:.200}") from error


class QmpClient:
    """One QMP connection. Made by `connect` only."""

    def __init__(self, sock: socket.socket, on_event: EventHandler | None) -> None:
        self._sock = sock
        self._on_event = on_event
        self._ids = itertools.count(1)
        self._pending: dict[int, tuple[str, asyncio.Future[Any]]] = {}
        self._expected: list[tuple[Callable[[QmpEvent], bool], asyncio.Future[QmpEvent]]] = []
        self._greeting: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._broken: str | None = None
        self._write_lock = asyncio.Lock()
        self._reader = asyncio.create_task(self._read(), name="qmp reader")

    @classmethod
    async def connect(
        cls, sock: socket.socket, *, timeout: float, on_event: EventHandler | None = None
    ) -> QmpClient:
        """Take over `sock` (connected, non-blocking): greeting and qmp_capabilities.

        Raises HypervisorError; the socket is closed then.
        """
        client = cls(sock, on_event)
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(client._greeting)
            await client.execute("qmp_capabilities", timeout=timeout)
        except TimeoutError:
            await client.close()
            raise HypervisorError(
                f"QEMU's control socket did not answer within {timeout:g} s", code="DEADLINE_EXCEEDED"
            ) from None
        except BaseException:
            await client.close()
            raise
        return client

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float = 5.0,
        fds: Sequence[int] = (),
    ) -> Any:
        """Run `command` and return its `return` value; `fds` go along for getfd and add-fd.

        Raises QmpError when QEMU refuses, HypervisorError when the connection is or gets broken or
        `timeout` seconds pass.
        """
        if self._broken is not None:
            raise HypervisorError(f"cannot send {command} to QEMU: {self._broken}")
        number = next(self._ids)
        message: dict[str, Any] = {"execute": command, "id": number}
        if arguments:
            message["arguments"] = dict(arguments)
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._pending[number] = (command, reply)
        try:
            async with asyncio.timeout(timeout):
                await self._send(json.dumps(message).encode() + b"\n", fds)
                return await reply
        except TimeoutError:
            raise HypervisorError(
                f"QEMU did not answer {command} within {timeout:g} s", code="DEADLINE_EXCEEDED"
            ) from None
        except OSError as error:
            raise HypervisorError(f"cannot send {command} to QEMU: {error}") from error
        finally:
            del self._pending[number]

    @contextlib.contextmanager
    def expect(self, match: Callable[[QmpEvent], bool]) -> Iterator[asyncio.Future[QmpEvent]]:
        """The first event from now on that `match` is true of, as a future to be awaited in the block.

        The future raises HypervisorError when the connection is or gets broken.
        """
        awaited: asyncio.Future[QmpEvent] = asyncio.get_running_loop().create_future()
        awaited.add_done_callback(lambda done: done.cancelled() or done.exception())  # perhaps not awaited
        entry = (match, awaited)
        self._expected.append(entry)
        if self._broken is not None:
            awaited.set_exception(HypervisorError(f"QEMU tells nothing any more: {self._broken}"))
        try:
            yield awaited
        finally:
            self._expected.remove(entry)
            awaited.cancel()

    async def close(self) -> None:
        """End the connection; QEMU goes on. Idempotent."""
        self._break("the connection was closed")
        # By callback, so that it happens after the reader let go of it and though we may be cancelled.
        self._reader.add_done_callback(lambda _: self._sock.close())
        self._reader.cancel()
        await asyncio.wait({self._reader})

    async def _send(self, data: bytes, fds: Sequence[int]) -> None:
        """One message at a time: a cancelled sender that left half a line breaks the connection."""
        loop = asyncio.get_running_loop()
        async with self._write_lock:
            sent = socket.send_fds(self._sock, [data], fds) if fds else 0
            try:
                await loop.sock_sendall(self._sock, data[sent:])
            except BaseException:
                self._break("a command was cut short")
                raise

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        buffer = bytearray()
        try:
            while True:
                data = await loop.sock_recv(self._sock, _READ_SIZE)
                if not data:
                    self._break("it closed its control socket")
                    return
                searched = len(buffer)
                buffer += data
                taken = 0
                while (end := buffer.find(b"\n", searched)) >= 0:
                    line = bytes(buffer[:end])
                    del buffer[: end + 1]
                    searched = 0
                    if line.strip():
                        self._dispatch(line)
                    if self._broken is not None:
                        return
                    taken += 1
                    if taken % TURN == 0:
                        await asyncio.sleep(0)
                await asyncio.sleep(0)  # sock_recv does not, as long as there is something
                if len(buffer) > LINE_LIMIT:
                    self._break(f"it sent a message of more than {LINE_LIMIT >> 20} MiB")
                    return
        except OSError as error:
            self._break(f"its control socket failed: {error}")
        finally:
            self._break("nobody reads its control socket any more")  # if not broken for a reason

    def _dispatch(self, line: bytes) -> None:
        try:
            message = foreign_json.loads(line)
        except ValueError as error:
            self._break(f"it sent something that is no JSON ({str(error)[:100]}): {line[:60]!r}")
            return
        if not isinstance(message, dict):
            self._break(f"it sent something that is no object: {line[:60]!r}")
        elif "QMP" in message:
            if not self._greeting.done():
                self._greeting.set_result(message["QMP"])
        elif "event" in message:
            if self._on_event is not None:
                self._on_event(message)
            for match, awaited in self._expected:
                if not awaited.done() and match(message):
                    awaited.set_result(message)
        elif "id" in message:
            self._settle(message)
        else:  # an error without id: QEMU did not understand what we sent
            self._break(f"it sent a reply to nothing: {line[:200]!r}")

    def _settle(self, reply: dict[str, Any]) -> None:
        number = reply["id"]
        command, waiting = self._pending.get(number, ("", None)) if isinstance(number, int) else ("", None)
        if waiting is None or waiting.done():
            return  # it timed out or was cancelled
        if "return" in reply:
            waiting.set_result(reply["return"])
            return
        error = reply.get("error")
        details = error if isinstance(error, dict) else {}
        kind, text = str(details.get("class", "unknown")), str(details.get("desc", "no reason given"))
        waiting.set_exception(QmpError(command, kind[:100], text[:1000]))

    def _break(self, reason: str) -> None:
        """No more of this connection: everything that waits fails now."""
        if self._broken is not None:
            return
        self._broken = reason
        for command, waiting in self._pending.values():
            if not waiting.done():
                waiting.set_exception(HypervisorError(f"QEMU did not answer {command}: {reason}"))
        for _, awaited in self._expected:
            if not awaited.done():
                awaited.set_exception(HypervisorError(f"QEMU tells nothing any more: {reason}"))
        if not self._greeting.done():
            self._greeting.set_exception(HypervisorError(f"QEMU did not greet: {reason}"))
            self._greeting.exception()  # retrieved: nobody may be waiting
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
