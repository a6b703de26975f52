"""`binary://` loggers: a program on the host that takes a container's output.

What: `Logger.start` runs PATH of `binary://PATH?key=value...` with `key value ...` as arguments (a value
that is not there is an empty one), CONTAINER_ID and CONTAINER_NAMESPACE as its environment, stdout of the
container on fd 3, stderr on fd 4, and waits until it closes fd 5: only then is it ready.
Why: nerdctl run -d logs this way, and so does every user of containerd's cio.BinaryIO.
Invariants:
- Starting has a deadline; a logger that does not get ready is killed and reaped.
- It ends by EOF; one that does not is terminated, then killed. It never becomes a zombie.
- The undo log has it from before it runs until it is reaped: after kill -9 of the shim its pipes end too, and
  `delete` gives it the same time, and then the same signals.
- Its pipes are non-blocking on our side only: a slow logger holds up its own container.
Source: containerd's runtime/v2/README.md "Logging"; facts/containerd-shim.md 3.1.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
from urllib.parse import SplitResult, parse_qsl, unquote

from devices.child import process_start_time
from devices.errors import HostError
from devices.undo import Entry, UndoLog
from shim.stdio.ends import OutputEnd, check_path

__all__ = ["Logger"]

_READY_DEADLINE = 10.0
_EOF_GRACE = 3.0
_TERM_GRACE = 1.0
_PF_EXITING = 0x4
_STDOUT, _STDERR, _READY = 3, 4, 5


def _is_exiting(pid: int) -> bool:
    """Whether a child (not reaped yet) is on its way out: its descriptors close before it is a zombie.

    Field 9 of /proc/PID/stat, the task's flags: proc(5), linux/sched.h.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return True
    return bool(int(fields[6]) & _PF_EXITING)


class Logger:
    """One running logger. `stdout` and `stderr` are the write ends of its pipes."""

    def __init__(
        self, path: str, pid: int, stdout: OutputEnd, stderr: OutputEnd, undo: UndoLog, entry: Entry
    ) -> None:
        self.path = path
        self.pid = pid
        self._undo = undo
        self._entry = entry
        self.stdout = stdout
        self.stderr = stderr
        self._pidfd = os.pidfd_open(pid)
        self._gone = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @classmethod
    async def start(
        cls,
        url: SplitResult,
        *,
        container_id: str,
        namespace: str,
        undo: UndoLog,
        deadline: float = _READY_DEADLINE,
    ) -> Logger:
        """Run the logger and wait until it is ready. Raises CallerError or HostError."""
        path = check_path(unquote(url.path), "the logger of a binary:// URL")
        argv = [path]
        arguments: dict[str, str] = {}
        for key, value in parse_qsl(url.query, keep_blank_values=True, max_num_fields=64):
            arguments.setdefault(key, value)  # of a key that is there twice runc's shim takes the first
        for pair in arguments.items():
            argv += pair
        environment = {"CONTAINER_ID": container_id, "CONTAINER_NAMESPACE": namespace}  # and nothing else
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            ends = []
            for child_reads in (True, True, False):
                read, write = os.pipe2(os.O_CLOEXEC)
                child, own = (read, write) if child_reads else (write, read)
                theirs.callback(os.close, child)
                ours.callback(os.close, own)
                os.set_blocking(own, False)
                # Above the numbers they are to get, so that no dup2 overwrites the next one's source.
                high = fcntl.fcntl(child, fcntl.F_DUPFD_CLOEXEC, 10)
                theirs.callback(os.close, high)
                ends.append((high, own))
            entry = undo.record("logger", name=f"the logger {path}"[:200], container=container_id)
            try:
                pid = os.posix_spawn(  # noqa: ASYNC221  (vfork and exec: a millisecond)
                    path,
                    argv,
                    environment,
                    file_actions=[
                        (os.POSIX_SPAWN_DUP2, high, number)
                        for number, (high, _) in zip((_STDOUT, _STDERR, _READY), ends, strict=True)
                    ],
                    setsigmask=(),
                    setsigdef=(signal.SIGPIPE,),
                    setpgroup=0,
                )
            except OSError as error:
                undo.forget(entry)
                raise HostError(
                    f"cannot run the logger {path}: {error.strerror}",
                    phase="stdio",
                    hint="see the --log-driver or log-uri of the container",
                ) from error
            ours.pop_all()
        stdout, stderr, ready = (own for _, own in ends)
        try:
            logger = cls(path, pid, OutputEnd(stdout), OutputEnd(stderr), undo, entry)
        except OSError as error:  # no descriptor to watch it by
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so it is the one; the daemon's reaper will
            undo.forget(entry)
            for fd in (stdout, stderr, ready):
                os.close(fd)
            raise HostError(f"cannot watch the logger {path}: {error.strerror}", phase="stdio") from error
        entry.release = logger.close
        try:
            undo.update(entry, pid=pid, start=process_start_time(pid))  # we reap it: it cannot be gone
            await logger._until_ready(ready, deadline)
        except BaseException:
            logger._signal(signal.SIGKILL)
            await logger.close()
            raise
        finally:
            os.close(ready)
        return logger

    async def _until_ready(self, fd: int, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        loop.add_reader(fd, lambda: None if ready.done() else ready.set_result(None))
        try:
            async with asyncio.timeout(deadline):
                await asyncio.wait([ready, self._gone], return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            raise HostError(
                f"the logger {self.path} was not ready after {deadline:g} s",
                phase="stdio",
                hint="a logger closes its file descriptor 5 when it is ready",
            ) from None
        finally:
            loop.remove_reader(fd)
        if self._gone.done() or _is_exiting(self.pid):
            raise HostError(f"the logger {self.path} ended at once", phase="stdio")

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):  # reaped by somebody else: gone all the same
            if os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG) is None:
                return
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._undo.forget(self._entry)
        self._gone.set_result(None)

    def _signal(self, number: int) -> None:
        if not self._gone.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def close(self) -> None:
        """End its input and see it go: at most four seconds, then it is killed. Idempotent."""
        self.stdout.close()
        self.stderr.close()
        for grace, number in ((_EOF_GRACE, signal.SIGTERM), (_TERM_GRACE, signal.SIGKILL)):
            await asyncio.wait([self._gone], timeout=grace)
            self._signal(number)
        await asyncio.wait([self._gone], timeout=_TERM_GRACE)
