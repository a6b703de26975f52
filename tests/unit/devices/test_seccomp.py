"""The vsock daemon's filter lets it serve unix sockets, with threads, and nothing else: tried for real."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from devices import seccomp
from devices.errors import BugError
from devices.seccomp import VSOCK_DAEMON, Condition, program

# Puts itself under the filter (its bytes are on stdin), then makes each call, and prints what it answers.
PROBE = """
import ctypes, errno, os, socket, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
code = sys.stdin.buffer.read()
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(len(code) // 8, code)), 0, 0) == 0
def said(name, call):
    try:
        call()
        print(name, "ok")
    except OSError as error:
        print(name, errno.errorcode[error.errno])
def raw(*words):
    if libc.syscall(*words) < 0:
        raise OSError(ctypes.get_errno(), "")
said("unix", lambda: socket.socket(socket.AF_UNIX).close())
for name, family in (("inet", 2), ("inet6", 10), ("netlink", 16), ("packet", 17), ("vsock", 40)):
    said(name, lambda: socket.socket(family, socket.SOCK_STREAM))
said("read", lambda: os.close(os.open("/dev/null", os.O_RDONLY)))
said("make", lambda: os.open("/tmp/never", os.O_CREAT | os.O_WRONLY))
said("cut", lambda: os.open("/tmp/never", os.O_TRUNC | os.O_WRONLY))
said("unnamed", lambda: os.open("/tmp", os.O_TMPFILE | os.O_WRONLY))
threads = threading.Thread(target=lambda: print("thread ok"))
threads.start()
threads.join()
CALLS = {
    "clone3": (435, 0, 0), "new user": (56, 0x10000011, 0, 0, 0, 0), "new mounts": (56, 0x20011, 0, 0, 0),
    "unshare": (272, 0x10000000), "setns": (308, 0, 0), "mount": (165, 0, 0, 0, 0, 0), "ptrace": (101, 0, 0),
    "bpf": (321, 0, 0, 0), "io_uring": (425, 0, 0), "keyctl": (250, 0, 0), "kill": (62, 0, 0),
    "mkdir": (83, 0), "mknod": (133, 0, 0, 0), "chmod": (90, 0, 0), "symlink": (88, 0, 0), "setuid": (105, 0),
    "open": (2, 0, 0), "openat2": (437, 0, 0, 0, 0), "memfd": (319, 0, 0), "userfaultfd": (323, 0),
    "perf": (298, 0, 0, 0, 0, 0), "module": (313, 0, 0, 0), "console": (16, 0, 0x5412, 0),
    "dumpable": (157, 4, 1, 0, 0, 0),
}
for name, words in CALLS.items():
    said(name, lambda: raw(*words))
"""


def probe(code: bytes, *extra: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-ISc", PROBE + "\n".join(extra)],
        input=code,
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_what_it_allows_and_what_not() -> None:
    done = probe(program(VSOCK_DAEMON))
    answers = dict(line.rsplit(" ", 1) for line in done.stdout.decode().splitlines())

    assert done.returncode == 0, done.stderr.decode()
    assert {name for name, answer in answers.items() if answer == "ok"} == {"unix", "read", "thread"}
    conditional = {"inet", "inet6", "netlink", "packet", "vsock", "make", "cut", "unnamed"}
    conditional |= {"new user", "new mounts", "console", "dumpable"}
    assert {name for name, answer in answers.items() if answer == "EPERM"} == conditional
    assert {answer for name, answer in answers.items() if name not in conditional} == {"ok", "ENOSYS"}
    assert len(answers) > 30


@pytest.mark.parametrize("number", [0x40000000 + 39, 0x40000000 + 59])
def test_the_calls_of_another_architecture_end_the_process(number: int) -> None:
    assert probe(program(VSOCK_DAEMON), f"libc.syscall({number})").returncode == -signal.SIGSYS


def test_a_condition_on_one_value_or_several() -> None:
    for values, expected in (((1,), "0 1 0"), ((0, 2), "1 0 1"), ((0, 1, 2), "1 1 1")):
        allowed = {**VSOCK_DAEMON, "dup": Condition(0, one_of=values)}
        done = probe(program(allowed), "print(*[int(libc.dup(fd) >= 0) for fd in range(3)])")
        assert done.stdout.decode().splitlines()[-1] == expected


def test_a_name_without_a_number_is_a_mistake_of_ours() -> None:
    with pytest.raises(BugError, match="'frobnicate'"):
        program({"frobnicate": None})


def test_it_is_made_once_and_fits_the_kernels_bound() -> None:
    assert seccomp.vsock_daemon() is seccomp.vsock_daemon()
    assert len(seccomp.vsock_daemon()) // 8 < 4096
