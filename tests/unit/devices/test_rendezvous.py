"""A daemon is met on its socket as soon as it listens; one that dies or dawdles is told in words."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pytest

from devices.child import Child
from devices.confine import Confinement
from devices.errors import HostError
from devices.rendezvous import connect_when_listening
from devices.undo import MemoryUndo
from devices.vsock_daemon import find_vsock_daemon

OPEN = Confinement(view=None, own_pids=False)
LISTENER = """
import socket, sys, time
time.sleep(0.1)
s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); time.sleep(0.02); s.listen(1)
c = s.accept()[0]; c.sendall(b"hi"); c.recv(1)
"""


def test_a_missing_vsock_daemon_is_named_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nope")
    for configured, words in (("/nope/daemon", "/nope/daemon"), ("", "nor vhost-device-vsock on PATH")):
        with pytest.raises(HostError, match=words) as caught:
            find_vsock_daemon(configured)
        assert caught.value.hint


async def test_a_daemon_is_met_as_soon_as_it_listens(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    child = await Child.spawn(
        [sys.executable, "-c", LISTENER, path], name="d", undo=MemoryUndo(), confinement=OPEN
    )
    sock = await connect_when_listening(path, child, 20)
    sock.setblocking(False)

    assert await asyncio.get_running_loop().sock_recv(sock, 10) == b"hi"
    sock.close()
    await child.wait(10)


async def test_a_daemon_that_dies_first_ends_the_wait(tmp_path: Path) -> None:
    child = await Child.spawn(
        ["/bin/sh", "-c", "sleep 0.1; echo broken; exit 3"], name="d", undo=MemoryUndo(), confinement=OPEN
    )
    begin = time.monotonic()
    with pytest.raises(HostError, match=r"d exited with code 3 before it was ready.*broken"):
        await connect_when_listening(str(tmp_path / "s"), child, 60)

    assert time.monotonic() - begin < 20


async def test_a_daemon_that_never_listens_meets_the_deadline(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    child = await Child.spawn(["/bin/sleep", "100"], name="d", undo=MemoryUndo(), confinement=OPEN)
    with pytest.raises(HostError, match="did not listen on its socket within"):
        await connect_when_listening(str(tmp_path / "s"), child, 0.05)
    await child.kill()

    assert len(os.listdir("/proc/self/fd")) == before
