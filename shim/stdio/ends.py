"""The host's ends of a process's stdio: FIFOs, files and nothing, behind two small classes.

What: `open_input` and `open_output` turn what containerd put into `stdin`, `stdout` or `stderr`
into an `InputEnd` or `OutputEnd`, whose descriptors a pump reads or writes.
Why here: the rules by which FIFOs stay usable while clients come and go are subtle; they stand in
one place.
Invariants:
- No open, read or write blocks the loop: FIFOs are non-blocking, files are written in a thread.
- A FIFO never breaks because a client went away. We hold the other end ourselves: a reader of our
  stdout (no EPIPE, and bytes stay readable after the process has gone), a writer of our stdin
  (no EOF until CloseIO drops it; `InputEnd.keep` takes it, see `shim.stdio.stdin` for when).
- `close` is idempotent and leaves no descriptor.
Source: facts/containerd-shim.md 3.1; fifo(7), open(2).
"""

from __future__ import annotations

import os
import select
import stat

from devices.errors import CallerError

__all__ = ["InputEnd", "OutputEnd", "check_input", "check_path", "open_file", "open_input", "open_output"]


def _close(fd: int) -> int:
    if fd >= 0:
        os.close(fd)
    return -1


class InputEnd:
    """Where the process's stdin comes from: `fd` is readable without blocking; EOF when it ends.

    `keeper` is our own writer, -1 before `keep` and after `end`. `early` holds what `someone_writes` had
    to take out of the FIFO: it comes before what is read from `fd`.
    """

    def __init__(self, fd: int, keeper: int = -1) -> None:
        self.fd = fd
        self.keeper = keeper
        self.early = b""

    def someone_writes(self) -> bool:
        """Whether a client has a FIFO open for writing, waits in its open, or has written something.

        Ask before `keep`. A writer that waits for a reader counts as one: fifo(7), fs/pipe.c.
        """
        try:
            self.early += os.read(self.fd, 1)
        except BlockingIOError:
            return True
        return bool(self.early)

    def keep(self) -> None:
        """Hold a FIFO open for writing ourselves, so that no client's going is its end."""
        if self.keeper < 0 <= self.fd:
            self.keeper = os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def end(self) -> None:
        """CloseIO: from now on stdin ends once it is empty and no client holds it open."""
        self.keeper = _close(self.keeper)

    def close(self) -> None:
        """Give both descriptors back."""
        self.end()
        self.fd = _close(self.fd)


class OutputEnd:
    """Where output goes. `pollable` says whether `fd` can be waited for; else write in a thread.

    `keeper` is our own reader of a FIFO, -1 after `close`.
    """

    def __init__(self, fd: int, keeper: int = -1, *, pollable: bool = True) -> None:
        self.fd = fd
        self.pollable = pollable
        self.keeper = keeper

    def someone_reads(self) -> bool:
        """Whether a client has a FIFO open for reading; False for what is none, and after `end`.

        Our own reader goes for that moment, in which nobody writes. What is in the FIFO stays: pipe(7).
        """
        if self.fd < 0 or self.keeper < 0:
            return False
        self.keeper = _close(self.keeper)
        poll = select.poll()
        poll.register(self.fd, 0)
        alone = bool(poll.poll(0))  # POLLERR: no reader
        self.keeper = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return not alone

    def end(self) -> None:
        """No more output: readers see EOF after the last byte; what nobody read yet stays readable."""
        self.fd = _close(self.fd)

    def close(self) -> None:
        """Give all descriptors back; bytes in a FIFO that no client holds open are lost now."""
        self.end()
        self.keeper = _close(self.keeper)


def check_path(path: str, stream: str) -> str:
    """`path` if it can be one: absolute and without NUL. Raises CallerError."""
    if not path.startswith("/") or "\0" in path:
        raise CallerError(
            f"{stream} must be an absolute path, not {path[:200]!r}", phase="stdio", code="INVALID_ARGUMENT"
        )
    return path


def _unusable(stream: str, path: str, error: OSError) -> CallerError:
    # Not NOT_FOUND, even if the path is missing: clients would take that for a missing task.
    return CallerError(f"cannot open {stream} {path}: {error.strerror}", phase="stdio")


def check_input(path: str) -> None:
    """Raise CallerError unless there is a FIFO at `path`; it is opened later."""
    check_path(path, "stdin")
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise _unusable("stdin", path, error) from error
    if not stat.S_ISFIFO(mode):
        raise CallerError(f"stdin {path} is not a FIFO", phase="stdio", code="INVALID_ARGUMENT")


def open_input(path: str) -> InputEnd:
    """The FIFO at `path` as stdin, not kept yet. Raises CallerError if it is missing or not a FIFO."""
    check_path(path, "stdin")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _unusable("stdin", path, error) from error
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise CallerError(f"stdin {path} is not a FIFO", phase="stdio", code="INVALID_ARGUMENT")
    return InputEnd(fd)


def open_output(path: str, stream: str) -> OutputEnd:
    """The FIFO at `path`; anything else that exists there (a file, /dev/null) is appended to.

    Raises CallerError if there is nothing or it may not be opened.
    """
    check_path(path, stream)
    try:
        if not stat.S_ISFIFO(os.stat(path).st_mode):
            flags = os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            return OutputEnd(os.open(path, flags), pollable=False)
        keeper = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return OutputEnd(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC), keeper)
        except BaseException:
            os.close(keeper)
            raise
    except OSError as error:
        raise _unusable(stream, path, error) from error


def open_file(path: str, stream: str) -> OutputEnd:
    """A `file://` log: made if missing (0644), with its directories (0755), and appended to."""
    check_path(path, stream)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC
    try:
        _make_directories(os.path.dirname(path))
        try:
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
            os.fchmod(fd, 0o644)
        except FileExistsError:
            fd = os.open(path, flags | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unusable(stream, path, error) from error
    return OutputEnd(fd, pollable=False)


def _make_directories(path: str) -> None:
    """Those that are missing, for all to look into: who reads logs is seldom root, our umask is 077."""
    if os.path.isdir(path):
        return
    _make_directories(os.path.dirname(path))
    try:
        os.mkdir(path)
    except FileExistsError:
        return  # another process of the pod has the same log
    os.chmod(path, 0o755)  # noqa: S103  (runc's shim makes them so)
