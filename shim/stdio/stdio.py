"""The stdio of one process: its three streams between containerd's ends and the guest.

What: `Stdio.open` takes the host's ends, `connect` opens the guest's (direct mode: a connection per
stream), `run` is for the other mode, `begin_input` opens stdin when the process is about to run, `drain`
waits for the output after the exit, `close` gives all back.
Why one object: a stream that breaks must not touch the other two, yet all of them end together.
Invariants:
- The three streams are independent: each has its own task and its own bounded buffer.
- Nobody reads stdin before Start: see `shim.stdio.stdin` for why.
- The guest's stdin ends after its last byte; at once if containerd gave none. A terminal's stdin
  is never ended: a pty has no EOF of its own, and closing it would hang the program up.
- `drain` is bounded: output that stands still for two seconds, or flows for more than ten, is left
  to flow on until `close`.
- After `close` no task and no descriptor is left, whatever happened before.
Source: design D7; facts/containerd-shim.md 3.1 (stdio).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from devices.errors import CallerError, HostError
from devices.undo import UndoLog
from shim.stdio import pump as stdio_pump
from shim.stdio.ends import InputEnd, OutputEnd, check_input, open_file, open_input, open_output
from shim.stdio.stdin import attend

if TYPE_CHECKING:
    from urllib.parse import SplitResult

    from shim.protocols import AgentClient, Sandbox
    from shim.stdio.logger import Logger

__all__ = ["Stdio", "StdioSpec"]

_log = structlog.get_logger("stdio")

#: Seconds after the exit without a byte moving, and in total, for which the exit waits for output.
DRAIN_IDLE = 2.0
DRAIN_TOTAL = 10.0
_CUT_LIMIT = 0.5  # seconds for copies to let go of their ends


@dataclass(frozen=True, slots=True)
class StdioSpec:
    """What containerd asked for, kept word by word: CRI reopens these paths from State.

    Each is empty (none), the path of a FIFO, or a URL: fifo://, file://, binary://, ttrpc+unix://.
    """

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


class Stdio:
    """Made by `open` only."""

    def __init__(self, spec: StdioSpec) -> None:
        self.spec = spec
        self._input: InputEnd | None = None
        self._input_closed = asyncio.Event()  # CloseIO came, perhaps before the input was opened
        self._copy_input: Callable[[], Awaitable[None]] | None = None
        self._outputs: list[OutputEnd | None] = []
        self._loggers: dict[str, Logger] = {}
        self._sockets: list[socket.socket] = []
        self._input_task: asyncio.Task[None] | None = None
        self._output_tasks: list[asyncio.Task[None]] = []
        self._moved_at = 0.0
        self._lost: set[int] = set()  # outputs whose host end has gone: what comes for them is dropped
        self._runs = False  # the process ran before we were there

    @classmethod
    async def open(cls, spec: StdioSpec, *, container_id: str, namespace: str, undo: UndoLog) -> Stdio:
        """Take the host's ends. Raises CallerError or HostError; nothing is left open then."""
        stdio = cls(spec)
        run = partial(_run_logger, container_id=container_id, namespace=namespace, undo=undo)
        try:
            if spec.stdin and not _is_stream(spec.stdin):
                check_input(_fifo_path(spec.stdin))
            outputs = {"stdout": spec.stdout}
            if not spec.terminal:
                outputs["stderr"] = spec.stderr
            for stream, where in outputs.items():
                end = await stdio._open_output(where, stream, run) if where else None
                stdio._outputs.append(end)
            for logger in stdio._loggers.values():
                for end in (logger.stdout, logger.stderr):
                    if end not in stdio._outputs:
                        end.close()
        except BaseException:
            await stdio.close()
            raise
        return stdio

    @classmethod
    async def again(
        cls, spec: StdioSpec, *, container_id: str, namespace: str, undo: UndoLog, runs: bool
    ) -> Stdio:
        """As `open`, for a process that is there already, and `runs` or waits for its start: a host's end
        that has gone is left out."""
        stdio = cls(spec)
        stdio._runs = runs
        run = partial(_run_logger, container_id=container_id, namespace=namespace, undo=undo)
        try:
            for index, (stream, where) in enumerate((("stdout", spec.stdout), ("stderr", spec.stderr)), 1):
                if index == 2 and spec.terminal:
                    break
                end = None
                if where:
                    try:
                        end = await stdio._open_output(where, stream, run)
                    except (CallerError, HostError) as error:
                        _log.warning(
                            "output is dropped from now on", container=container_id, error=str(error)
                        )
                        stdio._lost.add(index)
                stdio._outputs.append(end)
        except BaseException:
            await stdio.close()
            raise
        return stdio

    @property
    def input_over(self) -> bool:
        """Whether stdin has ended, or is to end, for all that will ever come."""
        return self._input_closed.is_set() or (self._input_task is not None and self._input_task.done())

    async def _open_output(
        self, where: str, stream: str, run_logger: Callable[[SplitResult], Awaitable[Logger]]
    ) -> OutputEnd:
        if "://" not in where:
            return open_output(where, stream)
        if _is_stream(where):
            from shim.stdio.stream import STREAMS

            return STREAMS.output(where)
        from urllib.parse import unquote, urlsplit

        url = urlsplit(where)
        if url.scheme in {"fifo", "pipe"}:
            return open_output(unquote(url.path), stream)
        if url.scheme == "file":
            return open_file(unquote(url.path), stream)
        if url.scheme == "binary":
            if where not in self._loggers:
                self._loggers[where] = await run_logger(url)
            logger = self._loggers[where]
            return logger.stdout if stream == "stdout" else logger.stderr
        raise CallerError(
            f"{stream}: {url.scheme}:// is not supported",
            phase="stdio",
            hint="a FIFO, or fifo://, file://, binary://, ttrpc+unix://",
            code="INVALID_ARGUMENT",
        )

    def begin_input(self) -> None:
        """The process is about to run: take the host's end of stdin, and start to copy.

        Raises CallerError if it has gone since `open`. A second call does nothing.
        """
        if self._input_task is not None or self._copy_input is None:
            return
        if self.spec.stdin:
            self._input = self._open_input(self.spec.stdin)
            if self._input_closed.is_set():
                self._input.end()
        self._input_task = asyncio.create_task(self._feed(self._copy_input))

    def begin_input_again(self) -> None:
        """As `begin_input`, of a process that runs: a stdin that has gone from the host gives nothing more,
        and is no end."""
        with contextlib.suppress(CallerError):
            if not self._input_closed.is_set():
                self.begin_input()

    @staticmethod
    def _open_input(where: str) -> InputEnd:
        if _is_stream(where):
            from shim.stdio.stream import STREAMS

            return STREAMS.input(where)
        return open_input(_fifo_path(where))

    async def _feed(self, copy: Callable[[], Awaitable[None]]) -> None:
        source = self._input
        # Out of descriptors nothing holds stdin open for us: what comes is copied, and then it ends.
        with contextlib.suppress(OSError):
            keeps = self.spec.terminal or self._runs  # who runs already is not to see an end that nobody said
            if source is not None and keeps and not self._input_closed.is_set():
                source.keep()
            elif source is not None and not _is_stream(self.spec.stdin):
                await attend(source, self._outputs, self._input_closed)
        await copy()

    async def connect(self, sandbox: Sandbox) -> tuple[int, int, int]:
        """Direct mode: open a connection for each stream and start to copy output; their names for the agent.

        A stream that containerd left empty has none: 0 tells the agent that it is /dev/null. Raises
        GuestError if the guest does not take a connection; `close` cleans up.
        """
        outputs = enumerate(self._outputs, start=1)
        wanted = {index: out for index, out in outputs if out is not None or index in self._lost}
        has_input = self.spec.stdin and not (self._runs and self._input_closed.is_set())
        opening = {index: self._open_stream(sandbox) for index in ([0] if has_input else []) + [*wanted]}
        # All at once: each is a way to the guest and back. One that fails ends when the others have.
        done = await asyncio.gather(*opening.values(), return_exceptions=True)
        names = [0, 0, 0]
        for index, result in zip(opening, done, strict=True):
            if isinstance(result, BaseException):
                raise result
            sock, names[index] = result
            if index:
                self._copy_output(stdio_pump.socket_to_output(sock, wanted[index], self._moved))
            else:
                self._copy_input = partial(self._input_to_socket, sock)
        return names[0], names[1], names[2]

    async def _open_stream(self, sandbox: Sandbox) -> tuple[socket.socket, int]:
        sock, name = await sandbox.open_stream()
        self._sockets.append(sock)
        return sock, name

    def run(self, agent: AgentClient, container_id: str, exec_id: str) -> None:
        """By the agent's calls: start to copy output. The process exists in the guest by now."""
        reads = (agent.read_stdout, agent.read_stderr)
        for read, out in zip(reads, self._outputs, strict=False):

            async def next_piece(size: int, read: Any = read) -> bytes:
                data: bytes = await read(container_id, exec_id, size)
                return data

            self._copy_output(stdio_pump.calls_to_output(next_piece, out, self._moved))
        self._copy_input = partial(self._input_to_calls, agent, container_id, exec_id)

    def _copy_output(self, copy: Coroutine[Any, Any, None]) -> None:
        self._output_tasks.append(asyncio.create_task(copy))

    def _moved(self) -> None:
        self._moved_at = asyncio.get_running_loop().time()

    async def _input_to_socket(self, sock: socket.socket) -> None:
        assert self._input is not None
        await stdio_pump.input_to_socket(self._input, sock, say_end=not self.spec.terminal)
        self._input.close()
        if not self.spec.terminal:
            sock.close()

    async def _input_to_calls(self, agent: AgentClient, container_id: str, exec_id: str) -> None:
        async def write(data: bytes) -> int:
            return await agent.write_stdin(container_id, exec_id, data)

        if self._input is not None:
            await stdio_pump.input_to_calls(self._input, write)
            self._input.close()
        if not self.spec.terminal:
            await agent.close_stdin(container_id, exec_id)

    def end_input(self) -> None:
        """CloseIO: the process's stdin ends after what was written so far."""
        self._input_closed.set()
        if self._input is not None:
            self._input.end()

    async def until_output_ends(self) -> None:
        """Wait for the end of stdout and stderr, however long that takes."""
        if self._output_tasks:
            await asyncio.wait(self._output_tasks)

    async def drain(self, limits: tuple[float, float] | None = None) -> bool:
        """The process has exited: stop its stdin, wait for its output. False if that took too long.

        `limits`: seconds without progress and in total, instead of DRAIN_IDLE and DRAIN_TOTAL.
        """
        idle, total = limits or (DRAIN_IDLE, DRAIN_TOTAL)
        await self._stop_input()
        loop = asyncio.get_running_loop()
        started = loop.time()
        while pending := [task for task in self._output_tasks if not task.done()]:
            until = min(max(started, self._moved_at) + idle, started + total)
            if until <= loop.time():
                return False
            await asyncio.wait(pending, timeout=until - loop.time())
        return True

    async def cut(self) -> None:
        """Take no more output from a guest that does not answer: readers see its end now. containerd deletes
        a task only when they have."""
        for task in self._output_tasks:
            task.cancel()
        if self._output_tasks:
            await asyncio.wait(self._output_tasks, timeout=_CUT_LIMIT)
        if all(task.done() for task in self._output_tasks):  # else a thread still writes to a file
            for out in self._outputs:
                if out is not None:
                    out.end()

    async def _stop_input(self) -> None:
        if self._input_task is not None:
            await _cancelled([self._input_task])
        if self._input is not None:
            self._input.close()

    async def close(self) -> None:
        """Stop all copies and give every descriptor, connection and logger back. Idempotent."""
        await self._stop_input()
        await _cancelled(self._output_tasks)
        for sock in self._sockets:
            sock.close()
        for out in self._outputs:
            if out is not None:
                out.close()
        loggers, self._loggers = self._loggers, {}
        for logger in loggers.values():
            await logger.close()


async def _run_logger(url: SplitResult, **owner: Any) -> Logger:
    from shim.stdio.logger import Logger  # few have one

    return await Logger.start(url, **owner)


def _is_stream(where: str) -> bool:
    return where.startswith("ttrpc+unix://")


def _fifo_path(where: str) -> str:
    scheme, separator, rest = where.partition("://")
    return rest if separator and scheme in {"fifo", "pipe"} else where


async def _cancelled(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            task.result()  # an error of a copy has been told to nobody on purpose: its stream ended
