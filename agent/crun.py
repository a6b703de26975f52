"""Running `crun`, the OCI runtime inside the guest.

What: argument lists, their execution with a deadline, and the translation of crun's complaints into
statuses that name the fault.
Why a program and not a library: crun is what Debian maintains; its state under `ROOT` is the only
thing shared with it.
Invariants: every run has a deadline and is killed at it; crun's own message is bounded to
`MESSAGE_MAX` characters and one line, because parts of it come from the container's image. Each container has
a root of crun's to itself: what crun keeps there of seccomp filters (1.21, 1.28) it finds again by a sum that
leaves out which errno they give, so a container would get another one's filter.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

from agent.reaper import Reaper
from ttrpc import Code, RpcError

__all__ = ["ENV", "ROOT", "Crun", "complaint", "unique"]

ROOT = "/run/crun"
PROGRAM = "/usr/bin/crun"
ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "XDG_RUNTIME_DIR": "/run"}
MESSAGE_MAX = 800
# libc's putenv looks through all variables for each (guest/environment.c).
_FEW = 200
_MANY = {"LD_PRELOAD": "/usr/lib/kata-agent/environment.so"}
# What crun says of a spec that asks for something impossible.
_WRONG_SPEC = (
    "executable file",
    "permission denied",
    "cannot find",
    "invalid rlimit",
    "invalid seccomp",  # 1.28: "seccomp get action"
    "seccomp get ",
    "seccomp unknown",
    "invalid namespace",
    "the sysctl",
    "controller `",  # with "is not available"; 1.28 leaves out that it is a cgroup's
    "the specified key has not the form",
    "unknown personality",
)
DEADLINE = 60.0  # seconds; crun works for 0.2 s even under emulation


def complaint(what: str, text: str, code: int) -> RpcError:
    """The status for a failed crun run, from the last line that it wrote."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    message = " ".join(lines[-1].split())[:MESSAGE_MAX] if lines else f"crun ended with status {code}"
    lowered = message.lower()
    if any(words in lowered for words in _WRONG_SPEC):
        status = Code.INVALID_ARGUMENT
    elif "does not exist" in lowered and "container" in lowered:
        status = Code.NOT_FOUND
    else:
        status = Code.INTERNAL
    return RpcError(status, f"{what}: {message}")


def unique(variables: list[str]) -> list[str]:
    """Each variable once, the last of its name, as putenv(3) takes them one by one: without "=" it goes."""
    found: dict[str, str] = {}
    for variable in variables:
        name, equals, _ = variable.partition("=")
        if equals:
            found[name] = variable
        else:
            found.pop(name, None)
    return list(found.values())


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(16384).decode(errors="replace")
    except OSError:
        return ""


class Crun:
    """One per agent; concurrent runs are fine."""

    def __init__(self, reaper: Reaper, work_dir: str, root: str = ROOT, program: str = PROGRAM) -> None:
        self._reaper = reaper
        self._work_dir = work_dir
        self._root = root
        self._program = program
        self._count = 0
        self._null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)

    def scratch(self, name: str) -> str:
        """A fresh path in the agent's own directory, for a pid file, a log or a socket."""
        self._count += 1
        return f"{self._work_dir}/{self._count}.{name}"

    def root_of(self, container_id: str) -> str:
        """All that crun keeps because of this container; to be removed after it."""
        return f"{self._root}/{container_id}"

    def state_dir(self, container_id: str) -> str:
        """Where crun keeps this container's state."""
        return f"{self.root_of(container_id)}/{container_id}"

    def release(self, container_id: str) -> bool:
        """Let a created container go on, as `crun start` does: one byte into the FIFO that its init reads.

        The FIFO's absence is what makes crun call the container running. Answers False, with nothing
        done, where that is not how this crun works.
        """
        path = f"{self.state_dir(container_id)}/exec.fifo"
        try:
            fifo = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # no such FIFO, or nobody reads it
            return False
        try:
            os.unlink(path)
            os.write(fifo, b"\0")
        finally:
            os.close(fifo)
        return True

    async def run(
        self,
        what: str,
        *arguments: str,
        container: str,
        fds: tuple[int, int, int] | None = None,
        variables: int = 0,
        deadline: float = DEADLINE,
    ) -> None:
        """Run `crun [globals] arguments container`; `variables`: how many of the environment it is to set,
        each once. Raises RpcError with crun's message when it fails."""
        log_path = self.scratch("log")
        stdin, stdout, stderr = fds or (self._null, self._null, self._null)
        argv = [
            self._program,
            "--root",
            self.root_of(container),
            "--cgroup-manager=cgroupfs",
            f"--log={log_path}",
            *arguments,
            container,
        ]
        try:
            try:
                env = {**ENV, **_MANY} if variables > _FEW else ENV
                pid, ended = self._reaper.spawn(argv, env=env, stdin=stdin, stdout=stdout, stderr=stderr)
            except OSError as error:
                raise RpcError(Code.INTERNAL, f"{what}: cannot run {argv[0]}: {error.strerror}") from None
            try:
                code = await asyncio.wait_for(asyncio.shield(ended), deadline)
            except TimeoutError:
                raise RpcError(
                    Code.DEADLINE_EXCEEDED, f"{what}: crun did not end within {deadline:g} s"
                ) from None
            finally:
                if not ended.done():  # a deadline or a cancelled call; not reaped: the pid is its own
                    os.kill(pid, signal.SIGKILL)
            if code != 0:
                raise complaint(what, _read_text(log_path), code)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(log_path)
