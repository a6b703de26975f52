"""What crun cannot do is told by the field of the spec that asked for it, with a code and what to try."""

from __future__ import annotations

from typing import Any

import pytest

from agent.complaints import explain
from agent.crun import complaint
from ttrpc import Code, RpcError

CONFIG: dict[str, Any] = {
    "hostname": "h" * 300,
    "process": {
        "cwd": "/nowhere",
        "args": ["sh"],
        "rlimits": [
            {"type": "RLIMIT_NOFILE", "soft": 5, "hard": 1 << 21},
            {"type": "RLIMIT_CORE", "soft": 7, "hard": 6},
        ],
    },
    "mounts": [
        {"destination": "/data", "type": "bind", "source": "/run/kata/x/vol", "options": ["rbind"]},
        {"destination": "/opt/loop/x", "type": "bind", "source": "/run/kata/o"},
        {"destination": "/odd", "type": "odd", "source": "none", "options": ["size=odd", "ro"]},
    ],
    "linux": {"resources": {"memory": {"limit": 4096}}},
}


@pytest.mark.parametrize(
    ("said", "code", "text", "hint"),
    [
        (
            "setrlimit `RLIMIT_NOFILE`: Operation not permitted",
            Code.INVALID_ARGUMENT,
            "process.rlimits RLIMIT_NOFILE (soft 5, hard 2097152) cannot be set: Operation not permitted",
            "it is above what the guest's kernel allows: fs.nr_open",
        ),
        (
            "setrlimit `RLIMIT_CORE`: Invalid argument",
            Code.INVALID_ARGUMENT,
            "process.rlimits RLIMIT_CORE (soft 7, hard 6) cannot be set: Invalid argument",
            "the soft limit must not be above the hard one",
        ),
        (
            "mount `/run/kata/x/vol` to `data`: Not a directory",
            Code.INVALID_ARGUMENT,
            "the mount at /data (of /run/kata/x/vol) cannot be made: Not a directory",
            "one of the two is a file and the other a directory, or a file is on the way",
        ),
        (
            "mount `/run/kata/x/vol` to `/data`: Permission denied",
            Code.FAILED_PRECONDITION,
            "the mount at /data (of /run/kata/x/vol) cannot be made: Permission denied",
            "",
        ),
        (
            "mount `none` to `odd`: No such device",
            Code.INVALID_ARGUMENT,
            "the mount at /odd (of odd, options size=odd,ro) cannot be made: No such device",
            "the guest's kernel has no such file system: see kernel_modules in [agent.kata]",
        ),
        (
            "error stat'ing file `/run/kata/x/vol`: No such file or directory",
            Code.INVALID_ARGUMENT,
            "the mount at /data (of /run/kata/x/vol) cannot be made: No such file or directory",
            "",
        ),
        (
            "openat2 `opt/loop`: Too many levels of symbolic links",
            Code.INVALID_ARGUMENT,
            "the mount at /opt/loop/x (of /run/kata/o) cannot be made: Too many levels of symbolic links",
            "a link of the image leads nowhere",
        ),
        (
            "chdir `/nowhere`: No such file or directory",
            Code.INVALID_ARGUMENT,
            "process.cwd '/nowhere' cannot be entered: No such file or directory",
            "",
        ),
        (
            "writing file `pids.max`: Invalid argument",
            Code.INVALID_ARGUMENT,
            "linux.resources: pids.max cannot be set: Invalid argument",
            "",
        ),
        (
            "open `/sys/fs/cgroup/kata/c1/memory.oom.group`: No such file or directory",
            Code.INVALID_ARGUMENT,
            "linux.resources: memory.oom.group cannot be set: No such file or directory",
            "the guest's kernel has no such control",
        ),
        (
            "OOM: the memory limit could be too low: write to sync socket: Broken pipe",
            Code.INVALID_ARGUMENT,
            "linux.resources.memory.limit 4096 is too low for a process to start",
            "some MiB are needed to start any program",
        ),
        (
            "sethostname: Invalid argument",
            Code.INVALID_ARGUMENT,
            f"hostname {'h' * 80!r} cannot be set: Invalid argument",
            "",
        ),
    ],
)
def test_what_was_wrong_is_named(said: str, code: Code, text: str, hint: str) -> None:
    found = explain(RpcError(Code.INTERNAL, f"container c1: {said}"), CONFIG)

    assert (found.code, found.message) == (code, f"container c1: {text}{hint and f'; try: {hint}'}")


@pytest.mark.parametrize(
    "said",
    [
        "mount `/elsewhere` to `elsewhere`: Invalid argument",
        "openat2 `etc/passwd`: Permission denied",
        "chdir `/other`: No such file or directory",
        "",
    ],
)
def test_what_is_not_known_stays_as_it_is(said: str) -> None:
    error = RpcError(Code.INTERNAL, f"container c1: {said}")

    assert explain(error, CONFIG) is error
    assert explain(error, {"process": {"args": ["sh"]}}) is error


@pytest.mark.parametrize(
    ("program", "said", "why"),
    [
        (
            "nope",
            "executable file `nope` not found in $PATH: No such file or directory",
            "executable file not found in $PATH",
        ),
        (
            "/nope",
            "executable file `/nope` not found in $PATH: No such file or directory",
            "no such file or directory",
        ),
        (
            "/etc/passwd",
            "open executable: Permission denied",
            "permission denied; try: it must be a file that the container's user may execute",
        ),
        (
            "/etc",
            "open executable: Operation not permitted",
            "it is no file: permission denied; try: it must be a file that the container's user may execute",
        ),
        ("/etc", "open executable: Is a directory", "is a directory"),
        (
            "/etc/passwd",
            "the path `/etc/passwd` exists but it is not executable: Operation not permitted",  # since 1.21
            "permission denied; try: it must be a file that the container's user may execute",
        ),
        (
            "/etc",
            "the path `/etc` is not a regular file: Operation not permitted",
            "it is no file: permission denied; try: it must be a file that the container's user may execute",
        ),
        ("/sh", "exec container process `/sh`: Exec format error", "exec format error"),
        (
            "/sh",
            "exec container process (missing dynamic library?) `//sh`: No such file or directory",
            "no such file or directory",
        ),
    ],
)
def test_why_a_program_cannot_be_run_is_told_in_runcs_words(program: str, said: str, why: str) -> None:
    """Docker's client answers 127 and 126 by these."""
    found = explain(RpcError(Code.INTERNAL, f"exec e of c1: {said}"), {"process": {"args": [program]}})

    assert found.code is Code.INVALID_ARGUMENT
    assert found.message == f"exec e of c1: process.args[0] {program!r} cannot be run: {why}"


@pytest.mark.parametrize(
    "said",
    [
        "the requested cgroup controller `nosuch` is not available",  # 1.8
        "controller `nosuch` is not available under /sys/fs/cgroup/kata/c1/cgroup.controllers",  # 1.21, 1.28
        "invalid seccomp action `SCMP_ACT_NONE`",
        "seccomp get action `SCMP_ACT_NONE`",  # 1.28
    ],
)
def test_whose_fault_it_is_in_the_words_of_each_crun(said: str) -> None:
    assert complaint("container c1", said, 1).code is Code.INVALID_ARGUMENT
