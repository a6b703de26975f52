"""Limits of the kernel that it took from the memory it booted with, after more was plugged.

What: `note` remembers the memory that a sandbox begins with; `follow` raises the limits in proportion when
there is more, as if the guest had been booted with it.
Why: the kernel decides them once. A VM that starts small and grows with its containers would keep the
threads, sockets, watches and connections of a machine of 256 MiB.
Invariants: nothing is ever lowered, and what somebody else has changed since is left alone: a container's
`sysctl`, or a privileged one's own hand.
Source: the kernel's kernel/fork.c (threads-max, and namespaces from it), net/ipv4/tcp.c, fs/notify,
fs/eventpoll.c, nf_conntrack_core.c; all of them are linear in memory between their bounds.
"""

from __future__ import annotations

import os

from agent import log

__all__ = ["follow", "leave", "memory", "note"]

_ROOT = "/proc/sys"
_KINDS = ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts")
# Path -> the most that each of its numbers may become.
_LIMITS = {
    "kernel/threads-max": 1 << 22,
    "fs/inotify/max_user_watches": 1 << 20,
    "fs/fanotify/max_user_marks": 1 << 20,
    "fs/epoll/max_user_watches": 1 << 31,
    "net/ipv4/tcp_mem": 1 << 31,
    "net/ipv4/udp_mem": 1 << 31,
    "net/ipv4/tcp_max_orphans": 1 << 18,
    "net/ipv4/tcp_max_tw_buckets": 1 << 18,
    "net/netfilter/nf_conntrack_max": 1 << 18,
    **{f"user/max_{kind}_namespaces": 1 << 21 for kind in _KINDS},
}
# Minimum, default and maximum of one socket's buffer: only the last follows memory.
_BUFFERS = {"net/ipv4/tcp_rmem": 6 << 20, "net/ipv4/tcp_wmem": 4 << 20}
_ENOUGH = 1.05  # times the memory of before

_most = 0  # bytes; the most memory that the limits have followed so far
_written: dict[str, str] = {}
_left: set[str] = set()


def memory(meminfo: str = "/proc/meminfo") -> int:
    """Bytes of memory that the kernel has to hand out."""
    with open(meminfo, encoding="ascii") as file:
        return int(file.readline().split()[1]) << 10


def note(total: int) -> None:
    """The limits are those of a guest with `total` bytes."""
    global _most  # noqa: PLW0603  (one kernel)
    _most = total
    _written.clear()
    _left.clear()


def leave(path: str) -> None:
    """This one, "net/ipv4/tcp_mem", is a container's from now on."""
    _left.add(path)


def follow(total: int, root: str = _ROOT) -> None:
    """There are `total` bytes now. Never raises: a limit that cannot be raised is logged."""
    global _most  # noqa: PLW0603
    if not _most or total < _most * _ENOUGH:
        return
    for path, most in (*_LIMITS.items(), *_BUFFERS.items()):
        if path in _left:
            continue
        try:
            _raise(path, most, total / _most, root)
        except (OSError, ValueError) as error:
            log.error(f"sysctl {path.replace('/', '.')}: {error}")
    _most = total


def _raise(path: str, most: int, times: float, root: str) -> None:
    name = os.path.join(root, path)
    try:
        have = _read(name)
    except FileNotFoundError:  # of a module that is not loaded, or another kernel's
        return
    if _written.get(path, have) != have:
        leave(path)
        return
    numbers = [int(word) for word in have.split()]
    first = len(numbers) - 1 if path in _BUFFERS else 0
    wanted = [max(number, min(int(number * times), most)) for number in numbers[first:]]
    with open(name, "w", encoding="ascii") as file:
        file.write(" ".join(map(str, numbers[:first] + wanted)))
    _written[path] = _read(name)  # as the kernel took it


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()
