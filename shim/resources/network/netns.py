"""The network namespace that a pod's VM stands in: opened or made, entered by threads of its own.

What: `Netns` holds one by descriptor; `run` does something inside it; `inside` is the same without an event
loop, for `delete`.
Why threads: a namespace belongs to a thread. Each piece of work gets a new one, which enters, works and ends,
so no thread of the daemon ever has to find its way back.
Invariants: the daemon's other threads stay where they are. The namespace that the shim itself is in is never
taken for a pod's: to join the host's own cards to a VM would cut the host off. A namespace is known by its
inode, since a path may be another one's by now. Nor is one that is named by a process in it (`refuse_used`):
whatever arrived there for that process would go to the VM instead.
Source: network_namespaces(7), setns(2).
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import re
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

from devices.errors import HostError
from devices.syscalls import CLONE_NEWNET, setns, unshare
from devices.threads import start, to_end

__all__ = ["OURS", "Netns", "identity", "inside", "names", "open_netns", "refuse_used"]

T = TypeVar("T")
P = ParamSpec("P")

OURS = "_kata"
"""How the names of our own devices end, as Kata's do."""

_NS_GET_NSTYPE = 0xB703
_OWN = ("/proc/self/ns/net", "/proc/1/ns/net")
_OF_PROCESS = re.compile(r"/proc/(\d+)(?:/task/\d+)?/ns/net")


def identity(fd: int) -> str:
    """What tells one namespace from all others that exist now: "device:inode" of its descriptor."""
    info = os.fstat(fd)
    return f"{info.st_dev}:{info.st_ino}"


def open_netns(path: str) -> int:
    """A descriptor of the network namespace at `path`. Raises OSError, EINVAL for what is none."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # who named it may have meant a FIFO
    try:
        kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
    except OSError:
        kind = 0
    if kind != CLONE_NEWNET:
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no network namespace")
    return fd


def refuse_used(path: str) -> None:
    """Raise HostError if `path` names the namespace by a process in it (`docker run --network container:ID`):
    it is that process' own, and a VM would take its traffic away. Changes nothing there. Not by a look at
    all processes: CNI plugins, too, enter a pod's namespace for a moment."""
    found = _OF_PROCESS.fullmatch(os.path.realpath(os.path.dirname(path)) + "/" + os.path.basename(path))
    if found is None:
        return
    try:
        with open(f"/proc/{found[1]}/comm", encoding="utf-8", errors="replace") as stream:
            name = stream.read().strip()
    except OSError:
        name = "which has gone"
    raise HostError(
        f"the network namespace {path} is process {found[1]}'s ({name}): a VM cannot share another"
        " container's network, it would take that one's traffic away",
        phase="network",
        hint="give both containers a network of the same name instead of one's network to the other"
        " (--network NAME, not container:ID), or put them into one pod; a namespace that no process uses is"
        " named by a mount (ip netns attach NAME PID)",
    )


def names() -> frozenset[str]:
    """The links of the calling thread's namespace but for loopback and our own: the quick look, which says
    whether there is anything to be joined to a VM."""
    return frozenset(name for _, name in socket.if_nameindex() if name != "lo" and not name.endswith(OURS))


def inside(fd: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call it in a new thread, in the namespace `fd`; blocks. Raises what it raises, OSError of setns."""
    return _start(fd, lambda: function(*args, **kwargs)).result()


def _start(fd: int | None, function: Callable[[], T]) -> Future[T]:
    """In the namespace `fd`, or for None in a new one."""
    done: Future[T] = Future()

    def work() -> None:
        try:
            if fd is None:
                unshare(CLONE_NEWNET)
            else:
                setns(fd, CLONE_NEWNET)
            done.set_result(function())
        except BaseException as error:  # noqa: BLE001  (it is raised to whoever waits)
            done.set_exception(error)

    start(threading.Thread(target=work, name="netns", daemon=True))
    return done


class Netns:
    """One network namespace. `path` leads to it as long as it is open. Made by `open` or `create`."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd = fd
        self.path = path or f"/proc/{os.getpid()}/fd/{fd}"
        self.identity = identity(fd)

    @classmethod
    def open(cls, path: str) -> Netns | None:
        """The one at `path`; None if that is the shim's own or the host's. Raises HostError."""
        try:
            fd = open_netns(path)
        except OSError as error:
            raise HostError(
                f"the network namespace {path} cannot be opened: {error.strerror}", phase="network"
            ) from error
        netns = cls(fd, path)
        if any(netns.identity == own for own in map(_identity_of, _OWN)):
            netns.close()
            return None
        return netns

    @classmethod
    async def create(cls) -> Netns:
        """A new one, which goes with its last process and descriptor. Raises HostError."""
        opening = _start(None, lambda: os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        try:
            return cls(await _wait(opening), "")
        except asyncio.CancelledError:
            if opening.exception() is None:
                os.close(opening.result())
            raise
        except OSError as error:
            raise HostError(f"no new network namespace: {error.strerror}", phase="network") from error

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it inside. Ends when the call has, also when cancelled meanwhile: what it acquires is known
        then. Raises what it raises, OSError of setns."""
        return await _wait(_start(self.fd, lambda: function(*args, **kwargs)))

    def close(self) -> None:
        """Let go of it. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _identity_of(path: str) -> str:
    try:
        info = os.stat(path)
    except OSError:
        return ""
    return f"{info.st_dev}:{info.st_ino}"


async def _wait(work: Future[T]) -> T:
    return await to_end(asyncio.wrap_future(work))
