"""The talk with the process around Dragonball: JSON lines on a socket, protocol 1 of docs/dragonball.md.

What: `Talk.ask` sends one action and returns what its answer says; events are passed on as they come.
Why answers have numbers: that to a plug comes when the guest has done its part, and others in between.
Invariants: reading never blocks; a line has at most `LIMIT` bytes, and one turn of the loop takes at most
`_READ_SIZE`; a late answer to what nobody waits for any more is dropped. What is no line of the protocol
ends the connection, and with it all that waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import json  # to write; what is read goes through foreign_json
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

from devices import foreign_json
from devices.errors import HypervisorError, UnsupportedByHypervisor
from devices.plain import plain

__all__ = ["LIMIT", "PROTOCOL", "Talk"]

LIMIT = 1 << 20  # bytes; the longest are the metrics, a few KiB
PROTOCOL = 1
_MOST_ASKED = 64 << 10  # bytes of a line of ours
_READ_SIZE = 64 << 10
_NO_UPCALL = "UpcallServerNotReady"


class Talk:
    """`sock`: connected to the process; owned from here on. `on_event` gets each event but the first."""

    def __init__(self, sock: socket.socket, on_event: Callable[[Mapping[str, Any]], None]) -> None:
        sock.setblocking(False)
        self.refusal = ""  # what it said when it refused an action last
        self._sock: socket.socket | None = sock
        self._why = ""  # there is none any more
        self._on_event = on_event
        self._partial = bytearray()
        self._number = 0
        self._sending = asyncio.Lock()
        loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._hello: asyncio.Future[None] = loop.create_future()
        loop.add_reader(sock.fileno(), self.read)

    async def hello(self, timeout: float) -> None:
        """Return when it has said which protocol it speaks. Raises HypervisorError."""
        await self._within("a greeting", asyncio.shield(self._hello), timeout)

    async def ask(self, name: str, fields: Any = None, *, timeout: float) -> Any:
        """Do one action. Raises HypervisorError: with Dragonball's own words (code FAILED_PRECONDITION) when
        it refuses, UNAVAILABLE when it is gone, DEADLINE_EXCEEDED after `timeout` seconds;
        UnsupportedByHypervisor where it needs the guest's upcall server, and that is not there."""
        self._number += 1
        number = self._number
        action = name if fields is None else {name: fields}
        line = json.dumps({"id": number, "action": action}).encode() + b"\n"
        if len(line) > _MOST_ASKED:
            raise HypervisorError(f"{name} is too long for Dragonball: {len(line)} bytes")
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            return await self._within(name, self._exchange(name, line, answer), timeout)
        finally:
            self._waiting.pop(number, None)

    def read(self) -> None:
        """Take what is there, without waiting."""
        try:
            data = os.read(self._sock.fileno(), _READ_SIZE) if self._sock is not None else b""
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._break("it closed the connection")
            return
        self._partial += data
        while (end := self._partial.find(b"\n")) >= 0:
            line = bytes(self._partial[:end])
            del self._partial[: end + 1]
            try:
                self._see(foreign_json.loads(line))
            except ValueError as error:
                self._break(f"it said no line of the protocol ({str(error)[:100]}): {line[:80]!r}")
                return
        if len(self._partial) > LIMIT:
            self._break(f"it said more than {LIMIT} bytes in one line")

    async def close(self) -> None:
        """Let go of it. Idempotent."""
        self._break("the connection is closed")

    async def _exchange(self, name: str, line: bytes, answer: asyncio.Future[Any]) -> Any:
        async with self._sending:
            if self._sock is None:
                raise HypervisorError(f"Dragonball is not there for {name}: {self._why}")
            try:
                await asyncio.get_running_loop().sock_sendall(self._sock, line)
            except OSError as error:
                self._break(f"it takes nothing: {error.strerror}")
            except BaseException:
                self._break("half a line is on its way")
                raise
        content = await answer
        refused = content.get("error")
        if refused is None:
            return content.get("ok")
        kind, words = _fault(refused)
        self.refusal = f"{name}: {words}"
        if kind == _NO_UPCALL:
            raise UnsupportedByHypervisor("dragonball", f"{name}: {words}")
        raise HypervisorError(f"Dragonball refused {self.refusal}", code="FAILED_PRECONDITION")

    async def _within(self, what: str, work: Any, timeout: float) -> Any:
        try:
            async with asyncio.timeout(timeout):
                return await work
        except TimeoutError:
            raise HypervisorError(
                f"Dragonball did not answer {what} within {timeout:g} s", code="DEADLINE_EXCEEDED"
            ) from None

    def _see(self, content: Any) -> None:
        if not isinstance(content, dict):
            raise ValueError("no object")
        if "event" not in content:
            waiting = self._waiting.get(content["id"]) if isinstance(content.get("id"), int) else None
            if waiting is not None and not waiting.done():
                waiting.set_result(content)
        elif content["event"] != "hello":
            self._on_event(content)
        elif content.get("protocol") != PROTOCOL:
            said = f"{content.get('protocol')!r}"[:50]
            self._break(f"it speaks protocol {said}, and this driver {PROTOCOL}")
        elif not self._hello.done():
            self._hello.set_result(None)

    def _break(self, why: str) -> None:
        if self._sock is None:
            return
        asyncio.get_running_loop().remove_reader(self._sock.fileno())
        self._sock.close()
        self._sock, self._why = None, why
        for waiting in (self._hello, *self._waiting.values()):
            if not waiting.done():
                waiting.set_exception(HypervisorError(f"Dragonball broke off: {why}"))
        with contextlib.suppress(asyncio.InvalidStateError):
            self._hello.exception()  # it may be that nobody asks any more


def _fault(error: Any) -> tuple[str, str]:
    """The kind of a refusal, and its words."""
    kind, causes = (error.get("kind"), error.get("causes")) if isinstance(error, dict) else ("", [])
    said = [text for text in causes[:20] if isinstance(text, str)] if isinstance(causes, list) else []
    return str(kind)[:100], plain(": ".join(said))[:1000] or plain(str(kind))[:100]
