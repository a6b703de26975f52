"""guest/enter.c by itself, in namespaces of this machine: it makes the process that is ordered, or none."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.enter import Entrance, _is_in, fits, pack, read_filter
from agent.process import Process
from agent.reaper import Reaper
from guest.build import _BARE_FLAGS

_SOURCE = Path(__file__).parents[3] / "guest" / "enter.c"
_ALLOW = {"defaultAction": "SCMP_ACT_ALLOW"}
_CONFIG: dict[str, Any] = {
    "process": {"env": ["PATH=/bin", "FROM=container"], "capabilities": {"bounding": ["CAP_KILL"]}},
    "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "cgroup")]},
}


def _process(*args: str, **fields: Any) -> dict[str, Any]:
    return {
        "terminal": False,
        "user": {"uid": 0, "gid": 0},
        "args": list(args),
        "env": ["PATH=/usr/bin:/bin", "HOME=/"],
        "cwd": "/",
        "noNewPrivileges": False,
        "capabilities": {},
        **fields,
    }


@pytest.mark.parametrize(
    ("process", "config"),
    [
        ({"terminal": True}, {}),
        ({"apparmorProfile": "x"}, {}),
        ({"args": []}, {}),
        ({"args": ["a\0b"]}, {}),
        ({"user": {"uid": 1, "gid": 1, "umask": -1}}, {}),
        ({"oomScoreAdj": 1 << 40}, {}),
        ({}, {"process": {"oomScoreAdj": -1001}}),
        ({"user": {"uid": 1, "gid": 1, "groups": "?"}}, {}),
        ({"rlimits": [{"type": "RLIMIT_TEA", "soft": 1, "hard": 1}]}, {}),
        ({}, {"annotations": {"run.oci.keep_original_groups": "1"}}),
        ({}, {"process": {"selinuxLabel": "x"}}),
        ({}, {"linux": {**_CONFIG["linux"], "seccomp": {"defaultAction": "SCMP_ACT_NOTIFY"}}}),
        ({}, {"linux": {**_CONFIG["linux"], "seccomp": {**_ALLOW, "listenerPath": "/x"}}}),
        ({}, {"linux": {**_CONFIG["linux"], "seccomp": {**_ALLOW, "flags": ["SECCOMP_FILTER_FLAG_TEA"]}}}),
        (
            {},
            {
                "linux": {
                    **_CONFIG["linux"],
                    "seccomp": {**_ALLOW, "syscalls": [{"action": "SCMP_ACT_NOTIFY"}]},
                }
            },
        ),
        ({}, {"linux": {**_CONFIG["linux"], "personality": {"domain": "LINUX32"}}}),
        ({}, {"linux": {"namespaces": [*_CONFIG["linux"]["namespaces"], {"type": "user"}]}}),
        ({}, {"linux": {"namespaces": [{"type": "pid"}]}}),
    ],
)
def test_what_it_does_not_know_is_left_to_crun(process: dict[str, Any], config: dict[str, Any]) -> None:
    assert fits(_process("true"), _CONFIG)
    assert fits(_process("true"), {**_CONFIG, "linux": {**_CONFIG["linux"], "seccomp": _ALLOW}})
    assert not fits(_process(**{"args": ["true"], **process}), {**_CONFIG, **config})


def test_an_order_takes_from_the_container_what_the_exec_leaves_open() -> None:
    asked = _process("sh", "-c", "x", env=[], user={"uid": 5, "gid": 6, "additionalGids": [7]})
    del asked["capabilities"]
    order = pack(asked, {**_CONFIG["process"], "oomScoreAdj": -7})

    bounding, *_ = struct.unpack_from("=5Q", order)
    uid, gid, mask, _, oom, groups, limits, args, variables, _, _, size = struct.unpack_from(
        "=4Ii7I", order, 40
    )
    assert bounding == 1 << 5
    assert (uid, gid, mask, oom, groups, limits, args, variables) == (5, 6, 0o022, -7, 1, 0, 3, 2)
    assert size == len(order)
    assert order.endswith(b"/\0sh\0-c\0x\0PATH=/bin\0FROM=container\0")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The program, built as for the guest."""
    made = tmp_path_factory.mktemp("enter") / "enter"
    subprocess.run(["gcc", *_BARE_FLAGS, "-o", str(made), str(_SOURCE)], check=True, timeout=60)
    assert made.stat().st_size < 8192
    return str(made)


@pytest.fixture
def cgroup() -> Iterator[str]:
    """A group of cgroup v2, which may be beside v1's here."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [fields[1] for fields in mounts if fields[2] == "cgroup2"]
    if not roots or os.geteuid() != 0:
        pytest.skip("no cgroup2 mount, or not root")
    made = Path(roots[0], f"enter-{uuid.uuid4().hex[:12]}")
    made.mkdir()
    yield str(made)
    (made / "cgroup.kill").write_text("1")
    while "populated 1" in (made / "cgroup.events").read_text():
        os.sched_yield()
    made.rmdir()


class _NoStdio:
    def start(self) -> None: ...

    def process_died(self) -> None: ...


@pytest.fixture
async def init(orphans: Reaper) -> AsyncIterator[Process]:
    """The first process of a pid namespace and others."""
    argv = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--mount", "--ipc", "--uts", "cat"]
    reader, writer = os.pipe2(os.O_CLOEXEC)
    out, said = os.pipe2(os.O_CLOEXEC)
    outer, ended = orphans.spawn(
        ["/usr/bin/" + argv[0], *argv[1:]], env={"PATH": "/bin"}, stdin=reader, stdout=said, stderr=2
    )
    os.write(writer, b"up")
    assert os.read(out, 2) == b"up"  # cat runs
    (pid,) = map(int, Path(f"/proc/{outer}/task/{outer}/children").read_text().split())
    made = Process("", _NoStdio())  # type: ignore[arg-type]
    made.born(pid, ended)
    yield made
    with contextlib.suppress(ProcessLookupError):
        os.kill(outer, signal.SIGKILL)
    await ended
    for fd in (reader, writer, out, said):
        os.close(fd)


def _is_in_group_named(pid: int, cgroup: str) -> bool:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return any(line.startswith("0::") and line.endswith(os.path.basename(cgroup)) for line in lines)


class Tried:
    """Runs orders, and reads what they say on stdout."""

    def __init__(self, reaper: Reaper, program: str, init: Process, cgroup: str) -> None:
        self.reaper = reaper
        self.entrance = Entrance(reaper, program)
        self.init, self.cgroup = init, cgroup

    async def __call__(
        self, process: dict[str, Any], seccomp: tuple[bytes, int] = (b"", 0)
    ) -> tuple[int, str] | None:
        """(exit code, stdout); None if it was left to crun."""
        since = self.reaper.mark()
        reader, writer = os.pipe2(os.O_CLOEXEC)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            order = pack(process, _CONFIG["process"], seccomp)
            pid = await self.entrance.enter(order, self.init, self.cgroup, (null, writer, null), 30)
            os.close(writer)
            if not pid:
                return None
            code = await asyncio.wait_for(self.reaper.watch(pid, since), 30)
            return code, os.read(reader, 65536).decode()
        finally:
            os.close(reader)
            os.close(null)


@pytest.fixture
def tried(
    orphans: Reaper, program: str, init: Process, cgroup: str, monkeypatch: pytest.MonkeyPatch
) -> Tried:
    """See Tried. The groups of this machine may have other names than those of the guest."""
    monkeypatch.setattr("agent.enter._is_in", _is_in_group_named)
    return Tried(orphans, program, init, cgroup)


async def test_it_is_in_the_containers_namespaces_and_cgroup(tried: Tried) -> None:
    script = "for s in pid mnt ipc uts net; do readlink /proc/self/ns/$s; done; cat /proc/$$/cgroup; exit 3"
    found = await tried(_process("sh", "-c", script))
    assert found is not None
    code, text = found
    lines = text.split()
    theirs = [
        os.readlink(f"/proc/{tried.init.pid}/ns/{kind}") for kind in ("pid", "mnt", "ipc", "uts", "net")
    ]
    assert (code, lines[:5]) == (3, theirs)
    assert os.readlink("/proc/self/ns/pid") not in theirs
    assert any(line.startswith("0::") and line.endswith(os.path.basename(tried.cgroup)) for line in lines)


async def test_its_rights_are_those_of_the_order_and_no_more(tried: Tried) -> None:
    sets = {"bounding": ["CAP_KILL", "CAP_CHOWN"], "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"]}
    user = {"uid": 1000, "gid": 1001, "additionalGids": [7, 8, 9], "umask": 0o027}
    script = "cat /proc/self/status; umask; ls /proc/$$/fd; pwd; id -u"
    limits = [{"type": "RLIMIT_NOFILE", "soft": 33, "hard": 44}]
    found = await tried(
        _process(
            "sh", "-c", script, capabilities=sets, user=user, noNewPrivileges=True, rlimits=limits, cwd="/tmp"
        )
    )
    assert found is not None
    status = dict(line.split(":\t", 1) for line in found[1].splitlines() if ":\t" in line)
    assert status["Uid"].split() == ["1000"] * 4
    assert status["Gid"].split() == ["1001"] * 4
    assert status["Groups"].split() == ["7", "8", "9"]
    assert [int(status[key], 16) for key in ("CapBnd", "CapPrm", "CapEff", "CapInh")] == [0b100001, 0, 0, 0]
    assert status["NoNewPrivs"] == "1"
    assert [int(status[key], 16) & 0x7FFFFFFF for key in ("SigBlk", "SigIgn")] == [
        0,
        0,
    ]  # but the C library's
    assert found[1].splitlines()[-6:] == ["0027", "0", "1", "2", "/tmp", "1000"]


@pytest.mark.parametrize(
    "change",
    [
        {"args": ["nonesuch"]},
        {"args": ["/etc"]},
        {"args": ["/etc/passwd"]},
        {"args": ["./sh"]},
        {"args": ["sh"], "env": ["HOME=/", "PATH=bin:/bin"]},
        {"args": ["sh"], "env": ["HOME=/"]},
        {"args": ["sh"], "env": ["HOME=/", "PATH=" + "/" * 5000]},
        {"cwd": "/nowhere"},
        {"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 2, "hard": 1}]},
        {"capabilities": {"effective": ["CAP_KILL"]}},
    ],
)
async def test_what_cannot_be_done_wholly_is_not_done(tried: Tried, change: dict[str, Any]) -> None:
    assert await tried(_process(**{"args": ["touch", "/nowhere"], **change})) is None


def _filter(call: int, answer: int) -> bytes:
    """`answer` (a SECCOMP_RET) to this system call, all others are allowed; see seccomp(2)."""
    code = [(0x20, 0, 0, 0), (0x15, 0, 1, call), (0x06, 0, 0, answer), (0x06, 0, 0, 0x7FFF0000)]
    return b"".join(struct.pack("=HBBI", *one) for one in code)


_ERRNO, _KILL = 0x00050000, 0x80000000
_MKDIR, _CLONE, _EXECVE, _SETRESUID = 83, 56, 59, 117


@pytest.mark.parametrize("privileges", [True, False])
async def test_the_containers_filter_holds(tried: Tried, privileges: bool) -> None:
    script = "mkdir /tmp/made-by-nobody || grep -E '^(Seccomp:|Uid|CapEff)' /proc/self/status"
    user = {"uid": 1000, "gid": 1000}
    code = _filter(_MKDIR, _ERRNO | 28)
    found = await tried(_process("sh", "-c", script, user=user, noNewPrivileges=not privileges), (code, 4))
    assert found is not None
    assert [line.split()[1] for line in found[1].splitlines()] == ["1000", "0" * 16, "2"]
    assert found[0] == 0


async def test_flags_that_the_kernel_does_not_know_are_left_out(tried: Tried) -> None:
    code = _filter(_MKDIR, _ERRNO | 28)
    found = await tried(_process("grep", "Seccomp:", "/proc/self/status"), (code, 1 << 30))
    assert found == (0, "Seccomp:\t2\n")


@pytest.mark.parametrize("answer", [_ERRNO | 1, _KILL])
@pytest.mark.parametrize("call", [_CLONE, _SETRESUID])
async def test_a_filter_that_forbids_what_is_needed_leaves_it_to_crun(
    tried: Tried, call: int, answer: int
) -> None:
    assert await tried(_process("true"), (_filter(call, answer), 0)) is None


async def test_a_filter_that_forbids_to_run_anything(tried: Tried) -> None:
    process = _process("true", noNewPrivileges=True)
    assert await tried(process, (_filter(_EXECVE, _ERRNO | 1), 0)) is None
    found = await tried(process, (_filter(_EXECVE, _KILL), 0))
    assert found == (128 + signal.SIGSYS, "")  # as with crun


def test_a_filter_is_that_of_the_container_or_none(tmp_path: Path) -> None:
    path = tmp_path / "seccomp.bpf"
    assert read_filter(None, str(path)) == (b"", 0)
    assert read_filter(_ALLOW, str(path)) is None
    for wrong in (b"", b"1234567", b"12345678" * 4097):
        path.write_bytes(wrong)
        assert read_filter(_ALLOW, str(path)) is None
    path.write_bytes(b"12345678")
    assert read_filter(_ALLOW, str(path)) == (b"12345678", 4)
    named = {**_ALLOW, "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC"]}
    assert read_filter(named, str(path)) == (b"12345678", 3)


async def test_a_program_that_the_kernel_refuses_leaves_no_process(tried: Tried, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text("#!/no/such/interpreter\n")
    bad.chmod(0o755)
    assert await tried(_process(str(bad))) is None
    assert not Path(tried.cgroup, "cgroup.procs").read_text()


async def test_a_container_that_has_ended_is_not_entered(tried: Tried, orphans: Reaper) -> None:
    orphans.stop()  # it stays a zombie
    os.kill(tried.init.pid, signal.SIGKILL)
    assert await tried(_process("true")) is None
    orphans.start()


async def test_a_pid_that_is_not_in_the_containers_cgroup_is_not_believed(
    tried: Tried, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forged(_: int) -> bytes:
        return struct.pack("=2I", 1, os.getpid())

    monkeypatch.setattr("agent.enter._read_all", forged)
    assert await tried(_process("true")) is None


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("/kata/c1", True),
        ("/kata/c1/sub", True),
        ("/kata/c1 (deleted)", True),
        ("/kata/c11", False),
        ("/", False),
    ],
)
def test_which_cgroups_are_the_containers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, inside: bool
) -> None:
    (tmp_path / "77").mkdir()
    (tmp_path / "77/cgroup").write_text(f"1:name=x:/kata/c1\n0::{text}\n")
    monkeypatch.setattr("agent.enter._PROC", str(tmp_path))
    assert _is_in(77, "/sys/fs/cgroup/kata/c1") is inside
    assert not _is_in(78, "/sys/fs/cgroup/kata/c1")


async def test_an_order_that_nobody_waits_for_is_not_carried_out(tried: Tried, tmp_path: Path) -> None:
    mark = tmp_path / "made"
    Path(tried.cgroup, "cgroup.freeze").write_text("1")
    order = pack(_process("touch", str(mark)), {})
    fds = (0, 1, 2)
    with pytest.raises(TimeoutError):
        await tried.entrance.enter(order, tried.init, tried.cgroup, fds, 0.2)
    Path(tried.cgroup, "cgroup.freeze").write_text("0")
    async with asyncio.timeout(30):
        while Path(tried.cgroup, "cgroup.procs").read_text():  # noqa: ASYNC110  (a file says it)
            await asyncio.sleep(0.01)
    assert not mark.exists()


async def test_the_copy_that_runs_cannot_be_written(tried: Tried) -> None:
    await tried(_process("true"))
    copy = tried.entrance._sealed()
    wanted = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    assert fcntl.fcntl(copy, fcntl.F_GET_SEALS) == wanted
    with pytest.raises(PermissionError):
        os.write(os.open(f"/proc/self/fd/{copy}", os.O_RDWR), b"x")


@pytest.mark.parametrize(
    ("passwd", "uid", "home"),
    [
        (b"root:x:0:0::/root:/bin/sh\nann:x:1000:7:Ann:/home/ann:/bin/sh\n", 1000, "/home/ann"),
        (b"ann:x:1000:7:Ann:/home/ann:", 1000, "/home/ann"),
        (b"a:x:10001:7::/no:/\nb:x:1000:7::/b:/\nc:x:1000:7::/c:/\n", 1000, "/b"),
        (b"ann:x:1000:7:Ann:/home/ann\n", 1000, "/"),
        (b"#ann:x:1000:7:Ann:/home/ann:/\n:\n::::::\n", 1000, "/"),
        (b"", 0, "/"),
        (None, 0, "/"),
    ],
)
async def test_home(tried: Tried, tmp_path: Path, passwd: bytes | None, uid: int, home: str) -> None:
    """From the container's file, where the environment has none."""
    etc = tmp_path / "etc"
    etc.mkdir()
    if passwd is not None:
        (etc / "passwd").write_bytes(passwd)
    subprocess.run(
        ["nsenter", "-t", str(tried.init.pid), "-m", "mount", "--bind", str(etc), "/etc"], check=True
    )
    found = await tried(_process("sh", "-c", "echo $HOME", env=["PATH=/bin"], user={"uid": uid, "gid": 0}))
    assert found == (0, f"{home}\n")


@pytest.mark.parametrize("kind", ["zero", "fifo", "large"])
async def test_a_list_of_users_that_is_none_is_left_to_crun(tried: Tried, tmp_path: Path, kind: str) -> None:
    etc = tmp_path / "etc"
    etc.mkdir()
    if kind == "fifo":
        os.mkfifo(etc / "passwd")
    else:
        (etc / "passwd").write_bytes(b"\0" if kind == "zero" else b"#" * (1 << 20))
    subprocess.run(
        ["nsenter", "-t", str(tried.init.pid), "-m", "mount", "--bind", str(etc), "/etc"], check=True
    )
    assert await tried(_process("true", env=["PATH=/bin"])) is None
