"""The bytes between a connection of the pod's network namespace and its like on the guest's loopback.

What: `relay` copies both ways between a client's socket and a stream to the guest's agent, until both have
ended. `Frames` takes apart what the guest sends; proto/loopback.proto says what that is.
Why frames: vhost-device-vsock has no half-close and loses what it holds some time after a close, so ends and
resets are said in the data, and the guest waits for us to close.
Invariants: one chunk is held for each direction, so back-pressure goes all the way; a half-close stays a
half-close and a reset a reset; both sockets are closed when `relay` is over, however it ends. A stream that
is always ready yields to everything else after each chunk, and after `TURN` frames of one.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from itertools import islice

from devices.frames import END, FRAME_MAX, HEADER, FrameReader

__all__ = ["CHUNK", "RESET", "TURN", "Frames", "relay", "reset"]

#: Bytes held of each direction.
CHUNK = 28 << 10
#: Frames that one turn of the loop takes apart: half a millisecond.
TURN = 256
RESET = b"\xff\xff\xff\xff"
_NO_LINGER = struct.pack("ii", 1, 0)


class Frames(FrameReader):
    """What the guest sends. `ends`: how often it has said an end, which is an empty payload; `broken`: its
    connection was reset, or it has sent what is no frame."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = 0

    @property
    def broken(self) -> bool:
        """Nothing is read after it."""
        return self.ended

    def begins(self, size: int) -> bool:
        """Data, or one of two ends, after which there is no data."""
        if size:
            return size <= FRAME_MAX and not self.ends
        self.ends += 1
        return self.ends <= 2


def reset(sock: socket.socket) -> None:
    """Close it so that its peer sees a reset, and no end."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    sock.close()


async def relay(client: socket.socket, guest: socket.socket) -> None:
    """Neither blocks, and both are owned. Returns at the end of both ways, or when one of them breaks."""
    whole = False
    try:
        async with asyncio.TaskGroup() as both:
            both.create_task(_to_guest(client, guest))
            both.create_task(_to_client(guest, client))
        whole = True
    except* OSError:
        pass  # whichever side it was, the other one is to see a reset
    finally:
        guest.close()
        if whole:
            client.close()
        else:
            reset(client)


async def _to_guest(client: socket.socket, guest: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(client, CHUNK):
        await loop.sock_sendall(guest, len(data).to_bytes(HEADER, "big") + data)
        await asyncio.sleep(0)
    await loop.sock_sendall(guest, END)


async def _to_client(guest: socket.socket, client: socket.socket) -> None:
    """Returns when the guest has said its second end: it has read ours, and sends nothing more."""
    loop, frames = asyncio.get_running_loop(), Frames()
    buffer = memoryview(bytearray(CHUNK))
    said = False
    while frames.ends < 2:
        count = await loop.sock_recv_into(guest, buffer)
        if not count:
            raise ConnectionResetError("the guest closed the stream before its end")
        payloads = frames.payloads(buffer[:count])
        while some := list(islice(payloads, TURN)):
            data = some[0] if len(some) == 1 else b"".join(some)
            if data:
                await loop.sock_sendall(client, data)
            if frames.ends and not said:
                said = True
                client.shutdown(socket.SHUT_WR)
            await asyncio.sleep(0)
        if frames.broken:
            raise ConnectionResetError("the guest's connection was reset")
