"""What the agent's tests share: a subreaper, a crun that needs no namespaces, short socket paths."""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.container import Container
from agent.crun import Crun
from agent.reaper import Reaper
from agent.stdio.streams import StreamListener

_PR_SET_CHILD_SUBREAPER = 36
FAKE_CRUN = str(Path(__file__).parent / "fake_crun.py")


@pytest.fixture
def short_dir() -> Iterator[str]:
    """A directory whose sockets' paths fit into sun_path."""
    made = tempfile.mkdtemp(prefix="ag-", dir="/tmp")
    yield made
    shutil.rmtree(made)


@pytest.fixture
async def orphans() -> AsyncIterator[Reaper]:
    """A reaper that inherits its grandchildren as PID 1 does."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    reaper = Reaper(asyncio.get_running_loop())
    reaper.start()
    yield reaper
    reaper.stop()
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


class Host:
    """The host's side of the streams: `open` gives a connection that has named itself."""

    def __init__(self, directory: str) -> None:
        self.path = f"{directory}/streams"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen(64)
        self.listener = StreamListener(asyncio.get_running_loop(), listener)
        self._sockets: list[socket.socket] = []

    def connect(self) -> socket.socket:
        """A connection that has said nothing yet."""
        made = socket.socket(socket.AF_UNIX)
        made.connect(self.path)
        made.setblocking(False)
        self._sockets.append(made)
        return made

    def open(self, stream: int) -> socket.socket:
        """A named connection."""
        made = self.connect()
        made.send(stream.to_bytes(4, "big"))
        return made

    def close(self) -> None:
        """Close everything."""
        self.listener.close()
        for one in self._sockets:
            one.close()


@pytest.fixture
async def host(short_dir: str) -> AsyncIterator[Host]:
    """See Host."""
    made = Host(short_dir)
    yield made
    made.close()


class Box:
    """Makes containers run by the fake crun."""

    def __init__(self, directory: str, reaper: Reaper, listener: StreamListener | None) -> None:
        self.directory = directory
        self.reaper = reaper
        self.listener = listener
        os.mkdir(f"{directory}/root")
        self.crun = Crun(reaper, directory, f"{directory}/root", FAKE_CRUN)
        self.made: list[Container] = []

    def container(self, *args: str, terminal: bool = False, listener: bool = True) -> Container:
        """Not created yet."""
        config: dict[str, Any] = {
            "process": {"terminal": terminal, "args": list(args)},
            "mounts": [],
            "linux": {"cgroupsPath": "/nonexistent", "namespaces": []},
        }
        name = f"c{len(self.made)}"
        made = Container(
            name,
            config,
            bundle=f"{self.directory}/{name}",
            crun=self.crun,
            reaper=self.reaper,
            listener=self.listener if listener else None,
        )
        self.made.append(made)
        return made


@pytest.fixture
async def box(short_dir: str, orphans: Reaper, host: Host) -> AsyncIterator[Box]:
    """See Box."""
    made = Box(short_dir, orphans, host.listener)
    yield made
    for container in made.made:
        processes = [container.init, *container.execs.values()]
        for process in processes:
            if process is not None:
                if process.alive:
                    os.kill(process.pid, 9)
                    await process.wait()
                process.stdio.close()


async def read_stream(connection: socket.socket) -> bytes:
    """Everything up to the end frame; then closes, as the host does."""
    loop = asyncio.get_running_loop()

    async def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = await loop.sock_recv(connection, count - len(data))
            if not part:
                raise EOFError(f"the stream broke off after {len(data)} bytes")
            data += part
        return data

    async def all_frames() -> bytes:
        result = b""
        while length := int.from_bytes(await exactly(4), "big"):
            result += await exactly(length)
        return result

    result = await asyncio.wait_for(all_frames(), 20)
    connection.close()
    return result


def frame(data: bytes) -> bytes:
    """One frame; b"" is the end."""
    return len(data).to_bytes(4, "big") + data
