"""`python -m testing.portforward URL`: standard input to a port of a pod by CRI's stream, and its answer.

What: a client of the URL that CRI's PortForward answers with, as kubelet is one, by WebSocket: the server
tells the port on both channels, then channel 0 has the bytes, channel 1 the error. It ends when as much has
come back as it sent (what it talks to is an echo), with exit code 1 and the text if there is an error.
Why a program: the server listens on localhost of its containerd's network, which is not the test's.
Source: RFC 6455; Kubernetes' k8s.io/kubelet (pkg/cri/streaming/portforward/websocket.go).
"""

from __future__ import annotations

import base64
import os
import socket
import struct
import sys
import threading
from urllib.parse import urlsplit

_PROTOCOL = "v4.channel.k8s.io"
_BINARY, _CLOSE = 2, 8
_CHUNK = 16 << 10
_DEADLINE = 60


class Stream:
    """One WebSocket."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._sock = socket.create_connection((parts.hostname or "", parts.port or 80), _DEADLINE)
        self._file = self._sock.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        lines = (
            f"GET {parts.path} HTTP/1.1",
            f"Host: {parts.netloc}",
            f"Origin: http://{parts.netloc}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
            f"Sec-WebSocket-Protocol: {_PROTOCOL}",
        )
        self._sock.sendall("\r\n".join([*lines, "", ""]).encode())
        status = self._file.readline()
        if b" 101 " not in status:
            raise OSError(f"no WebSocket: {status!r} {self._file.read(1000)!r}")
        while self._file.readline().strip():
            pass

    def send(self, channel: int, data: bytes) -> None:
        """One message of a channel."""
        message = bytes([channel]) + data
        size = len(message)
        head = struct.pack("!BB", 0x80 | _BINARY, 0x80 | min(size, 126))
        head += struct.pack("!H", size) if size >= 126 else b""
        self._sock.sendall(head + bytes(4) + message)  # masked by zeros

    def receive(self) -> tuple[int, bytes]:
        """The next message: its channel, -1 when the server has closed, and its bytes."""
        while True:
            head = self._file.read(2)
            if len(head) < 2:
                return -1, b""
            size = head[1] & 0x7F
            if size >= 126:
                form, width = ("!H", 2) if size == 126 else ("!Q", 8)
                (size,) = struct.unpack(form, self._file.read(width))
            message = self._file.read(size)
            if head[0] & 0xF == _CLOSE:
                return -1, b""
            if message:
                return message[0], message[1:]

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._sock.close()


def main() -> int:
    """The command line."""
    data = sys.stdin.buffer.read()
    stream = Stream(sys.argv[1])

    def send() -> None:
        for begin in range(0, len(data), _CHUNK):
            stream.send(0, data[begin : begin + _CHUNK])

    told = [stream.receive()[0] for _ in range(2)]  # the port's number, on both
    if sorted(told) != [0, 1]:
        raise OSError(f"channels {told}")
    threading.Thread(target=send, daemon=True).start()
    seen = b""
    while len(seen) < len(data):
        channel, piece = stream.receive()
        if channel != 0:
            print(f"after {len(seen)} bytes: {piece!r}" if channel == 1 else "closed", file=sys.stderr)
            return 1
        seen += piece
    stream.close()
    sys.stdout.buffer.write(seen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
