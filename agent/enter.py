"""An exec without crun: what `crun exec` would make, by a small program of ours (guest/enter.c).

What: `fits` tells which execs the program can do wholly, `Entrance.enter` has it do one and answers its pid.
Why: under emulation crun takes 0.1 s to be loaded, to read the container's configuration and to make its
processes; the program has no library to load, and is told all that it needs.
Invariants: it does all of what was asked for or nothing. What it does not know (terminals, user namespaces,
labels, listeners of seccomp, a program that is not found) is crun's, in its words: `enter` answers 0, and
no process is left. A pid is believed only if that process is in the container's cgroup: whoever may trace the
new process there could have said another.
The program runs from a sealed copy in memory: what a container reaches by /proc/PID/exe cannot be written.
Source: memfd_create(2); guest/enter.c has the layout of an order.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from agent import log
from agent.reaper import Reaper
from proto.capabilities import NUMBERS

if TYPE_CHECKING:
    from agent.process import Process

__all__ = ["PROGRAM", "Entrance", "fits", "pack", "read_filter"]

PROGRAM = "/usr/lib/kata-agent/enter"
_PROC = "/proc"
_CGROUPS = "/sys/fs/cgroup"
_SPACES = frozenset({"pid", "mount", "network", "ipc", "uts", "cgroup"})
_KEYS = frozenset(
    {
        *("terminal", "user", "args", "env", "cwd", "noNewPrivileges", "capabilities", "rlimits"),
        *("oomScoreAdj", "consoleSize"),
    }
)
_USER_KEYS = frozenset({"uid", "gid", "additionalGids", "username", "umask"})
_LIMIT_NAMES = (
    "CPU FSIZE DATA STACK CORE RSS NPROC NOFILE MEMLOCK AS LOCKS SIGPENDING MSGQUEUE NICE RTPRIO RTTIME"
)
_LIMITS = {f"RLIMIT_{name}": number for number, name in enumerate(_LIMIT_NAMES.split())}
_HEAD = struct.Struct("=5Q4Ii7I")
_LIMIT = struct.Struct("=3Q")
_INSTRUCTION = 8  # bytes of one of a seccomp filter
_FILTER_MOST = 4096  # instructions that the kernel takes
_FILTER_FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 1,
    "SECCOMP_FILTER_FLAG_LOG": 2,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4,
}
_RECORD = struct.Struct("=2I")
_PID, _FAILED = 1, 2
_NO_OOM = 0x7FFFFFFF
_UMASK, _UMASK_MOST = 0o022, 0o7777
_OOM_MOST = 1000
_ABOVE = 16  # the numbers of the program's own descriptors are below
_MOST = 64 * _RECORD.size  # of what the pipe may say: the container can write there for a moment
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

Json = Mapping[str, Any]


def fits(process: Json, config: Json) -> bool:
    """Whether the program can do this exec (`process`) in the container of `config` as crun would."""
    linux, own = config["linux"], config["process"]
    user = process.get("user", {})
    spaces = {entry["type"] for entry in linux.get("namespaces", ())}
    score = _oom_score(process, own)
    return (
        not process["terminal"]
        and process.keys() <= _KEYS
        and user.keys() <= _USER_KEYS
        and spaces <= _SPACES
        and spaces >= {"pid", "mount"}
        and _fits_filter(linux.get("seccomp"))
        and not linux.get("personality")
        and not own.get("apparmorProfile")
        and not own.get("selinuxLabel")
        and not any(key.startswith("run.oci.") for key in config.get("annotations", ()))
        and all(limit["type"] in _LIMITS for limit in process.get("rlimits", ()))
        and bool(process["args"])
        and user.get("umask", _UMASK) in range(_UMASK_MOST + 1)
        and (score == _NO_OOM or score in range(-_OOM_MOST, _OOM_MOST + 1))
        and not any("\0" in text for text in _texts(process, own))
    )


def _oom_score(process: Json, own: Json) -> Any:
    return process.get("oomScoreAdj", own.get("oomScoreAdj", _NO_OOM))


def _fits_filter(seccomp: Json | None) -> bool:
    """A filter that asks nobody, with flags that are known."""
    if not seccomp:
        return True
    actions = [seccomp["defaultAction"], *(rule["action"] for rule in seccomp.get("syscalls", ()))]
    return (
        "SCMP_ACT_NOTIFY" not in actions
        and not seccomp.get("listenerPath")
        and all(flag in _FILTER_FLAGS for flag in seccomp.get("flags", ()))
    )


def read_filter(seccomp: Json | None, path: str) -> tuple[bytes, int] | None:
    """The container's filter as crun has compiled it to `path`, and its flags: without any in the spec, what
    crun takes then. (b"", 0) if it has none, None if it is not there."""
    if not seccomp:
        return b"", 0
    try:
        with open(path, "rb") as file:
            code = file.read()
    except OSError:
        return None
    if not code or len(code) % _INSTRUCTION or len(code) > _FILTER_MOST * _INSTRUCTION:
        return None
    flags = seccomp.get("flags") or ["SECCOMP_FILTER_FLAG_SPEC_ALLOW"]
    return code, sum(_FILTER_FLAGS[flag] for flag in set(flags))


def _texts(process: Json, own: Json) -> list[str]:
    env = process.get("env") or own.get("env", ())
    return [process["cwd"], *process["args"], *env]


def pack(process: Json, own: Json, seccomp: tuple[bytes, int] = (b"", 0)) -> bytes:
    """The order for the program. `own`: the container's process, for what the exec leaves open; `seccomp`:
    see `read_filter`."""
    code, flags = seccomp
    user = process.get("user", {})
    groups = user.get("additionalGids", [])
    limits = process.get("rlimits", [])
    capabilities = process.get("capabilities", own.get("capabilities")) or {}
    sets = [
        sum(1 << NUMBERS[name] for name in set(capabilities.get(kind, ())))
        for kind in ("bounding", "effective", "inheritable", "permitted", "ambient")
    ]
    texts = _texts(process, own)
    body = struct.pack(f"={len(groups) + len(groups) % 2}I", *groups, *[0] * (len(groups) % 2))
    body += b"".join(_LIMIT.pack(_LIMITS[limit["type"]], limit["soft"], limit["hard"]) for limit in limits)
    body += code
    body += b"".join(os.fsencode(text) + b"\0" for text in texts)
    head = _HEAD.pack(
        *sets,
        user.get("uid", 0),
        user.get("gid", 0),
        user.get("umask", _UMASK),
        process["noNewPrivileges"],
        _oom_score(process, own),
        len(groups),
        len(limits),
        len(process["args"]),
        len(texts) - 1 - len(process["args"]),
        len(code) // _INSTRUCTION,
        flags,
        _HEAD.size + len(body),
    )
    return head + body


class Entrance:
    """One per agent; concurrent calls are fine."""

    def __init__(self, reaper: Reaper, program: str = PROGRAM) -> None:
        self._reaper = reaper
        self._program = program
        self._copy = -1

    def _sealed(self) -> int:
        if self._copy < 0:
            with open(self._program, "rb") as file:
                data = file.read()
            copy = os.memfd_create("enter", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.write(copy, data)
                os.fchmod(copy, 0o500)
                fcntl.fcntl(copy, fcntl.F_ADD_SEALS, _SEALS)
                # A descriptor that may write would make the exec fail (ETXTBSY).
                self._copy = os.open(f"/proc/self/fd/{copy}", os.O_RDONLY | os.O_CLOEXEC)
            finally:
                os.close(copy)
        return self._copy

    async def enter(
        self,
        order: bytes,
        init: Process,
        cgroup: str,
        fds: tuple[int, int, int],
        deadline: float,
    ) -> int:
        """The pid of a process made by the order in the container of `init`, which is a child of ours; 0 if
        the program cannot. `cgroup`: the container's, below /sys/fs/cgroup. Raises TimeoutError."""
        since = self._reaper.mark()
        try:
            report = self._spawn(order, init, cgroup, fds)
        except OSError as error:
            log.debug(f"no exec without crun: {error}")
            return 0
        try:
            said = await asyncio.wait_for(_read_all(report), deadline)
        finally:
            os.close(report)
        records = list(_RECORD.iter_unpack(said[: len(said) - len(said) % _RECORD.size]))
        failed = [value for what, value in records if what != _PID]
        pids = [value for what, value in records if what == _PID]
        if failed or len(pids) != 1:
            log.debug(f"no exec without crun: {failed[:1] or 'it ended'}")
            return 0
        pid = int(pids[0])
        if not (self._reaper.has_died(pid, since) or _is_in(pid, cgroup)):
            log.error(f"process {pid} is not in {cgroup}")
            return 0
        return pid

    def _spawn(self, order: bytes, init: Process, cgroup: str, fds: tuple[int, int, int]) -> int:
        """Start the program; the end of its pipe to read from."""
        with contextlib.ExitStack() as opened:

            def above(fd: int) -> int:
                try:
                    made = int(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE))
                finally:
                    os.close(fd)
                opened.callback(os.close, made)
                return made

            program = self._sealed()
            text = above(os.memfd_create("order", os.MFD_CLOEXEC))
            os.write(text, order)
            # Not reaped, as it is alive for us: the pid is its own.
            of_init = above(os.pidfd_open(init.pid))
            directory = above(os.open(cgroup, os.O_DIRECTORY | os.O_RDONLY | os.O_CLOEXEC))
            report, other = os.pipe2(os.O_CLOEXEC)
            try:
                writer = above(other)
                os.set_blocking(report, False)
                stdin, stdout, stderr = fds
                self._reaper.spawn(
                    [f"/proc/self/fd/{program}"],
                    env={},
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    more={3: text, 4: of_init, 5: directory, 6: writer},
                )
            except BaseException:
                os.close(report)
                raise
            return report


def _is_in(pid: int, cgroup: str) -> bool:
    try:
        with open(f"{_PROC}/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return False
    return any(
        f"{line[3:].removesuffix(' (deleted)')}/".startswith(f"{cgroup.removeprefix(_CGROUPS)}/")
        for line in lines
        if line.startswith("0::")
    )


async def _read_all(fd: int) -> bytes:
    """What the pipe says until its end; the rest of what is too much is left there."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    said = bytearray()

    def more() -> None:
        try:
            data = os.read(fd, _MOST)
        except BlockingIOError:
            return
        said.extend(data)
        if (not data or len(said) > _MOST) and not ended.done():
            ended.set_result(None)

    loop.add_reader(fd, more)
    try:
        await ended
    finally:
        loop.remove_reader(fd)
    return bytes(said)
