"""What a child process may: its confinement, as a value that whoever starts it states.

What: `Confinement` says all of it: user, capabilities, namespaces, the files in sight, limits, the filter of
system calls. `steps` turns it into the words that `kata-confine` (confine.c) carries out between fork and
exec, and `environment` is what a child knows of us.
Why one value: SECURITY.md has it as a table, a row for each program, and a test reads the same from
/proc. A field that is left out is the strictest there is, so what a program needs beyond that is said by
name, where it is started.
Invariants: pure but for looking which directories this host has. Steps only take away; their order is such
that each still may: namespaces and files with all rights, then capabilities and user, last the filter.
Nobody's environment is inherited. What a step cannot do ends the child before it is one.
Source: capabilities(7), mount_namespaces(7), pid_namespaces(7), no_new_privs and seccomp of the kernel's
userspace-api.
"""

from __future__ import annotations

import os
import resource
import signal
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from devices.errors import BugError, HostError

__all__ = [
    "CAPABILITIES",
    "HELPER",
    "NO_NETWORK",
    "Bind",
    "Confinement",
    "Descriptors",
    "View",
    "environment",
    "steps",
]

HELPER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "kata-confine")
"""Built by `make setup`, and installed beside this file."""
NO_NETWORK = ""
"""A network namespace of the child's own, with nothing in it."""

CAPABILITIES = (
    "chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap",
    "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw", "ipc_lock", "ipc_owner",
    "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct", "sys_admin", "sys_boot", "sys_nice",
    "sys_resource", "sys_time", "sys_tty_config", "mknod", "lease", "audit_write", "audit_control", "setfcap",
    "mac_override", "mac_admin", "syslog", "wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf",
    "checkpoint_restore",
)  # fmt: skip
"""Their names, each at its number."""

MAX_ID = (1 << 31) - 1
"""The highest user: beyond are numbers that programs have taken for negative ones."""

_NEWNS, _NEWIPC, _NEWNET = 0x20000, 0x8000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_SLAVE = 1, 2, 4, 8, 0x4000, 0x80000
_MS_PRIVATE = 0x40000
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV, _ATTR_NOEXEC = 1, 2, 4, 8
_ASSEMBLY = "/proc"  # where a view is put together, before it is the root: nothing below is ever a part of it
_SIZE = "size=256k,nr_inodes=512,mode=0755"
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_LOADER = ("/etc/ld.so.cache", "/etc/alternatives")  # of libraries; the other is where links of /usr lead
_EVERYBODYS = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bind:
    """A file or directory of the host in a child's view, at the same path.

    `follows`: what the host mounts below it later appears there too.
    """

    path: str
    writable: bool = False
    follows: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The file system that a child sees: its program, /usr, a /proc of its own namespace, and this.

    `nodes`: devices, by their paths: the child's own nodes, which belong to its user. `late_nodes`: a place
    for those that come while it runs (/dev/vfio).
    """

    binds: tuple[Bind, ...] = ()
    nodes: tuple[str, ...] = ()
    late_nodes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """See the module's docstring.

    `user`: of the child, and its group; no other groups. `capabilities`: names of `CAPABILITIES`, that it
    keeps; for user 0 only. `network`: the path of a network namespace, `NO_NETWORK`, or None for the shim's.
    `view`: None is the shim's own mounts. `own_pids`: it is the first process of a pid namespace, whose
    others end with it. `files`: descriptors at once, if the shim may have as many; `locked`: bytes of memory
    that it may lock; `writes`: bytes of the largest file that it may write, None for any; `threads`: of its
    user, if that is not 0. `filter`: a program for seccomp (`devices.seccomp`), for what has none of its own.
    """

    user: int = 0
    capabilities: tuple[str, ...] = ()
    network: str | None = NO_NETWORK
    view: View | None = View()
    own_pids: bool = True
    files: int = 1024
    locked: int = 64 << 10
    writes: int | None = None
    threads: int = 1024
    filter: bytes = b""

    def __post_init__(self) -> None:
        if not 0 <= self.user <= MAX_ID:
            raise BugError(f"no child can run as user {self.user}")
        if self.user and self.capabilities:
            raise BugError(f"user {self.user} cannot keep capabilities: {', '.join(self.capabilities)}")
        unknown = [name for name in self.capabilities if name not in CAPABILITIES]
        if unknown:
            raise BugError(f"there are no capabilities {', '.join(unknown)}")

    @property
    def mask(self) -> int:
        """The capabilities as a set of bits."""
        return sum(1 << CAPABILITIES.index(name) for name in set(self.capabilities))


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptors:
    """What the steps need open: `cgroups` to write "0" into, the network namespace, the filter."""

    cgroups: Sequence[int] = ()
    network: int = -1
    filter: int = -1


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """All that a child has in its environment; `extra` is its own."""
    return {"PATH": _PATH, "HOME": "/", "LANG": "C.UTF-8", **(extra or {})}


def steps(confinement: Confinement, program: str, fds: Descriptors, *, dies: bool = True) -> list[str]:
    """The words for kata-confine, in order. `program`: its real path; `dies`: with us. Raises HostError for a
    device or a file that the view needs and this host lacks."""
    one = confinement
    words = [word for fd in fds.cgroups for word in ("tell", str(fd), "0")]
    if fds.network >= 0:
        words += ["enter", str(fds.network), hex(_NEWNET)]
    flags = _NEWIPC | (_NEWNS if one.view is not None else 0) | (_NEWNET if one.network == NO_NETWORK else 0)
    words += ["unshare", hex(flags)]
    if one.view is not None:
        words += _view(one.view, program, one.user)
    words += ["umask", "0077"]
    for number, value in _limits(one):
        words += ["limit", str(number), str(value), str(value)]
    words += ["bounding", hex(one.mask), "user", str(one.user), "capabilities", hex(one.mask)]
    words += [*(["die-with-parent", str(int(signal.SIGKILL))] if dies else []), "no-new-privileges"]
    if fds.filter >= 0:
        words += ["filter", str(fds.filter)]
    return words


def _limits(one: Confinement) -> list[tuple[int, int]]:
    locked = _within(resource.RLIMIT_MEMLOCK, one.locked)
    if locked < one.locked:
        raise HostError(
            f"{one.locked >> 20} MiB of memory have to be locked, and the limit is {locked >> 20} MiB",
            phase="spawn",
            hint="LimitMEMLOCK=infinity in containerd's unit, or a smaller default_maxmemory",
        )
    found = [
        (resource.RLIMIT_CORE, 0),  # it would be the guest's memory
        (resource.RLIMIT_NOFILE, _within(resource.RLIMIT_NOFILE, one.files)),
        (resource.RLIMIT_MEMLOCK, locked),
    ]
    if one.writes is not None:
        found.append((resource.RLIMIT_FSIZE, one.writes))
    if one.user:
        found.append((resource.RLIMIT_NPROC, one.threads))
    return found


def _within(number: int, wanted: int) -> int:
    """The limit that the shim may set, if not this one."""
    _, most = resource.getrlimit(number)
    return wanted if most == resource.RLIM_INFINITY or _may_raise() else min(wanted, most)


@cache
def _may_raise() -> bool:
    """Whether the shim may raise limits: CAP_SYS_RESOURCE."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        words = next((line.split() for line in file if line.startswith("CapEff:")), ["", "0"])
    return bool(int(words[1], 16) >> CAPABILITIES.index("sys_resource") & 1)


def _view(view: View, program: str, user: int) -> list[str]:
    """A file system in memory, with what belongs into it; it is the root at the end, and read-only."""
    words = ["umask", "0", "mount", "", "/", hex(_MS_REC | _MS_SLAVE), ""]
    words += ["mount", "tmpfs", _ASSEMBLY, hex(_MS_NOSUID), _SIZE]
    made: set[str] = {"/"}
    shown: list[str] = []
    for path, target in _system():
        words += ["link", _ASSEMBLY + path, target] if target else _bind(Bind(path=path), made)
        made.add(path)
        shown.append(path)
    for bind in (Bind(path=_home(program)), *view.binds):
        plain = not bind.writable and not bind.follows
        if plain and any(_below(bind.path, path) for path in shown):
            continue
        words += _bind(bind, made)
        shown += [bind.path] if plain else []
    words += ["dir", f"{_ASSEMBLY}/dev", "0755", "dir", f"{_ASSEMBLY}/proc", "0755"]
    if view.late_nodes:
        words += ["mount", "tmpfs", f"{_ASSEMBLY}/dev", hex(_MS_NOSUID | _MS_NOEXEC), _SIZE]
    made |= {"/dev"}
    for path in _EVERYBODYS:
        words += _node(path, 0o666, 0, made)
    for path in view.nodes:
        if path not in _EVERYBODYS:
            words += _node(path, 0o600, user, made)
    flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC  # read-only: /proc/sys is user 0's to write
    words += ["mount", "proc", f"{_ASSEMBLY}/proc", hex(flags), ""]
    return [*words, "root", _ASSEMBLY, "readonly", "/"]


@cache
def _system() -> list[tuple[str, str]]:
    """What programs need of a host: directories, and links (with their targets) in the place of some."""
    found = []
    for path in (*_SYSTEM, *_LOADER):
        if os.path.islink(path):
            found.append((path, os.readlink(path)))
        elif os.path.exists(path):
            found.append((path, ""))
    return found


def _home(program: str) -> str:
    """The directory that a program needs of its own: /opt/kata of /opt/kata/bin/qemu, else the one it is in;
    itself, where that would be the root or is nobody else's to enter."""
    folder = os.path.dirname(program)
    if os.path.basename(folder) in ("bin", "sbin", "libexec"):
        folder = os.path.dirname(folder)
    try:
        entered = bool(os.stat(folder).st_mode & stat.S_IXOTH)
    except OSError:
        entered = False
    return folder if entered and folder != "/" else program


def _bind(bind: Bind, made: set[str]) -> list[str]:
    path = os.path.normpath(bind.path)
    try:
        directory = stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        raise HostError(f"{path} cannot be used: {error.strerror}", phase="spawn") from error
    words = _parents(path, made)
    if path not in made:
        words += ["dir", _ASSEMBLY + path, "0755"] if directory else ["file", _ASSEMBLY + path]
        made.add(path)
    attributes = 0 if bind.writable or bind.follows else _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV
    if bind.writable:
        attributes = _ATTR_NOSUID | _ATTR_NODEV | _ATTR_NOEXEC
    propagation = _MS_SLAVE if bind.follows else _MS_PRIVATE
    return [*words, "bind", path, _ASSEMBLY + path, hex(attributes), hex(propagation)]


def _node(path: str, mode: int, user: int, made: set[str]) -> list[str]:
    try:
        info = os.stat(path)
    except OSError as error:
        raise HostError(f"there is no {path}: {error.strerror}", phase="spawn") from error
    if not stat.S_ISCHR(info.st_mode):
        raise HostError(f"{path} is no character device", phase="spawn")
    kind = oct(stat.S_IFCHR | mode).replace("0o", "0")
    return [*_parents(path, made), "node", _ASSEMBLY + path, kind, str(info.st_rdev), str(user)]


def _parents(path: str, made: set[str]) -> list[str]:
    """Make the directories above `path`."""
    words, at = [], ""
    for part in path.strip("/").split("/")[:-1]:
        at = f"{at}/{part}"
        if at not in made:
            made.add(at)
            words += ["dir", _ASSEMBLY + at, "0755"]
    return words


def _below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")
