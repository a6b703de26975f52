"""What a pod leaves on the host: counted before and after.

What: `snapshot` lists processes, mounts, sockets, directories, network devices and cgroups that shims,
VMMs and their helpers make; `difference` says what came and did not go.
Why by name and by tag: on a machine that others use too, only what carries our tag, or the key of a sandbox
of ours, may be counted (`tag=`); on a machine of one's own everything of these kinds is.
Invariants: reading only; an object that vanishes while it is read was not left behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "Process",
    "difference",
    "mounts_below",
    "own_processes",
    "sandbox_key",
    "settle",
    "shim_socket",
    "snapshot",
]

_PROGRAMS = ("qemu-system", "virtiofsd", "vhost-device-vsock", "containerd-shim", "crun", "passt")
_DIRECTORIES = (
    "/run/kata",
    "/run/kata-shim",
    "/var/lib/kata-containers/sandboxes",
    "/run/kata-containers/shared/sandboxes",
    "/run/kata-containers/shared/containers",
    "/run/kata-containers/users",
    "/run/vc/sbs",
    "/run/vc/vm",
    "/run/containerd/s",
)
_HOSTS = frozenset({"/run/kata-shim/versions.json"})
"""What belongs to the host, and no sandbox takes away."""
_NETWORK_PREFIXES = ("tap", "kata", "tc", "br_kata")


@dataclass(frozen=True, slots=True)
class Process:
    """A process, told from a later one with the same pid by its start time (clock ticks since boot)."""

    pid: int
    started: int
    argv: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.pid} {' '.join(self.argv)[:300]}"


def _processes() -> Iterator[tuple[Process, int, bytes]]:
    """Each with its parent's pid and its environment."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError, ValueError, IndexError):
            base = Path("/proc", entry)
            # Field 22 of stat(5) is the start time; the name in field 2 may hold spaces and brackets.
            fields = (base / "stat").read_bytes().rpartition(b")")[2].split()
            argv = (base / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            environ = (base / "environ").read_bytes()
            yield (
                Process(int(entry), int(fields[19]), tuple(os.fsdecode(word) for word in argv)),
                int(fields[1]),
                environ,
            )


def lives(pid: int) -> bool:
    """Whether that process runs. One that has ended stays in /proc until its parent, often the machine's
    first process, has asked for its code: some take seconds for that."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def own_processes(tag: str, root: str, keys: Iterable[str] = ()) -> list[Process]:
    """Processes that descend from the daemon with this tag, or name its directory or a sandbox with one of
    these keys, but this one; and their children, whose environment need not say whose they are."""
    names = [tag, *([root] if root else []), *keys]
    marks = [f"KATA_TEST_TAG={tag}".encode(), *(f"KATA_SHIM_CHILD={key}.".encode() for key in keys)]
    others, found = [each for each in _processes() if each[0].pid != os.getpid()], list[Process]()
    pids: set[int] = set()
    while True:
        own = [
            each
            for each in others
            if each[1] in pids
            or any(mark in each[2] for mark in marks)
            or any(name in word for name in names for word in each[0].argv)
        ]
        if not own:
            return found
        others = [each for each in others if each not in own]
        found += [each[0] for each in own]
        pids |= {each[0].pid for each in own}


def _is_program(process: Process) -> bool:
    names = [os.path.basename(word) for word in process.argv[:4]]
    return any(name.startswith(_PROGRAMS) for name in names)


def _mount_points() -> Iterator[str]:
    seen: set[str] = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            # Each mount namespace once: leaks hide in the namespaces of forgotten processes.
            namespace = os.readlink(f"/proc/{entry}/ns/mnt")
            if namespace in seen:
                continue
            seen.add(namespace)
            with open(f"/proc/{entry}/mountinfo", encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    # proc(5): the fifth field is the mount point, with octal escapes.
                    yield line.split()[4].encode().decode("unicode_escape")


def mounts_below(prefix: str) -> list[str]:
    """This namespace's mount points at and below `prefix`, the deepest first."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as lines:
        points = [line.split()[4].encode().decode("unicode_escape") for line in lines]
    return sorted((p for p in points if p == prefix or p.startswith(prefix + "/")), reverse=True)


def _cgroups() -> Iterator[str]:
    for directory, subdirectories, _files in os.walk("/sys/fs/cgroup", onerror=lambda _error: None):
        for name in subdirectories:
            yield os.path.join(directory, name)


def _listing(directory: str) -> Iterator[str]:
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir(directory) if name != ".lock"]  # of the directory itself
        yield from (os.path.join(directory, name) for name in names)


def shim_socket(address: str, namespace: str, group: str) -> str:
    """Path of a shim's socket: containerd's convention (containerd-shim.md 1.6)."""
    digest = hashlib.sha256(f"{address}/{namespace}/{group}".encode()).hexdigest()
    return f"/run/containerd/s/{digest}"


def sandbox_key(address: str, namespace: str, group: str) -> str:
    """What names a sandbox on the host: the beginning of its socket's name."""
    return os.path.basename(shim_socket(address, namespace, group))[:32]


def snapshot(
    *, tag: str = "", root: str = "", sockets: Iterable[str] = (), ignore: Iterable[int] = ()
) -> dict[str, set[str]]:
    """What is there now, by kind.

    With `tag` only what carries it (or lies below `root`, or is that of a sandbox whose socket is one of
    `sockets`); without, everything of the kinds a shim makes. `ignore`: pids that are the harness's own.
    """
    ignored = {os.getpid(), *ignore}
    keys = [os.path.basename(socket)[:32] for socket in sockets]
    names = [tag, *([root] if root else []), *keys]
    mine: Callable[[str], bool] = lambda text: not tag or any(name in text for name in names)  # noqa: E731
    if tag:
        candidates = [p for p in own_processes(tag, root, keys) if p.pid not in ignored]
    else:
        candidates = [p for p, _, _ in _processes() if p.pid not in ignored and _is_program(p)]
    found = {
        "processes": {f"{p} (started {p.started})" for p in candidates},
        "mounts": {
            point
            for point in _mount_points()
            if ("kata" in point or "io.containerd.runtime" in point or (root and root in point))
            and mine(point)
        },
        "network devices": {
            name for name in os.listdir("/sys/class/net") if name.startswith(_NETWORK_PREFIXES)
        },
        "cgroups": {path for path in _cgroups() if (mine(path) if tag else "kata" in path)},
        "files": {path for each in _DIRECTORIES for path in _listing(each) if mine(path)} - _HOSTS,
    }
    if root:
        tasks = Path(root)
        found["bundles"] = {
            str(path)
            for pattern in (
                "state/io.containerd.runtime.v2.task/*/*",
                "root/io.containerd.runtime.v2.task/*/*",
            )
            for path in tasks.glob(pattern)
        }
    return found


def difference(before: dict[str, set[str]], after: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is in `after` and was not in `before`, by kind; empty when nothing was left behind."""
    return {kind: grown for kind, items in after.items() if (grown := items - before.get(kind, set()))}


def settle(
    before: dict[str, set[str]], take: Callable[[], dict[str, set[str]]], timeout: float = 5.0
) -> dict[str, set[str]]:
    """The difference once it is empty, or after `timeout` seconds: exits take a moment to be seen."""
    deadline = time.monotonic() + timeout
    while True:
        left = difference(before, take())
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)
