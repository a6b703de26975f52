"""`python -m scripts.host_root ROOT COMMAND...`: run a command in an unpacked root as on a host of its own.

What: makes ROOT the root of a mount namespace of its own (it is started in one, by `scripts.hosts`), with the
file systems that a booted host has, and runs the command there as the only child of a process that reaps.
Why not chroot(1): there `/` is no mount point, so nobody can make it shared or private; orphans stay zombies,
which leak checks count; /run, /proc and the cgroups are other people's.
Invariants: it needs a pid, a mount and a cgroup namespace of its own and checks the first; nothing that is
mounted here is seen outside.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

from devices.mounts import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_REC, MS_SHARED
from devices.syscalls import mount

_MS_MOVE = 0x2000
_CGROUPS = "/sys/fs/cgroup"
_PLAIN = MS_NOSUID | MS_NODEV | MS_NOEXEC


def cgroup_mounts(mountinfo: str) -> Iterator[tuple[str, str, str]]:
    """(path, type, data) of each hierarchy that a host has mounted: v1, hybrid or v2."""
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        path, (fstype, _, options) = left.split()[4], right.split()[:3]
        if fstype in {"cgroup", "cgroup2"} and path.startswith(_CGROUPS):
            words = options.split(",") if fstype == "cgroup" else []
            yield path, fstype, ",".join(_hierarchy(words))


def _hierarchy(options: Sequence[str]) -> list[str]:
    """The options that choose a v1 hierarchy, out of those that the kernel tells."""
    named = [word for word in options if word.startswith("name=")]
    if named:
        return ["none", *named]
    told = {"rw", "ro", "clone_children", "xattr", "noprefix"}
    return [word for word in options if word not in told and not word.startswith("release_agent=")]


def furnish(root: str) -> None:
    """What a host has mounted when it is up, below the new root."""
    mount("none", "/", "", MS_PRIVATE | MS_REC, "")
    mount(root, root, "", MS_BIND, "")  # a mount point, as each root is
    with open("/proc/self/mountinfo", encoding="utf-8") as table:
        cgroups = list(cgroup_mounts(table.read()))
    for path, fstype, flags, data in (
        ("/proc", "proc", _PLAIN, ""),
        ("/sys", "sysfs", _PLAIN, ""),
        ("/dev", "devtmpfs", MS_NOSUID, "mode=755"),
        ("/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=666,mode=620,gid=5"),
        ("/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777"),
        ("/dev/mqueue", "mqueue", _PLAIN, ""),
        ("/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755"),
    ):
        os.makedirs(root + path, exist_ok=True)
        mount(fstype, root + path, fstype, flags, data)
    os.makedirs(f"{root}/run/lock")
    if all(path != _CGROUPS for path, _, _ in cgroups):
        mount("tmpfs", root + _CGROUPS, "tmpfs", _PLAIN, "mode=755")
    for path, fstype, data in cgroups:
        os.makedirs(root + path, exist_ok=True)
        mount("cgroup", root + path, fstype, _PLAIN, data)
    os.chdir(root)
    mount(".", "/", "", _MS_MOVE, "")
    os.chroot(".")
    os.chdir("/")
    mount("none", "/", "", MS_SHARED | MS_REC, "")  # as systemd leaves it


def bring_up_network() -> None:
    """In an empty network: lo, and a card with an address and a default route that lead nowhere."""
    for words in (
        "link set lo up",
        "link add eth0 type veth peer name eth0-other",
        "addr add 192.0.2.10/24 dev eth0",
        "link set eth0 up",
        "route add default via 192.0.2.1",
    ):
        subprocess.run(["ip", *words.split()], check=True)


def run(argv: Sequence[str]) -> int:
    """The command's exit code. Whatever else ends here meanwhile is reaped.

    As a machine's first process gives it, no signal is ignored, whatever the caller of this one ignores.
    """
    defaults = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    child = os.posix_spawnp(argv[0], list(argv), os.environ, setsigdef=defaults)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    while True:
        pid, status = os.wait()
        if pid == child:
            return os.waitstatus_to_exitcode(status)


def main() -> int:
    """The command line."""
    root, argv = os.path.abspath(sys.argv[1]), sys.argv[2:]
    if os.getpid() != 1:
        print("host_root: it needs a pid namespace of its own: see `make test-hosts`", file=sys.stderr)
        return 2
    if [name for _, name in socket.if_nameindex()] == ["lo"]:
        bring_up_network()
    furnish(root)
    return run(argv)


if __name__ == "__main__":
    sys.exit(main())
