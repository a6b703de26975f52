"""Running one OCI hook: a program of the host with the container's state on its stdin.

What: `Hook` is one entry of the spec's `hooks`, `read_hooks` checks and reads them, `run` runs one and
blocks until it has ended or its time is up.
Why blocking: the `delete` action has no event loop, and in the daemon a hook needs a thread of its
own anyway, since namespaces belong to threads (`shim.hooks.hooks`).
Invariants: a hook never outlives its timeout, nor do the processes of its session that it left behind
by then; of what it writes the last 64 KiB are kept. It sees the mounts, the umask and, where it names
no environment, the environment that the shim was started with, as under runc.
Source: runtime-spec `config.md` (POSIX-platform hooks), `runtime.md` (state).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from devices.errors import CallerError, HostError
from devices.tail import TailBuffer

__all__ = ["STAGES", "Hook", "read_hooks", "run", "state_json"]

STAGES = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")
"""The stages that are the host's, in their order. startContainer is the guest's."""

#: Seconds for a hook that names no timeout, which OCI lets run for ever.
DEFAULT_TIMEOUT = 60.0
_LONGEST_POLL = 3600.0  # seconds; poll(2) takes no more than 24 days, and a hook's timeout may be longer

_READ_SIZE = 64 << 10


@dataclass(frozen=True, slots=True)
class Hook:
    """`args` begins with argv[0]; `env` None means the shim's own; `timeout` in seconds."""

    path: str
    args: tuple[str, ...]
    env: Mapping[str, str] | None
    timeout: float


def read_hooks(spec: Mapping[str, Any]) -> dict[str, tuple[Hook, ...]]:
    """The hooks of `STAGES`, by stage, of a spec of `shim.spec.documents`. Raises CallerError
    (INVALID_ARGUMENT) for those without a program."""
    table = spec.get("hooks") or {}
    found = {
        stage: tuple(_read(entry, f"hooks.{stage}[{i}]") for i, entry in enumerate(table.get(stage) or []))
        for stage in (*STAGES, "startContainer")
    }
    del found["startContainer"]  # checked only: the guest runs them
    return found


def _read(entry: Mapping[str, Any], place: str) -> Hook:
    path, env = entry.get("path", ""), entry.get("env")
    if not path.startswith("/"):
        raise CallerError(
            f"config.json: {place}.path must be an absolute path", phase="bundle", code="INVALID_ARGUMENT"
        )
    pairs = [word.partition("=") for word in env or ()]
    return Hook(
        path=path,
        args=tuple(entry.get("args") or (path,)),
        env=None if env is None else {key: value for key, _, value in pairs if key},
        timeout=float(entry.get("timeout", DEFAULT_TIMEOUT)),
    )


def state_json(spec: Mapping[str, Any], container_id: str, bundle: str, status: str, pid: int) -> bytes:
    """The container's state as hooks read it (runtime-spec `runtime.md`)."""
    state: dict[str, Any] = {
        "ociVersion": spec.get("ociVersion") or "1.0.2",
        "id": container_id,
        "status": status,
        "bundle": bundle,
        "annotations": spec.get("annotations") or {},
    }
    if status != "stopped":
        state["pid"] = pid
    return json.dumps(state).encode()


def run(
    hook: Hook,
    state: bytes,
    *,
    cwd: str,
    timeout: float | None = None,
    mounts: int | None = None,
    netns: str | None = None,
    stop: int | None = None,
    started: Callable[[int], object] | None = None,
) -> None:
    """Run it to its end. Raises HostError with what it wrote when it fails.

    `timeout` in seconds shortens the hook's own. `mounts` (a descriptor) and `netns` (a path) are the
    namespaces to run it in: the calling thread changes into them and must end afterwards. When `stop`
    (a descriptor) becomes readable the hook is killed. `started` is called with its pid.
    """
    seconds = hook.timeout if timeout is None else min(timeout, hook.timeout)
    deadline = time.monotonic() + seconds
    if mounts is not None or netns is not None:
        _enter(mounts, netns)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    stdin = os.memfd_create("state", os.MFD_CLOEXEC)
    try:
        os.write(stdin, state)
        os.lseek(stdin, 0, os.SEEK_SET)
        try:
            process = subprocess.Popen(
                hook.args,
                executable=hook.path,
                env=hook.env,
                cwd=cwd,
                stdin=stdin,
                stdout=writer,
                stderr=writer,
                start_new_session=True,
                umask=0o022,
            )
        except (OSError, ValueError) as error:
            raise _failed(hook, f"cannot be run: {error}") from error
        finally:
            os.close(writer)
        if started is not None:
            started(process.pid)
        output = TailBuffer()
        try:
            why = _until_end(process, reader, output, deadline, stop)
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if why == "late":
            raise _failed(hook, f"did not end within {seconds:g} s", output, code="DEADLINE_EXCEEDED")
        if why == "stopped":
            raise _failed(hook, "was ended, since nobody waits for it any more", output, code="CANCELLED")
        if process.returncode:
            raise _failed(hook, _describe(process.returncode), output)
    finally:
        os.close(reader)
        os.close(stdin)


def _until_end(
    process: subprocess.Popen[bytes], reader: int, output: TailBuffer, deadline: float, stop: int | None
) -> str:
    """Gather output until the hook has ended: "ended", "late" or "stopped".

    A process that it left in the background may hold the pipe; it is not waited for.
    """
    os.set_blocking(reader, False)
    pidfd = os.pidfd_open(process.pid)
    poll = select.poll()
    for fd in (reader, pidfd, *([stop] if stop is not None else [])):
        poll.register(fd, select.POLLIN)
    try:
        while True:
            left = deadline - time.monotonic()
            ready = {fd for fd, _ in poll.poll(min(max(0.0, left), _LONGEST_POLL) * 1000)}
            if reader in ready and not _take(reader, output):
                poll.unregister(reader)
            if pidfd in ready:
                process.wait()
                for _ in range(16):  # a pipe holds 64 KiB; more than that is somebody else's
                    if not _take(reader, output):
                        break
                return "ended"
            if stop in ready:
                return "stopped"
            if left <= 0:
                return "late"
    finally:
        os.close(pidfd)


def _take(reader: int, output: TailBuffer) -> bool:
    """One read; False when there is nothing (more)."""
    try:
        data = os.read(reader, _READ_SIZE)
    except BlockingIOError:
        return False
    output.write(data)
    return bool(data)


def _enter(mounts: int | None, netns: str | None) -> None:
    """Move the calling thread, for good."""
    from devices.syscalls import CLONE_FS, CLONE_NEWNET, CLONE_NEWNS, setns, unshare

    def enter(fd: int, kind: int, what: str) -> None:
        try:
            setns(fd, kind)
        except OSError as error:
            raise HostError(f"cannot enter {what}: {error.strerror}", phase="hooks") from error

    if netns is not None:
        try:
            fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise HostError(f"cannot open {netns}: {error.strerror}", phase="hooks") from error
        try:
            enter(fd, CLONE_NEWNET, f"the network namespace {netns}")
        finally:
            os.close(fd)
    if mounts is not None:
        unshare(CLONE_FS)  # a thread that shares its working directory cannot change its mounts
        enter(mounts, CLONE_NEWNS, "the host's mount namespace")


def _describe(status: int) -> str:
    from devices.child import describe_exit

    return describe_exit(status)


def _failed(hook: Hook, what: str, output: TailBuffer | None = None, *, code: str = "") -> HostError:
    said = output.tail(5) if output is not None else ""
    return HostError(
        f"hook {hook.path[:200]} {what}",
        phase="hooks",
        hint="run it by hand, with the container's state on its stdin",
        code=code or "UNKNOWN",
        details={"it said": said} if said else None,
    )
