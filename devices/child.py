"""A supervised child process: VMM, virtiofsd, vsock daemon.

What: `Child.spawn` starts a program in the confinement that its caller states (`devices.confine`), keeps the
last 64 KiB of what it says, notices its death by pidfd, and records it in the undo log.
Why: each VMM and its helpers need exactly this, and none of them may outlive the sandbox.
Invariants:
- What the confinement says is so before the program's first instruction. A step of it that fails is the
  child's end, told with the step and the reason; the program never runs then.
- A child has of the shim what it is given: descriptors by `pass_fds`, an environment of its own.
- The event loop's thread never forks and never changes namespace: one spawner thread does, and goes
  back to its own namespace before it takes the next order.
- That thread lives as long as the process, so PR_SET_PDEATHSIG (which is tied to the *thread* that
  forked) kills the children exactly when the shim is gone. The undo log covers what it cannot. Where they are
  to outlive us (`devices.outlive`) they have none, and hold their stderr open for reading themselves: it
  never breaks, and who has filled it waits for the next reader (`devices.adopted`).
- The undo log knows pid and start time as soon as they exist and forgets them when the child is reaped.
- `exited` resolves after the last bytes of stderr were read, once, with subprocess's convention:
  the exit code, or minus the signal.
- Create the first child only after the process has unshared its mount namespace: threads made
  before would keep the old one.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from devices import confine
from devices.confine import Confinement
from devices.errors import HostError
from devices.mark import marked
from devices.outlive import children_outlive
from devices.syscalls import CLONE_NEWPID, setns, unshare
from devices.tail import TailBuffer
from devices.threads import submit
from devices.undo import Entry, UndoLog

__all__ = [
    "Child",
    "describe_exit",
    "place_children",
    "process_memory",
    "process_start_time",
    "process_stat",
    "thread_ids",
]

_READ_SIZE = 64 << 10
_SPAWN_DEADLINE = 10.0  # seconds; a fork, the steps of a confinement and an exec take about two milliseconds
_REPORT_DEADLINE = 8.0  # of them, until the exec
_REAP_DEADLINE = 10.0  # seconds after SIGKILL; more means a task stuck in the kernel


class _Spawner:
    """The one thread that forks. A forked copy of this process gets a new one."""

    _executor: ThreadPoolExecutor | None = None
    _pid = 0

    @classmethod
    def executor(cls) -> ThreadPoolExecutor:
        if cls._executor is None or cls._pid != os.getpid():
            cls._executor = ThreadPoolExecutor(1, thread_name_prefix="spawner")
            cls._pid = os.getpid()
        return cls._executor


def process_stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third (state) on. Raises ProcessLookupError."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            text = stat.read()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessLookupError(pid) from error
    return text[text.rindex(")") + 2 :].split()  # the name may hold blanks and parentheses


def process_memory(pid: int) -> tuple[int, int]:
    """Resident bytes of the process: its own, and those in memory that it shares (VmRSS less RssShmem,
    and RssShmem, of /proc/PID/status). Raises ProcessLookupError if it is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as status:
            fields = dict(line.split(":", 1) for line in status.read().splitlines() if ":" in line)
    except OSError as error:
        raise ProcessLookupError(pid) from error
    whole, shared = (int(fields.get(key, "0").split()[0]) << 10 for key in ("VmRSS", "RssShmem"))
    return whole - shared, shared


def process_start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat, in clock ticks since boot: with the pid it names a process for good.

    Raises ProcessLookupError when there is no such process.
    """
    return int(process_stat(pid)[19])


def thread_ids(pid: int) -> dict[int, int]:
    """The threads of the process, by the number that each has in the process's own pid namespace.

    Raises ProcessLookupError when there is no such process.
    """
    found = {}
    try:
        for name in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                with open(f"/proc/{pid}/task/{name}/status", encoding="utf-8", errors="replace") as status:
                    line = next(line for line in status if line.startswith("NSpid:"))
                found[int(line.split()[-1])] = int(name)
    except FileNotFoundError as error:
        raise ProcessLookupError(pid) from error
    return found


def describe_exit(status: int) -> str:
    """`status` as in `Child.exited`, in words."""
    if status >= 0:
        return f"exited with code {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Order:
    """What the spawner thread is to start. `cgroups`: files that the child writes itself into."""

    argv: Sequence[str]
    confinement: Confinement
    cgroups: Sequence[str]
    output: int
    stdin: int
    stdout: int
    cwd: str | None
    env: Mapping[str, str]
    pass_fds: Sequence[int]


class _ConfinementError(OSError):
    """A step between fork and exec failed; its text says which."""


_cgroups: tuple[str, ...] = ()


def place_children(files: Sequence[str]) -> None:
    """Have every child from now on write itself into these files (a cgroup's cgroup.procs, or its tasks)
    before it is anything else. One shim is one sandbox: all its children are charged to the same place."""
    global _cgroups  # noqa: PLW0603  (as the cgroup itself: one to a process)
    _cgroups = tuple(files)


def _start(order: _Order) -> subprocess.Popen[bytes]:
    """Runs in the spawner thread: vfork, exec, steps, exec. Raises OSError, HostError; then nothing runs."""
    with contextlib.ExitStack() as opened:

        def held(fd: int) -> int:
            opened.callback(os.close, fd)
            return fd

        one, program = order.confinement, os.path.realpath(order.argv[0])
        network, filtered = -1, -1
        if one.network:
            network = held(os.open(one.network, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        if one.filter:
            filtered = held(os.memfd_create("filter", os.MFD_CLOEXEC))
            os.write(filtered, one.filter)
        cgroups = [held(os.open(path, os.O_WRONLY | os.O_CLOEXEC)) for path in order.cgroups]
        fds = confine.Descriptors(cgroups=cgroups, network=network, filter=filtered)
        words = confine.steps(one, program, fds, dies=not children_outlive())
        reader, report = os.pipe2(os.O_CLOEXEC)
        held(reader)
        process = None
        try:
            with _pid_namespace(one.own_pids):
                process = subprocess.Popen(
                    [confine.HELPER, str(report), *words, "--", program, *order.argv],
                    stdin=order.stdin,
                    stdout=order.output if order.stdout < 0 else order.stdout,
                    stderr=order.output,
                    cwd=order.cwd,
                    env=order.env,
                    pass_fds=[
                        report,
                        *order.pass_fds,
                        *cgroups,
                        *(fd for fd in (network, filtered) if fd >= 0),
                    ],
                    start_new_session=True,
                )
            os.close(report)
            report = -1
            _read_report(reader)
        except BaseException:
            if process is not None:
                process.kill()
                process.wait()
            raise
        finally:
            if report >= 0:
                os.close(report)
        return process


def _read_report(reader: int) -> None:
    """Return once the program runs. Raises OSError for what went wrong between fork and exec."""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    end = time.monotonic() + _REPORT_DEADLINE
    said = b""
    while True:
        if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
            raise _ConfinementError(f"it was not confined within {_REPORT_DEADLINE:g} s")
        more = os.read(reader, 1024)
        said += more
        if not more:  # the end comes with the exec, or with the child's
            break
    done, problem = said.startswith(b"+"), said.removeprefix(b"+").decode(errors="replace")
    if problem:
        number, _, step = problem.partition(" ")
        reason = os.strerror(int(number)) if number.isdigit() else number
        raise _ConfinementError(f"it cannot be confined: {step.strip()}: {reason}")
    if not done:
        raise _ConfinementError("it was killed while it was confined")


@contextlib.contextmanager
def _pid_namespace(wanted: bool) -> Iterator[None]:
    """The next child of the calling thread is the first process of a new one."""
    if not wanted:
        yield
        return
    own = os.open("/proc/thread-self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    try:
        unshare(CLONE_NEWPID)
        try:
            yield
        finally:
            setns(own, CLONE_NEWPID)
    finally:
        os.close(own)


class Child:
    """One child process. Made by `spawn` only."""

    def __init__(
        self,
        name: str,
        pid: int,
        pidfd: int,
        stderr: int,
        undo: UndoLog,
        entry: Entry,
        on_output: Callable[[bytes], None] | None,
        process: subprocess.Popen[bytes] | None = None,
    ) -> None:
        """Owns the descriptors; `stderr` is -1 where nothing can be read."""
        loop = asyncio.get_running_loop()
        self.name = name
        self.pid = pid
        self.exited: asyncio.Future[int] = loop.create_future()
        self.output = TailBuffer()
        self._process = process
        self._stderr = stderr
        self._undo = undo
        self._entry = entry
        self._on_output = on_output
        self._reap_until = 0.0  # by the loop's clock, from the first SIGKILL on
        self._pidfd = pidfd
        loop.add_reader(self._pidfd, self._on_exit)
        if stderr >= 0:
            loop.add_reader(stderr, self._on_stderr)

    @classmethod
    async def spawn(
        cls,
        argv: Sequence[str],
        *,
        name: str,
        undo: UndoLog,
        confinement: Confinement,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        stdin: int = subprocess.DEVNULL,
        stdout: int = -1,
        on_output: Callable[[bytes], None] | None = None,
    ) -> Child:
        """Start `argv` (argv[0] an absolute path) in this confinement; it runs when this returns.

        stdout and stderr go to the same ring, unless `stdout` is a descriptor of the caller's (a `Console`'s
        guest end, for a VMM whose output is the guest's serial port). `on_output` sees each piece too, and
        nothing (b"") at the end; what it does with them must be bounded (`devices.lines`). `env`: what it has
        in its environment beside `devices.confine.environment`. `cwd`: for one without a view, whose
        directory is its root. Raises HostError when the program cannot be started or cannot be confined.
        """
        if not os.access(argv[0], os.X_OK):
            what = "is not executable" if os.path.exists(argv[0]) else "does not exist"
            raise HostError(
                f"cannot start {name}: {argv[0]} {what}",
                phase="spawn",
                hint=f"install {name} or correct its path in the configuration",
            )
        if not os.access(confine.HELPER, os.X_OK):
            raise HostError(
                f"cannot start {name}: {confine.HELPER}, which confines it, is not there",
                phase="spawn",
                hint="make setup builds it, make install installs it",
            )
        entry = undo.record("process", name=name)
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # Only our end is non-blocking: O_NONBLOCK belongs to each end's open file, and a child that
        # gets EAGAIN on stderr loses messages.
        os.set_blocking(writer, True)
        if children_outlive():
            os.close(writer)
            writer = os.open(f"/proc/self/fd/{reader}", os.O_RDWR | os.O_CLOEXEC)
        try:
            order = _Order(
                argv=argv,
                confinement=confinement,
                cgroups=_cgroups,
                output=writer,
                stdin=stdin,
                stdout=stdout,
                cwd=cwd,
                env=marked(confine.environment(env)),
                pass_fds=tuple(pass_fds),
            )
            process = await _finish(submit(_Spawner.executor(), functools.partial(_start, order)))
        except OSError as error:
            os.close(reader)
            undo.forget(entry)
            where = f" in network namespace {confinement.network}" if confinement.network else ""
            hint = "the shim needs root's rights" if isinstance(error, _ConfinementError) else ""
            raise HostError(
                f"cannot start {name} ({argv[0]}){where}: {error}", phase="spawn", hint=hint
            ) from error
        except BaseException:
            os.close(reader)
            undo.forget(entry)
            raise
        finally:
            os.close(writer)
        child = cls(name, process.pid, os.pidfd_open(process.pid), reader, undo, entry, on_output, process)
        entry.release = child.kill
        try:
            with contextlib.suppress(ProcessLookupError):
                undo.update(entry, pid=process.pid, start=process_start_time(process.pid))
        except BaseException:  # it could not be written down
            await child.kill()
            raise
        return child

    @property
    def alive(self) -> bool:
        """Not yet seen to have exited."""
        return not self.exited.done()

    def stderr_tail(self, lines: int = 10) -> str:
        """The last lines it wrote, cleaned of control characters."""
        return self.output.tail(lines)

    def describe(self) -> str:
        """What became of it, in words: for error messages."""
        return describe_exit(self.exited.result()) if self.exited.done() else "is running"

    async def wait(self, timeout: float | None = None) -> int:
        """Its exit status as in `exited`. Raises TimeoutError. Cancelling a waiter harms nobody else."""
        async with asyncio.timeout(timeout):
            return await asyncio.shield(self.exited)

    def send_signal(self, number: int) -> None:
        """Send a signal; a child already gone is fine."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def kill(self) -> None:
        """SIGKILL and reap, also what was stopped (SIGSTOP). Idempotent. Raises HostError if the kernel does
        not end it within ten seconds of the first call."""
        self.send_signal(signal.SIGKILL)
        now = asyncio.get_running_loop().time()
        self._reap_until = self._reap_until or now + _REAP_DEADLINE
        try:
            await self.wait(max(0.0, self._reap_until - now))
        except TimeoutError:
            raise HostError(
                f"{self.name} (pid {self.pid}) did not end {_REAP_DEADLINE:.0f} s after SIGKILL",
                hint=f"see /proc/{self.pid}/stack for where the kernel holds it",
            ) from None

    async def terminate(self, timeout: float) -> None:
        """SIGTERM, then after `timeout` seconds SIGKILL."""
        self.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await self.wait(timeout)
        await self.kill()

    def _on_stderr(self) -> None:
        self._read_stderr(pieces=1)

    def _read_stderr(self, pieces: int) -> None:
        """Read at most `pieces` times, so that a chatty child does not starve the loop."""
        while self._stderr >= 0 and pieces > 0:
            pieces -= 1
            try:
                data = os.read(self._stderr, _READ_SIZE)
            except BlockingIOError:
                return
            if not data:
                self._close_stderr()
                return
            self.output.write(data)
            if self._on_output is not None:
                self._on_output(data)

    def _close_stderr(self) -> None:
        if self._stderr >= 0:
            asyncio.get_running_loop().remove_reader(self._stderr)
            os.close(self._stderr)
            self._stderr = -1
            if self._on_output is not None:
                self._on_output(b"")

    def _on_exit(self) -> None:
        status = self._reap()
        if status is None:
            return
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        if self._process is not None:
            self._process.returncode = status  # Popen must not look for it again
        self._read_stderr(pieces=16)  # a pipe holds 64 KiB; a grandchild may hold it open
        self._close_stderr()
        self._undo.forget(self._entry)
        if not self.exited.done():
            self.exited.set_result(status)

    def _reap(self) -> int | None:
        """Its status as in `exited`; None if it has not ended."""
        try:
            info = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:  # a bug elsewhere; death itself is certain, its reason is lost
            self.output.write(f"\n(somebody else reaped {self.name}, pid {self.pid})\n".encode())
            return 255
        if info is None:
            return None
        return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status


async def _finish(started: asyncio.Future[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Wait for the spawner.

    If we are cancelled meanwhile we still wait (the descriptors it passes on are in use), then kill
    and reap what it made. Raises TimeoutError when a program takes ten seconds to be exec'ed.
    """
    try:
        await asyncio.wait([started], timeout=_SPAWN_DEADLINE)
    except asyncio.CancelledError:
        await asyncio.wait([started], timeout=_SPAWN_DEADLINE)
        started.add_done_callback(_discard)
        raise
    if not started.done():
        started.add_done_callback(_discard)
        raise TimeoutError(f"not started within {_SPAWN_DEADLINE:.0f} s")
    return started.result()


def _discard(started: asyncio.Future[subprocess.Popen[bytes]]) -> None:
    if not started.cancelled() and started.exception() is None:
        process = started.result()
        process.kill()
        process.wait()
