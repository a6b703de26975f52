"""systemd is asked for a scope in D-Bus's own bytes; whatever it answers, or does not, is told in time."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.resources.systemd_scope import ScopeError, manages, start_scope

NAMES = ("cri-containerd-x.scope", "kubepods-pod1.slice")


class Systemd:
    """One that takes a call, and answers with these bytes."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(4)
        self.welcome = b"OK 0123456789abcdef0123456789abcdef\r\n"
        self.answer = message(2, b"\x08\x00\x00\x00/jobs/77\0")
        self.said = b""
        self.call = b""
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            with peer, contextlib.suppress(OSError):  # whoever called has given up
                self.said = peer.recv(200)
                peer.sendall(self.welcome)
                data = peer.recv(1 << 16)
                while data and not self.whole(data):
                    data += peer.recv(1 << 16)
                self.call = data.partition(b"BEGIN\r\n")[2]
                for at in range(0, len(self.answer), 7):  # in pieces, as a stream may come
                    peer.sendall(self.answer[at : at + 7])
                if self.answer:
                    time.sleep(0.05)

    @staticmethod
    def whole(data: bytes) -> bool:
        call = data.partition(b"BEGIN\r\n")[2]
        if len(call) < 16:
            return False
        size, _, fields = struct.unpack("<III", call[4:16])
        return bool(len(call) >= 16 + -(-fields // 8) * 8 + size)


def message(kind: int, body: bytes, order: str = "<") -> bytes:
    """An answer with one header field (its serial), padded."""
    field = b"\x05\x01u\x00" + struct.pack(f"{order}I", 1)
    head = (b"l" if order == "<" else b"B") + bytes((kind, 1, 1))
    return head + struct.pack(f"{order}III", len(body), 9, len(field)) + field + body


def error(text: str, order: str = "<") -> bytes:
    return message(3, struct.pack(f"{order}I", len(text)) + text.encode() + b"\0", order)


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    made = Systemd(tmp_path / "private")
    yield made
    made.listener.close()


def ask(systemd: Systemd, *, arrived: bool = True, timeout: float = 10) -> None:
    start_scope(*NAMES, [11, 12], arrived=lambda: arrived, path=systemd.path, timeout=timeout)


def test_the_call(systemd: Systemd) -> None:
    """As systemd reads it: our user, one method, both names, each property with its type, both pids."""
    systemd.answer = message(4, b"") + systemd.answer  # a signal first
    ask(systemd)

    assert systemd.said == b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\n"
    size, serial, fields = struct.unpack("<III", systemd.call[4:16])
    begin = 16 + -(-fields // 8) * 8
    assert (systemd.call[:4], serial, len(systemd.call)) == (b"l\x01\x00\x01", 1, begin + size)
    body = systemd.call[begin:]
    assert body[4:].startswith(NAMES[0].encode() + b"\0")
    words = {b"fail", b"Slice", NAMES[1].encode(), b"Delegate", b"PIDs", b"MemoryAccounting", b"Description"}
    assert all(struct.pack("<I", len(word)) + word + b"\0" in body for word in words)
    assert struct.pack("<III", 8, 11, 12) in body
    assert b"ssa(sv)a(sa(sv))\0" in systemd.call[:begin]
    assert b"StartTransientUnit\0" in systemd.call[:begin]


@pytest.mark.parametrize(
    ("welcome", "answer", "words"),
    [
        (None, error("Unit x.scope was already loaded."), "systemd: Unit x.scope was already loaded"),
        (None, error("No", ">"), "systemd: No"),
        (None, b"", "closed the connection"),
        (None, message(2, b"x" * 30)[:-5], "closed the connection"),
        (None, b"x" * 16, "makes no sense"),
        (None, b"l\x02\x00\x01" + struct.pack("<III", 1 << 30, 1, 0), "makes no sense"),
        (b"REJECTED EXTERNAL\r\n", b"", "does not let us in: b'REJECTED EXTERNAL"),
        (b"x" * 300, b"", "does not speak D-Bus"),
        (b"", b"", "does not speak D-Bus|timed out"),
    ],
)
def test_what_it_may_answer_instead(
    systemd: Systemd, welcome: bytes | None, answer: bytes, words: str
) -> None:
    systemd.answer = answer
    systemd.welcome = systemd.welcome if welcome is None else welcome
    with pytest.raises(OSError, match=words):
        ask(systemd, timeout=1)


def test_processes_that_do_not_arrive_are_told(systemd: Systemd) -> None:
    with pytest.raises(
        ScopeError, match=r"did not move the processes to cri-containerd-x\.scope within 0\.05 s"
    ):
        ask(systemd, arrived=False, timeout=0.05)


def test_a_host_without_it(tmp_path: Path) -> None:
    assert not manages(str(tmp_path / "system"))
    assert manages(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        start_scope(*NAMES, [1], arrived=lambda: True, path=str(tmp_path / "nobody"))
