"""A VMM's API that is JSON over HTTP/1.1 on a unix socket: Firecracker's, Cloud Hypervisor's.

What: `HttpApi.request` sends one request and returns the answer's JSON; `fault` takes the words of a refusal
out of either VMM's way of saying it. h11 does the protocol; this module does the socket, the order, the
deadlines and the errors.
Why one connection: both serve their API from one thread, one request after the other; a second connection
would only wait behind the first.
Invariants: one request is under way at a time; an answer has at most `ANSWER_LIMIT` bytes, its headers,
chunks and whatever comes before it included, and one turn of the loop takes `TURN` pieces of it; after a
timeout or a broken answer the connection is dropped, never reused; every error says which request it was.
Descriptors go with the first byte of their request, so that they are nobody else's.
Source: Firecracker's OpenAPI description, v1.12 (`fault_message` is its one error field); Cloud Hypervisor's
API of 53.0, whose refusals are an array of texts, the outermost first, and now and then no JSON at all.
"""

from __future__ import annotations

import asyncio
import json  # to write; what is read goes through foreign_json
import socket
from collections.abc import Sequence
from typing import Any

import h11

from devices import foreign_json
from devices.errors import HypervisorError
from devices.plain import plain
from devices.rendezvous import connect_now

__all__ = ["ANSWER_LIMIT", "TURN", "HttpApi", "fault"]

ANSWER_LIMIT = 1 << 20  # bytes; a VM's whole configuration is a few KiB
TURN = 256  # events of h11: a few milliseconds, where each chunk has one byte
_READ_SIZE = 64 << 10


class HttpApi:
    """One VMM's API. `vmm`: its name in errors. `sock`: connected to its API socket; owned from here on.
    `path`: where that socket is, for a VMM that accepts again: the next request after a dropped connection
    makes a new one."""

    def __init__(self, vmm: str, sock: socket.socket, path: str = "") -> None:
        sock.setblocking(False)
        self._vmm = vmm
        self._path = path
        self._sock: socket.socket | None = sock
        self.refusal = ""  # what it said when it refused a request last
        self._http = _protocol()
        self._lock = asyncio.Lock()

    async def get(self, path: str, *, timeout: float) -> Any:
        """The JSON at `path`. Raises as `request`."""
        return await self.request("GET", path, None, timeout=timeout)

    async def put(self, path: str, body: Any = None, *, timeout: float, fds: Sequence[int] = ()) -> Any:
        """Create or do something. Raises as `request`."""
        return await self.request("PUT", path, body, timeout=timeout, fds=fds)

    async def patch(self, path: str, body: Any, *, timeout: float) -> Any:
        """Change something. Raises as `request`."""
        return await self.request("PATCH", path, body, timeout=timeout)

    async def request(
        self, method: str, path: str, body: Any, *, timeout: float, fds: Sequence[int] = ()
    ) -> Any:
        """Send one request, with copies of the descriptors `fds`; the parsed answer, None where it has no
        content.

        Raises HypervisorError: with the VMM's own words (code FAILED_PRECONDITION) when it refuses,
        UNAVAILABLE when it is gone, DEADLINE_EXCEEDED after `timeout` seconds.
        """
        what = f"{method} {path}"
        async with self._lock:
            self._redial(what)
            if self._sock is None:
                raise HypervisorError(f"{self._vmm}'s API is closed; {what} was not sent")
            try:
                async with asyncio.timeout(timeout):
                    status, answer = await self._exchange(method, path, body, fds)
            except TimeoutError:
                self._drop()
                raise HypervisorError(
                    f"{self._vmm} did not answer {what} within {timeout:g} s", code="DEADLINE_EXCEEDED"
                ) from None
            except (OSError, EOFError, h11.ProtocolError) as error:
                self._drop()
                raise HypervisorError(f"{self._vmm} broke off during {what}: {error}") from error
            except BaseException:
                self._drop()  # half a request is on the wire
                raise
        return self._parsed(what, status, answer)

    async def close(self) -> None:
        """Close the connection for good. Idempotent."""
        self._path = ""
        self._drop()

    def _drop(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _redial(self, what: str) -> None:
        if self._sock is None and self._path:
            try:
                self._sock = connect_now(self._path)
            except OSError as error:
                raise HypervisorError(f"{self._vmm} is not there for {what}: {error.strerror}") from error
            self._sock.setblocking(False)
            self._http = _protocol()

    async def _exchange(self, method: str, path: str, body: Any, fds: Sequence[int]) -> tuple[int, bytes]:
        loop = asyncio.get_running_loop()
        assert self._sock is not None
        data = b"" if body is None else json.dumps(body).encode()
        headers = [("Host", "localhost"), ("Accept", "application/json")]
        if data:
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(data)))]
        out = self._http.send(h11.Request(method=method, target=path, headers=headers)) or b""
        if data:
            out += self._http.send(h11.Data(data=data)) or b""
        out += self._http.send(h11.EndOfMessage()) or b""
        if fds:
            # Nothing of ours is under way, so there is room for at least a byte: it never blocks.
            out = out[socket.send_fds(self._sock, [out], list(fds)) :]
        await loop.sock_sendall(self._sock, out)
        status, answer = 0, bytearray()
        total = turn = 0
        while True:
            event = self._http.next_event()
            turn += 1
            if turn % TURN == 0:
                await asyncio.sleep(0)
            if event is h11.NEED_DATA:
                received = await loop.sock_recv(self._sock, _READ_SIZE)
                if not received:
                    raise EOFError("it closed the connection")
                total += len(received)
                if total > ANSWER_LIMIT:
                    raise h11.RemoteProtocolError(f"an answer of more than {ANSWER_LIMIT} bytes")
                self._http.receive_data(received)
            elif isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                answer += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
            elif isinstance(event, h11.ConnectionClosed):
                raise EOFError("it closed the connection")
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        else:
            self._drop()  # it announced that it closes
        return status, bytes(answer)

    def _parsed(self, what: str, status: int, answer: bytes) -> Any:
        good = 200 <= status < 300
        try:
            content = foreign_json.loads(answer) if answer else None
        except ValueError as error:
            if good:
                raise HypervisorError(
                    f"{self._vmm}'s answer to {what} is no JSON ({str(error)[:100]}): {answer[:80]!r}"
                ) from error
            content = [answer[:200].decode(errors="replace")]
        if good:
            return content
        self.refusal = f"{what}: {fault(content) or f'status {status}'}"
        raise HypervisorError(f"{self._vmm} refused {self.refusal}", code="FAILED_PRECONDITION")


def _protocol() -> h11.Connection:
    return h11.Connection(our_role=h11.CLIENT, max_incomplete_event_size=ANSWER_LIMIT)


def fault(content: Any) -> str:
    """What a refusal's content says: one field's text, or a chain of causes; "" if it says nothing."""
    if isinstance(content, dict):
        content = content.get("fault_message")
    if isinstance(content, list):
        content = ": ".join(text for text in content[:20] if isinstance(text, str))
    return plain(content)[:1000] if isinstance(content, str) else ""
