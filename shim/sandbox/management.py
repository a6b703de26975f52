"""The sandbox's management socket: what `kata-ctl direct-volume` asks a running shim.

What: `Management` serves two requests of Kata's shim on `shim-monitor.sock` in the sandbox's state directory:
`/direct-volume/stats?path=VOLUME` and `/direct-volume/resize` with a JSON body. VOLUME is the volume's path
or its disk's.
Why HTTP: Kata's own tools, and storage drivers made for them, speak it. Why so little: a request is a line,
a few headers and a short body, once in a while; one connection is one request.
Invariants: the directory and the socket are root's alone, and the caller's user is asked for besides;
everything read is bounded, and the whole request has a deadline; an error is text, never a traceback.
Source: facts/kata.md 1.13, 1.14; RFC 9112.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import structlog

from devices.device import ChangingHost
from devices.errors import CallerError, KataError
from devices.strict_json import parse
from devices.undo import Entry, UndoLog
from proto import csi_pb2
from shim.resources.direct_volumes import DirectVolumes, VolumeAgent

__all__ = ["SOCKET", "Management"]

SOCKET = "shim-monitor.sock"
_MAX_HEAD = 16 << 10  # bytes
_MAX_BODY = 64 << 10
_MAX_CONNECTIONS = 8
_REQUEST = 10.0  # seconds for the request to arrive
_STATUS = {
    "NOT_FOUND": "404 Not Found",
    "INVALID_ARGUMENT": "400 Bad Request",
    "FAILED_PRECONDITION": "409 Conflict",
    "UNIMPLEMENTED": "501 Not Implemented",
}
_PATH_KEYS = ("VolumePath", "volume_path", "volume_guest_path")  # of Kata's runtimes, the last the newest
_SIZE_KEYS = ("Size", "size")

_log = structlog.get_logger("management")


class Management:
    """See the module's docstring. `agent` answers the agent while the sandbox runs."""

    def __init__(self, volumes: DirectVolumes, host: ChangingHost, agent: Callable[[], VolumeAgent]) -> None:
        self._volumes = volumes
        self._host = host
        self._agent = agent
        self._server: asyncio.Server | None = None
        self._entry: Entry | None = None
        self._undo: UndoLog | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def start(self, directory: str, undo: UndoLog) -> None:
        """Listen. What prevents it is logged: containers do not depend on it."""
        path = os.path.join(directory, SOCKET)
        self._undo, self._entry = undo, undo.record("socket", lambda: _unlink(path), path=path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _unlink(path)  # of a boot of this sandbox that failed
            listener.bind(path)
            os.chmod(path, 0o600)
            self._server = await asyncio.start_unix_server(self._connected, sock=listener, limit=_MAX_HEAD)
        except (OSError, ValueError) as error:
            listener.close()
            _log.warning("volumes cannot be managed", path=path, error=str(error))

    async def close(self) -> None:
        """Stop listening, and end what is under way. Idempotent."""
        if self._server is not None:
            self._server.close()
            for task in self._open:
                task.cancel()
            if self._open:
                await asyncio.wait(self._open)
            self._server = None
        if self._undo is not None and self._entry is not None:
            await self._undo.release(self._entry)
            self._entry = None

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            if len(self._open) <= _MAX_CONNECTIONS and _peer(writer) in (0, os.geteuid()):
                await self._serve(reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            _log.debug("a request was not finished", error=repr(error))
        finally:
            self._open.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST):
                method, target, body = await _read(reader)
            status, text = "200 OK", await self._answer(method, target, body)
        except KataError as error:
            status, text = _STATUS.get(error.code, "500 Internal Server Error"), f"{error}\n"
            _log.warning("a request was refused", error=str(error))
        data = text.encode()
        kind = "application/json" if text.startswith("{") else "text/plain"
        head = (f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(data)}")
        writer.write("\r\n".join((*head, "Connection: close", "", "")).encode() + data)
        async with asyncio.timeout(_REQUEST):
            await writer.drain()

    async def _answer(self, method: str, target: str, body: bytes) -> str:
        url = urlsplit(target)
        if url.path == "/direct-volume/stats" and method in ("GET", "POST"):
            name = (parse_qs(url.query).get("path") or [""])[0]
            return _stats_json(await self._volumes.stats(name, self._agent()))
        if url.path == "/direct-volume/resize" and method == "POST":
            name, size = _resize_request(body)
            _log.info("resizing a volume", volume=name, size=size)
            await self._volumes.resize(name, size, self._agent(), self._host)
            return ""
        raise CallerError(f"there is no {method[:20]} {url.path[:100]}", phase="management", code="NOT_FOUND")


async def _read(reader: asyncio.StreamReader) -> tuple[str, str, bytes]:
    """(method, target, body) of one request. Raises CallerError for what is none."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    line, *headers = head.split("\r\n")
    words = line.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise _malformed("no request line of HTTP/1.1")
    fields = {name.strip().lower(): value.strip() for name, _, value in (h.partition(":") for h in headers)}
    length = fields.get("content-length", "0")
    if "transfer-encoding" in fields or not length.isascii() or not length.isdigit():
        raise _malformed("a body needs its length (Content-Length)")
    if len(length) > 9 or int(length) > _MAX_BODY:
        raise _malformed(f"a body of more than {_MAX_BODY} bytes")
    return words[0], words[1], await reader.readexactly(int(length))


def _resize_request(body: bytes) -> tuple[str, int]:
    try:
        document: Any = parse(body)
        name = next(document[key] for key in _PATH_KEYS if key in document)
        size = next(document[key] for key in _SIZE_KEYS if key in document)
    except (ValueError, TypeError, StopIteration):
        raise _malformed('a resize is {"VolumePath": PATH, "Size": BYTES}') from None
    if not isinstance(name, str) or not isinstance(size, int) or isinstance(size, bool):
        raise _malformed("VolumePath is a text, Size a number")
    return name, size


def _stats_json(stats: csi_pb2.VolumeStatsResponse) -> str:
    """As Kata's agent writes it; the unit is 1 for bytes and 2 for inodes."""
    usage = [
        {"available": each.available, "total": each.total, "used": each.used, "unit": int(each.unit)}
        for each in stats.usage
    ]
    condition = {"abnormal": stats.volume_condition.abnormal, "message": stats.volume_condition.message}
    return json.dumps({"usage": usage, "volume_condition": condition}) + "\n"


def _malformed(text: str) -> CallerError:
    return CallerError(text, phase="management", code="INVALID_ARGUMENT")


def _peer(writer: asyncio.StreamWriter) -> int:
    """The user id of the other end."""
    credentials = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int(struct.unpack("3i", credentials)[1])


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
