"""Failpoints inside a running daemon: every await by which it leaves the process, counted, and one broken.

What: `install` wraps the few functions through which the daemon reaches the agent, the VMM, a child, the
kernel (in a thread) or the guest's vsock. Each passage is a number and a name, written to DIR/passages; the
one that DIR/plan names is broken in the way that it says.
Why not in the product: nothing of it runs anywhere but in a test's daemon, whose launcher calls `install`.
Invariants: a plan is used up by its passage, once, whatever daemon comes to it first.

A plan is "NUMBER ACTION":
    error    the call is not made, and fails as its owner's calls fail
    timeout  the call is made and done, but its answer does not come in time
    cancel   whoever waits gives up at this point
    kill     the daemon dies by SIGKILL, before the call
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Awaitable, Callable
from typing import Any

__all__ = ["ACTIONS", "VARIABLE", "install"]

VARIABLE = "KATA_TEST_POINTS"
"""The directory with `plan` and `passages`."""
ACTIONS = ("error", "timeout", "cancel", "kill")

Call = Callable[..., Awaitable[Any]]


class Points:
    """The passages of this daemon."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._number = 0

    def _note(self, line: str) -> None:
        with open(f"{self._directory}/passages", "a") as file:  # the daemon closes descriptors that it finds
            file.write(f"{line}\n")

    def pass_by(self, name: str) -> str:
        """Count this passage; the action that is planned for it, "" for none."""
        self._number += 1
        self._note(f"{self._number} {name}")
        try:
            with open(f"{self._directory}/plan") as file:
                number, action = file.read().split()
        except (FileNotFoundError, ValueError):
            return ""
        if int(number) != self._number:
            return ""
        os.unlink(f"{self._directory}/plan")
        self._note(f"{self._number} {name} <- {action}")
        return action

    def wrap(self, call: Call, name: Callable[..., str], error: Callable[[str, str], Exception]) -> Call:
        """`call` with a failpoint before it. `name(*args)` names a passage, `error(name, code)` makes its
        owner's error."""

        @functools.wraps(call)
        async def passing(*args: Any, **keywords: Any) -> Any:
            passage = name(*args, **keywords)
            match self.pass_by(passage):
                case "error":
                    raise error(passage, "UNAVAILABLE")
                case "timeout":
                    await call(*args, **keywords)
                    raise error(passage, "DEADLINE_EXCEEDED")
                case "cancel":
                    task = asyncio.current_task()
                    assert task is not None
                    task.cancel()
                case "kill":
                    os.kill(os.getpid(), 9)
            return await call(*args, **keywords)

        return passing


def install() -> None:
    """Wrap the ways out. To be called in the daemon before anything else of it is imported."""
    points = Points(os.environ[VARIABLE])

    from devices import threads
    from devices.errors import GuestError, HostError, HypervisorError

    def of(kind: type[Exception]) -> Callable[[str, str], Exception]:
        return lambda name, code: kind(f"failpoint at {name}", code=code)  # type: ignore[call-arg]

    def function(call: Any, *_args: Any, **_keywords: Any) -> str:
        bare = call.func if isinstance(call, functools.partial) else call
        return f"thread {getattr(bare, '__qualname__', type(bare).__name__)}"

    for way in ("acquire", "look"):  # before anybody imports them by name
        setattr(threads, way, points.wrap(getattr(threads, way), function, of(HostError)))

    from devices import vsock
    from devices.child import Child
    from hypervisors.qemu.qmp import QmpClient
    from shim.sandbox.agent_client import GuestAgent

    spawn = vars(Child)["spawn"].__func__
    wrapped = points.wrap(spawn, lambda *_args, name, **_keywords: f"spawn {name}", of(HostError))
    setattr(Child, "spawn", classmethod(wrapped))  # noqa: B010  (mypy knows that it is no such thing)
    ways: list[tuple[Any, str, Callable[..., str], type[Exception]]] = [
        (QmpClient, "execute", lambda _self, command, *_a, **_k: f"qmp {command}", HypervisorError),
        (GuestAgent, "_call", lambda _self, name, *_a, **_k: f"agent {name}", GuestError),
        (vsock._Channel, "wait_ready", lambda *_a, **_k: "vsock wait_ready", GuestError),
        (vsock._Channel, "connect", lambda *_a, **_k: "vsock connect", GuestError),
        (vsock._Channel, "open_stream", lambda *_a, **_k: "vsock open_stream", GuestError),
    ]
    for owner, way, name, kind in ways:
        setattr(owner, way, points.wrap(getattr(owner, way), name, of(kind)))
