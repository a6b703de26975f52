"""How a child of the zygote becomes what the process of its client is.

What: `adopt` compares what a process inherits with that of the client, takes over what can be taken over, and
refuses where something differs that cannot.
Why so strict: a daemon in another mount namespace, with other rights or under another LSM label would work,
and somewhere else than it must. A refusal costs ten milliseconds: the client runs the launcher.
Invariants: everything is read from the client's /proc while the client waits; nothing is changed that anybody
sees, but this process's own place: cgroups, limits, name.

    compared    namespaces, root directory, users, capabilities, no_new_privs, seccomp, LSM label,
                personality, scheduling policy; KATA_SHIM_PREFIX and locale, which were read when
                the modules were loaded
    taken over  arguments, environment, working directory, streams, cgroups, limits, nice value, CPUs,
                blocked and ignored signals; umask, oom_score_adj and shim_cgroup are the launcher's as ever
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence

__all__ = ["Refused", "adopt", "end_with_parent", "name_process", "rehearse", "take_descriptors"]

_SAME = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")
_AT_IMPORT = (b"KATA_SHIM_PREFIX", b"LANG", b"LC_ALL", b"LC_CTYPE")
_CGROUPS = "/sys/fs/cgroup"
_PR_SET_PDEATHSIG = 1
_PR_SET_MM, _PR_SET_MM_MAP = 35, 14
_FIELDS = {
    "start_code": 26,
    "end_code": 27,
    "start_stack": 28,
    "start_data": 45,
    "end_data": 46,
    "start_brk": 47,
}
_LIMITS = sorted({getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")})
_SCHED_RESET_ON_FORK = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
_libc.sbrk.argtypes = [ctypes.c_ssize_t]
_libc.sbrk.restype = ctypes.c_uint64


def _environment() -> dict[bytes, bytes]:
    """What this process was started with; the interpreter itself has changed os.environ since."""
    with open("/proc/self/environ", "rb") as file:
        pairs = (word.partition(b"=") for word in file.read().split(b"\0"))
        return {name: value for name, equal, value in pairs if equal}


_given = _environment()
# Where the locale is "C" Python takes C.UTF-8, and says so to its children.
_coerced = {name: value for name, value in os.environb.items() if name == b"LC_CTYPE" and name not in _given}
_kept: list[mmap.mmap] = []  # what the kernel reads for /proc/self/cmdline


class _MemoryMap(ctypes.Structure):
    """struct prctl_mm_map."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("start_code", "end_code", "start_data", "end_data")),
        *((name, ctypes.c_uint64) for name in ("start_brk", "brk", "start_stack")),
        *((name, ctypes.c_uint64) for name in ("arg_start", "arg_end", "env_start", "env_end", "auxv")),
        ("auxv_size", ctypes.c_uint32),
        ("exe_fd", ctypes.c_uint32),
    )


class Refused(Exception):  # noqa: N818  (the answer to whoever asked)
    """This process cannot stand for the client's; the text says why."""


def adopt(pid: int, words: Sequence[bytes], environment: dict[bytes, bytes]) -> int:
    """Be what the client `pid` is, with its words and environment; the pid of its parent. Raises Refused."""
    try:
        status = _status(pid)
        _compare(pid, status, environment)
        _take_cgroups(pid)
        _take_limits(pid)
        _take_signals(status)
    except OSError as error:
        raise Refused(f"cannot be like process {pid}: {error}") from None
    os.environb.clear()
    os.environb.update(environment | _coerced)
    time.tzset()
    name_process("containerd-shim", words, environment)
    sys.argv = sys.orig_argv = [os.fsdecode(word) for word in words]
    return int(status["PPid"])


def take_descriptors(fds: Sequence[int]) -> None:
    """Be where the client is, with its streams: `fds` are its working directory, 0, 1 and 2."""
    os.fchdir(fds[0])
    for number, fd in enumerate(fds[1:]):
        os.dup2(fd, number)
    for fd in fds:
        os.close(fd)


def rehearse() -> None:
    """Do once, with this process for a client, what `adopt` does: its pages are our own then."""
    own = os.getpid()
    status = _status(own)
    with contextlib.suppress(OSError, Refused):
        _compare(own, status, _given)
        _take_cgroups(own)
        _take_limits(own)
        _take_signals(status)


def end_with_parent(parent: int) -> None:
    """Be killed when `parent`, which is this process's, ends; 0: no more."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if parent else 0, 0, 0, 0)
    if parent and os.getppid() != parent:
        os._exit(0)


def _status(pid: int | str) -> dict[str, str]:
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        pairs = (line.partition(":") for line in file)
        return {name: value.strip() for name, _, value in pairs}


def _compare(pid: int, status: dict[str, str], environment: dict[bytes, bytes]) -> None:
    own = _status("self")
    for name in _SAME:
        if own.get(name) != status.get(name):
            raise Refused(f"{name} differs")
    for name in os.listdir("/proc/self/ns"):
        if os.readlink(f"/proc/self/ns/{name}") != os.readlink(f"/proc/{pid}/ns/{name}"):
            raise Refused(f"another {name} namespace")
    if not os.path.samestat(os.stat("/"), os.stat(f"/proc/{pid}/root")):
        raise Refused("another root directory")
    for name in ("attr/current", "personality"):
        if _content(f"/proc/self/{name}") != _content(f"/proc/{pid}/{name}"):
            raise Refused(f"{name} differs")
    if (os.sched_getscheduler(0) ^ os.sched_getscheduler(pid)) & ~_SCHED_RESET_ON_FORK:
        raise Refused("another scheduling policy")
    for variable in _AT_IMPORT:
        if environment.get(variable, b"") != _given.get(variable, b""):
            raise Refused(f"{variable.decode()} differs")


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""  # a kernel without it


def _take_cgroups(pid: int) -> None:
    """To be in each hierarchy where the client is."""
    theirs, own = (_cgroups(which) for which in (pid, "self"))
    for key, path in theirs.items():
        if own.get(key) == path:
            continue
        number, names = key
        if path.startswith("/.."):
            raise Refused("its cgroup is outside of ours")
        roots = [f"{_CGROUPS}/{names.removeprefix('name=')}"] if names else []
        roots += [f"{_CGROUPS}/unified", _CGROUPS] if number == "0" else []
        for root in roots:
            with contextlib.suppress(OSError), open(f"{root}{path}/cgroup.procs", "wb") as procs:
                procs.write(b"%d" % os.getpid())
                break
        else:
            raise Refused(f"cannot join its cgroup {path}")


def _cgroups(pid: int | str) -> dict[tuple[str, str], str]:
    """(number, controllers) of a hierarchy -> path."""
    with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        fields = (line.rstrip("\n").split(":", 2) for line in file)
        return {(number, names): path for number, names, path in fields}


def _take_limits(pid: int) -> None:
    for which in _LIMITS:
        theirs = resource.prlimit(pid, which)
        if theirs != resource.getrlimit(which):
            resource.setrlimit(which, theirs)
    nice = os.getpriority(os.PRIO_PROCESS, pid)
    if nice != os.getpriority(os.PRIO_PROCESS, 0):
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    cpus = os.sched_getaffinity(pid)
    if cpus != os.sched_getaffinity(0):
        os.sched_setaffinity(0, cpus)


def _take_signals(status: dict[str, str]) -> None:
    """What is blocked, and what is ignored but for what each Python ignores or sees to itself."""
    blocked, ignored = int(status["SigBlk"], 16), int(status["SigIgn"], 16)
    signal.pthread_sigmask(signal.SIG_SETMASK, {n for n in range(1, 65) if blocked >> (n - 1) & 1})
    seen_to = {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGINT}
    for number in signal.valid_signals() - seen_to:
        wanted = signal.SIG_IGN if ignored >> (number - 1) & 1 else signal.SIG_DFL
        if signal.getsignal(number) is not wanted:
            signal.signal(number, wanted)


def name_process(name: str, words: Sequence[bytes], environment: dict[bytes, bytes] | None) -> None:
    """What ps, `delete` and whoever else reads /proc/PID/cmdline, environ and comm sees. Raises Refused."""
    line = b"".join(word + b"\0" for word in words)
    text = b"".join(b"%s=%s\0" % pair for pair in (environment or {}).items())
    # Private: of others the kernel shows nothing there.
    area = mmap.mmap(-1, len(line) + len(text) + 1, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.write(line + text)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    with open("/proc/self/stat", "rb") as file:
        fields = [b"", b"", b"", *file.read().rpartition(b")")[2].split()]  # [n] is field n of proc(5)
    now = _MemoryMap(exe_fd=0xFFFFFFFF, brk=_libc.sbrk(0))
    for field, number in _FIELDS.items():
        setattr(now, field, int(fields[number]))
    now.arg_start, now.arg_end = start, start + len(line)
    now.env_start, now.env_end = now.arg_end, now.arg_end + len(text)
    if _libc.prctl(_PR_SET_MM, _PR_SET_MM_MAP, ctypes.addressof(now), ctypes.sizeof(now), 0):
        raise Refused(f"prctl(PR_SET_MM_MAP): {os.strerror(ctypes.get_errno())}")
    _kept.append(area)
    with open("/proc/self/comm", "wb") as file:
        file.write(name.encode())
