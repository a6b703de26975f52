"""The bytes between one stream of the host and one connection of the guest's loopback.

What: `relay` copies both ways until both have ended. On the stream bytes are framed, as proto/loopback.proto
says.
Why frames: vhost-device-vsock has no half-close and loses what it holds some time after a close, so ends and
resets are said in the data, and the host closes first.
Invariants: one chunk is held for each direction, so back-pressure goes all the way; a half-close stays a
half-close and a reset a reset; both sockets are closed when `relay` is over, however it ends.
"""

from __future__ import annotations

import asyncio
import socket
import struct

__all__ = ["CHUNK", "END", "FRAME_MAX", "LINGER", "RESET", "relay"]

CHUNK = 28668  # with its header one vsock packet (agent/vsock.py)
FRAME_MAX = 65536
LINGER = 10.0  # seconds for the host to close after all is said
END = bytes(4)
RESET = b"\xff\xff\xff\xff"
_HEADER = 4
_NO_LINGER = struct.pack("ii", 1, 0)


async def relay(outer: socket.socket, inner: socket.socket) -> None:
    """`outer` is the host's stream, `inner` the connection; both are owned, and do not block."""
    whole = False
    out, inwards = (
        asyncio.ensure_future(_outwards(inner, outer)),
        asyncio.ensure_future(_inwards(outer, inner)),
    )
    try:
        whole = await _both(out, inwards)
        inwards.cancel()
        await asyncio.wait([inwards])
        async with asyncio.timeout(LINGER):
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(outer, END if whole else RESET)
            while await loop.sock_recv(outer, CHUNK):
                pass  # after a reset the host may still be sending
    except (OSError, TimeoutError):
        pass  # the host has closed the stream, or is gone, or takes its time: it has been told all
    finally:
        for way in (out, inwards):
            way.cancel()
        await asyncio.wait([out, inwards])
        if not whole:
            inner.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        inner.close()
        outer.close()


async def _both(out: asyncio.Future[bool], inwards: asyncio.Future[bool]) -> bool:
    """Whether both ways came to their ends; nothing is being written to the stream any more. Raises OSError
    of the stream."""
    pending: set[asyncio.Future[bool]] = {out, inwards}
    while pending:
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for way in done:
            way.result()
        # A connection that takes no more has been reset, so `out` ends too: not in the middle of a frame.
        if out.done() and not out.result():
            return False
    return inwards.result()


async def _outwards(inner: socket.socket, outer: socket.socket) -> bool:
    """To the host, until the end; whether that was none by a reset. Raises OSError of the stream."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            data = await loop.sock_recv(inner, CHUNK)
        except OSError:
            return False
        if not data:
            await loop.sock_sendall(outer, END)
            return True
        await loop.sock_sendall(outer, len(data).to_bytes(_HEADER, "big") + data)
        await asyncio.sleep(0)


async def _inwards(outer: socket.socket, inner: socket.socket) -> bool:
    """From the host, until the end; whether the connection took it all. Raises OSError of the stream."""
    loop = asyncio.get_running_loop()
    while size := int.from_bytes(await _exactly(outer, _HEADER), "big"):
        if size > FRAME_MAX:
            raise ConnectionAbortedError("the host sent a frame that is none")
        while size:
            data = await _some(outer, min(size, CHUNK))
            size -= len(data)
            try:
                await loop.sock_sendall(inner, data)
            except OSError:
                return False
        await asyncio.sleep(0)
    try:
        inner.shutdown(socket.SHUT_WR)
    except OSError:
        return False
    return True


async def _exactly(outer: socket.socket, size: int) -> bytes:
    data = await _some(outer, size)
    while len(data) < size:
        data += await _some(outer, size - len(data))
    return data


async def _some(outer: socket.socket, size: int) -> bytes:
    data = await asyncio.get_running_loop().sock_recv(outer, size)
    if not data:
        raise ConnectionResetError("the host closed the stream before its end")
    return data
