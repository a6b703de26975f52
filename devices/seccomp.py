"""A filter of system calls, for a daemon that brings none of its own.

What: `program` makes of names and conditions the instructions that the kernel wants (seccomp's classic BPF);
`VSOCK_DAEMON` is the one for vhost-device-vsock.
Why an allowance: what a program needs can be listed, what an attacker may come to need cannot.
Invariants: what is not allowed answers ENOSYS, as a kernel does that has no such call: a C library of another
version finds its way then, which it would not if it were killed. System calls of another architecture (i386,
x32), which no program here has, do end the process. A thread may be made, a namespace not (clone3, whose
flags no filter can see, is missing: the C library takes clone then); a file may be opened, but not made.
Source: seccomp(2), the kernel's userspace-api/seccomp_filter.rst, linux/{filter,audit,seccomp}.h; the calls
are those that vhost-device-vsock 0.3.0 makes (strace), and their near relatives.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from devices.errors import BugError

__all__ = ["VSOCK_DAEMON", "Condition", "program", "vsock_daemon"]

_AUDIT_ARCH_X86_64 = 0xC000003E
_X32 = 0x40000000
_KILL_PROCESS, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data

_X86_64 = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10,
    "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16,
    "pread64": 17, "readv": 19, "writev": 20, "access": 21, "sched_yield": 24, "mremap": 25, "madvise": 28,
    "dup": 32, "nanosleep": 35, "getpid": 39, "socket": 41, "connect": 42, "accept": 43, "sendto": 44,
    "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48, "bind": 49, "listen": 50, "getsockname": 51,
    "getpeername": 52, "setsockopt": 54, "getsockopt": 55, "clone": 56, "execve": 59, "exit": 60, "uname": 63,
    "fcntl": 72, "getcwd": 79, "unlink": 87, "readlink": 89, "sysinfo": 99, "getuid": 102, "getgid": 104,
    "geteuid": 107, "getegid": 108, "sigaltstack": 131, "prctl": 157, "arch_prctl": 158, "gettid": 186,
    "futex": 202, "sched_getaffinity": 204, "set_tid_address": 218, "restart_syscall": 219,
    "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232,
    "epoll_ctl": 233, "tgkill": 234, "openat": 257, "newfstatat": 262, "unlinkat": 263, "readlinkat": 267,
    "faccessat": 269, "ppoll": 271, "set_robust_list": 273, "get_robust_list": 274, "epoll_pwait": 281,
    "accept4": 288, "eventfd2": 290, "epoll_create1": 291, "dup3": 292, "pipe2": 293, "prlimit64": 302,
    "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334, "faccessat2": 439, "epoll_pwait2": 441,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Condition:
    """Of one argument (the first is 0), by its lower 32 bits: it is `one_of` these, or has none of the bits
    `without`."""

    argument: int
    one_of: tuple[int, ...] = ()
    without: int = 0


_NAMESPACES = 0x7E020000 | 0x80  # every CLONE_NEW* flag
_FIONBIO, _FIONREAD, _TCGETS = 0x5421, 0x541B, 0x5401
_PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA = 15, 16, 0x53564D41
_O_TMPFILE = 0o20000000

VSOCK_DAEMON: Mapping[str, Condition | None] = {
    **dict.fromkeys(_X86_64),
    "clone": Condition(0, without=_NAMESPACES),
    "ioctl": Condition(1, one_of=(_FIONBIO, _FIONREAD, _TCGETS)),
    "openat": Condition(2, without=os.O_CREAT | os.O_TRUNC | _O_TMPFILE),
    "prctl": Condition(0, one_of=(_PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA)),
    "socket": Condition(0, one_of=(int(socket.AF_UNIX),)),
}
"""What it may call, each with its condition. `execve` is how it begins."""

_Instruction = tuple[int, int, int, int]


def program(allowed: Mapping[str, Condition | None]) -> bytes:
    """The filter, as `struct sock_filter` has it. Raises BugError for a name without a number here."""
    code: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH_X86_64),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL_PROCESS),
    ]
    for name, condition in allowed.items():
        if name not in _X86_64:
            raise BugError(f"no system call is known as {name!r}")
        then = [(_RETURN, 0, 0, _ALLOW)] if condition is None else _only(condition)
        code += [(_JUMP_EQUAL, 0, len(then), _X86_64[name]), *then]
    return _packed([*code, (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)])


@cache
def vsock_daemon() -> bytes:
    """The program of `VSOCK_DAEMON`."""
    return program(VSOCK_DAEMON)


def _only(condition: Condition) -> list[_Instruction]:
    """Allow if the argument is as it must be, else refuse; in both cases the last words on this call."""
    refused = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    code: list[_Instruction] = [(_LOAD, 0, 0, _ARGUMENTS + 8 * condition.argument)]
    if condition.without:
        code.append((_JUMP_ANY_BIT, 1, 0, condition.without))
        return [*code, (_RETURN, 0, 0, _ALLOW), refused]
    for left, value in zip(range(len(condition.one_of), 0, -1), condition.one_of, strict=True):
        code.append((_JUMP_EQUAL, left, 0, value))
    return [*code, refused, (_RETURN, 0, 0, _ALLOW)]


def _packed(code: Sequence[_Instruction]) -> bytes:
    return b"".join(struct.pack("=HBBI", *each) for each in code)
