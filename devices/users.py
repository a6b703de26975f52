"""A user of the host for one sandbox alone: a number from a range, without a name.

What: `take` finds a number that no other sandbox has and writes it down below `DIRECTORY`; `give_back` frees
it again, and ends whatever still runs under it.
Why numbers of their own: a VMM that its guest has taken over is then nobody that owns anything, and no VMM
can send a signal to another one. Why no useradd: the kernel knows numbers only, and what is not in
/etc/passwd need not be taken out again.
Invariants:
- Whoever takes or gives back holds the directory's lock, so no number has two owners.
- The undo log has the number before the file is made. A file is removed only by who made it, which its
  content tells, or if its maker is gone and no process has the number.
- A number is free again only when none of its processes lives.
Source: the range is one that systemd's UIDS-GIDS leaves to nobody, below 2^31.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from devices.child import process_start_time
from devices.confine import MAX_ID
from devices.errors import HostError
from devices.threads import acquire
from devices.undo import Entry, UndoLog

__all__ = ["DIRECTORY", "RANGE", "User", "give_back", "parse_range", "processes_of", "take"]

RANGE = "2000000000-2000065535"
DIRECTORY = os.environ.get("KATA_SHIM_PREFIX", "") + "/run/kata-containers/users"  # elsewhere for tests

_LOCK = ".lock"
_LOCK_TIMEOUT = 5.0  # seconds; it is held for a millisecond
_END_TIMEOUT = 2.0  # seconds for processes that were killed


@dataclass(frozen=True, slots=True)
class User:
    """`id`: the number, also of its group. `entry`: release it to give the number back."""

    id: int
    entry: Entry


def parse_range(text: str) -> range:
    """The numbers of "FIRST-LAST". Raises ValueError."""
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal()):
        raise ValueError("is not FIRST-LAST, such as " + RANGE)
    numbers = range(int(first), int(last) + 1)
    if not numbers or numbers[0] < 1000 or numbers[-1] > MAX_ID:
        raise ValueError(f"is not a range from 1000 to {MAX_ID}")
    return numbers


def take(undo: UndoLog, numbers: range, *, directory: str = DIRECTORY) -> User:
    """A number that nobody else has, recorded in `undo`. Raises HostError. Blocks for a millisecond."""
    own = os.getpid()
    mark = f"{own} {process_start_time(own)} {random.getrandbits(64):x}"
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with _locked(directory):
            number = _free(numbers, directory)
            facts: dict[str, str | int] = {"uid": number, "directory": directory, "mark": mark}
            release = partial(acquire, give_back, facts)
            entry = undo.record("user", release, **facts)
            try:
                _write(os.path.join(directory, str(number)), mark)
            except BaseException:
                undo.forget(entry)
                raise
    except OSError as error:
        raise HostError(
            f"no user for the sandbox: {error.strerror or error}: {error.filename or directory}",
            phase="vmm",
            hint="make room on /run, or set rootless = false, which runs the VMM as root",
        ) from error
    return User(number, entry)


def give_back(facts: Mapping[str, str | int], timeout: float = _END_TIMEOUT) -> None:
    """End what still runs under the number, and free it. Idempotent. Raises OSError. Blocks."""
    number, directory, mark = int(facts["uid"]), str(facts["directory"]), str(facts["mark"])
    path = os.path.join(directory, str(number))
    if _read(path) not in (mark, ""):
        return  # given back already, and taken by another one
    _end_all(number, timeout)
    with contextlib.suppress(FileNotFoundError), _locked(directory):
        if _read(path) in (mark, ""):
            os.unlink(path)


def processes_of(number: int) -> list[int]:
    """The processes that run as this user; zombies hold nothing, and do not count."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal() and _runs_as(int(name), number)]


def _runs_as(pid: int, number: int) -> bool:
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            lines = dict(line.split(b":", 1) for line in file.read(1024).splitlines() if b":" in line)
    except OSError:
        return False
    alive = lines.get(b"State", b"").split()[:1] not in ([b"Z"], [b"X"])
    return alive and b"%d" % number in lines.get(b"Uid", b"").split()


def _end_all(number: int, timeout: float) -> None:
    until = time.monotonic() + timeout
    while pids := processes_of(number):
        if time.monotonic() > until:
            raise OSError(f"processes {pids} of user {number} did not end")
        for pid in pids:
            _kill(pid, number)
        time.sleep(0.005)


def _kill(pid: int, number: int) -> None:
    """Send SIGKILL, to that very process."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            if _runs_as(pid, number):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        finally:
            os.close(fd)


def _free(numbers: range, directory: str) -> int:
    """A number without a file; where all have one, one whose owner is gone."""
    taken = {int(name) for name in os.listdir(directory) if name.isdecimal()}
    start = random.randrange(len(numbers))
    for offset in range(len(numbers)):
        number = numbers[(start + offset) % len(numbers)]
        if number not in taken:
            return number
    for number in numbers:
        path = os.path.join(directory, str(number))
        if not _owned(_read(path)) and not processes_of(number):
            os.unlink(path)
            return number
    raise OSError(f"all {len(numbers)} numbers of rootless_users are taken")


def _owned(mark: str | None) -> bool:
    """Whether the shim that wrote it lives."""
    words = (mark or "").split()
    try:
        return len(words) == 3 and process_start_time(int(words[0])) == int(words[1])
    except (ProcessLookupError, ValueError):
        return False


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[None]:
    fd = os.open(os.path.join(directory, _LOCK), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        _wait_for(lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))
        yield
    finally:
        os.close(fd)


def _wait_for(lock: Callable[[], object]) -> None:
    until = time.monotonic() + _LOCK_TIMEOUT
    while True:
        try:
            lock()
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(0.001)


def _read(path: str) -> str | None:
    """None if there is no such file."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(100)
    except FileNotFoundError:
        return None


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
