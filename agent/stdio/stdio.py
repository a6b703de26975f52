"""A process' standard streams: what crun gets, and what the host gets.

What: `Stdio.open` makes the pipes (or asks for a console), and connects them to the host's stream
connections (direct: the request names them in its *_port fields) or keeps them for ReadStdout and
WriteStdin calls.
Why pipes and not the vsock sockets themselves: programs reopen /dev/stdout and fstat it; that fails
on sockets.
Invariants: by call, the pipe itself is the bounded buffer (64 KiB), so a container that nobody reads
blocks, exactly as with a pipe; in direct mode a stream without an id is /dev/null; the agent's ends
are non-blocking and closed on every path.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import os
import socket
import termios
from collections.abc import Callable

from agent.stdio.pumps import GRACE, LINGER, InPump, OutPump
from agent.stdio.streams import StreamListener
from ttrpc import Code, RpcError

__all__ = ["Ports", "Stdio"]

Ports = tuple[int, int, int]
PIPE = 256 << 10
"""Bytes of a pipe that is pumped: a program and the agent take turns less often than with 64 KiB."""
READ_MAX = 1 << 20  # bytes that one ReadStdout reply carries at most; a message may have 4 MiB


class Stdio:
    """The streams of one process. Use `open`, give `child_fds` to crun, then `spawned()`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, terminal: bool) -> None:
        self._loop = loop
        self.terminal = terminal
        self.child_fds: list[int] = []
        self._connections: list[socket.socket | None] = [None, None, None]
        self._direct = False
        self._ours: list[int] = [-1, -1, -1]  # by call: stdin's write end, stdout's, stderr's read end
        self._console = -1  # the pty's controlling side, for resizing
        self._in_pump: InPump | None = None
        self._out_pumps: list[OutPump] = []
        self._pumped: dict[int, OutPump] = {}  # the same, by stream: 1 or 2
        self._listener: StreamListener | None = None
        self._locks = [asyncio.Lock(), asyncio.Lock(), asyncio.Lock()]
        self._dead = False
        self._waiters: set[Callable[[], None]] = set()  # of calls that wait for a descriptor

    @classmethod
    async def open(cls, listener: StreamListener | None, ports: Ports, *, terminal: bool) -> Stdio:
        """Prepare the streams. Raises RpcError when a named connection does not arrive."""
        stdio = cls(asyncio.get_running_loop(), terminal)
        try:
            await stdio._prepare(listener, ports)
        except BaseException:
            stdio.close()
            raise
        return stdio

    async def _prepare(self, listener: StreamListener | None, ports: Ports) -> None:
        # A host that uses stream connections says by id 0 "this stream is nothing"; one that does
        # not says by it "I shall call".
        self._direct = listener is not None
        self._listener = listener
        for index, port in enumerate(ports):
            if port:
                self._connections[index] = await self._take(port)
        for index in range(3):
            if self.terminal or (self._direct and self._connections[index] is None):
                # With a terminal crun itself needs some descriptors; the container gets the pty.
                self.child_fds.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
                continue
            reader, writer = os.pipe2(os.O_CLOEXEC)
            theirs, ours = (reader, writer) if index == 0 else (writer, reader)
            self.child_fds.append(theirs)
            self._ours[index] = ours
            os.set_blocking(ours, False)
            if index and self._direct:
                with contextlib.suppress(OSError):
                    fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, PIPE)

    async def _take(self, port: int) -> socket.socket:
        if self._listener is None:
            raise RpcError(
                Code.FAILED_PRECONDITION, f"stream {port} was named, but agent.stream_port was not given"
            )
        try:
            return await self._listener.take(port)
        except TimeoutError:
            raise RpcError(
                Code.DEADLINE_EXCEEDED, f"the connection of stream {port} did not arrive"
            ) from None

    async def reattach(self, ports: Ports) -> None:
        """Connections in place of those that ended with their shim; one for a stream that has ended, or was
        never there, is closed. Raises RpcError when one does not arrive."""
        for index, port in enumerate(ports):
            if not port:
                continue
            connection = await self._take(port)
            pump = self._in_pump if index == 0 else self._pumped.get(index)
            if pump is None:
                connection.close()
            else:
                pump.reattach(connection)

    def let_go(self) -> None:
        """The exit has been told: see `OutPump.let_go`."""
        for pump in self._out_pumps:
            pump.let_go()

    def spawned(self) -> None:
        """crun has its descriptors: close our copies of them, or no EOF would ever come."""
        for fd in self.child_fds:
            os.close(fd)
        self.child_fds = []

    def attach_console(self, fd: int, rows: int, columns: int) -> None:
        """Take over the pty that crun sent."""
        os.set_blocking(fd, False)
        self._console = fd
        if rows and columns:
            self.resize(rows, columns)
        if not self._direct:
            self._ours = [os.dup(fd), os.dup(fd), os.dup(fd)]
            return
        stdin, stdout, stderr = self._connections
        self._ours = [os.dup(fd) if stdin else -1, os.dup(fd), -1]
        if stderr is not None:
            stderr.close()  # a terminal has one output
            self._connections[2] = None
        if stdout is None:
            os.close(self._ours[1])
            self._ours[1] = -1

    def start(self) -> None:
        """Begin to pump. Call once the container process exists."""
        if not self._direct:
            return
        stdin, *outputs = self._connections
        if stdin is not None:
            self._in_pump = InPump(self._loop, stdin, self._ours[0])
        for index, connection in enumerate(outputs, start=1):
            if connection is not None:
                self._pumped[index] = OutPump(self._loop, self._ours[index], connection)
        self._out_pumps = list(self._pumped.values())
        self._connections = [None, None, None]
        self._ours = [-1, -1, -1]

    def process_died(self) -> None:
        """Drain the outputs and end them; nobody reads stdin any more."""
        self._set_dead()
        if self._in_pump is not None:
            self._in_pump.abort()
        for pump in self._out_pumps:
            pump.process_died()
        if self._console >= 0:
            os.close(self._console)
            self._console = -1

    def _set_dead(self) -> None:
        self._dead = True
        for wake in list(self._waiters):
            wake()

    def release(self) -> None:
        """The process is forgotten: nobody will call, but sent bytes may still be on their way."""
        if self._direct:
            for pump in self._out_pumps:
                self._loop.call_later(LINGER, pump.abort)
        else:
            self.close()

    def resize(self, rows: int, columns: int) -> None:
        """Set the terminal's size. Raises RpcError(UNAVAILABLE) without one."""
        if self._console < 0:
            raise RpcError(Code.UNAVAILABLE, "the process has no terminal")
        size = array.array("H", [rows & 0xFFFF, columns & 0xFFFF, 0, 0])
        fcntl.ioctl(self._console, termios.TIOCSWINSZ, size)

    def close(self) -> None:
        """Release everything at once."""
        self._set_dead()
        self.spawned()
        if self._in_pump is not None:
            self._in_pump.abort()
        for pump in self._out_pumps:
            pump.abort()
        for index in range(3):
            self._close_ours(index)
        for connection in self._connections:
            if connection is not None:
                connection.close()
        self._connections = [None, None, None]
        if self._console >= 0:
            os.close(self._console)
            self._console = -1

    def _close_ours(self, index: int) -> None:
        fd, self._ours[index] = self._ours[index], -1
        if fd >= 0:
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)
            os.close(fd)

    async def write(self, data: bytes) -> int:
        """WriteStdin: all of `data`, waiting while the process does not read. Empty closes."""
        if not data:
            self.close_stdin()
            return 0
        view = memoryview(data)
        async with self._locks[0]:
            while view:
                fd = self._ours[0]
                if fd < 0 or self._dead:
                    raise RpcError(Code.FAILED_PRECONDITION, "stdin is closed")
                try:
                    view = view[os.write(fd, view) :]
                except BlockingIOError:
                    await self._ready(fd, writing=True)
                except OSError as error:
                    self._close_ours(0)
                    raise RpcError(Code.FAILED_PRECONDITION, f"stdin: {error.strerror}") from None
        return len(data)

    def close_stdin(self) -> None:
        """CloseStdin: the process reads EOF. A terminal has none and stays as it is."""
        if self.terminal:
            return
        if self._in_pump is not None:
            self._in_pump.abort()
        self._close_ours(0)

    async def read(self, index: int, length: int) -> bytes:
        """ReadStdout (1) or ReadStderr (2): at least one byte, or b"" at the end."""
        async with self._locks[index]:
            while True:
                fd = self._ours[index]
                if fd < 0:
                    return b""
                try:
                    data = os.read(fd, min(length or READ_MAX, READ_MAX))
                except BlockingIOError:
                    if await self._ready(fd, writing=False):
                        continue
                    data = b""
                except OSError:
                    data = b""
                if not data:
                    self._close_ours(index)
                return data

    async def _ready(self, fd: int, *, writing: bool) -> bool:
        """Wait until `fd` is ready or the process dies; once it is dead, for `GRACE` at most.

        False: the process is dead and the time is over.
        """
        future: asyncio.Future[None] = self._loop.create_future()

        def wake() -> None:
            if not future.done():
                future.set_result(None)

        if writing:
            self._loop.add_writer(fd, wake)
        else:
            self._loop.add_reader(fd, wake)
        self._waiters.add(wake)
        try:
            await asyncio.wait_for(future, GRACE if self._dead else None)
        except TimeoutError:
            return False
        finally:
            self._waiters.discard(wake)
            if fd in self._ours:  # else it was closed, and its number may be another stream's by now
                self._loop.remove_writer(fd) if writing else self._loop.remove_reader(fd)
        return True
