"""What a child may is a value; it is so before the first instruction, and what cannot be made so ends it."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from devices import child as children
from devices import confine
from devices.child import Child
from devices.confine import Bind, Confinement, Descriptors, View, environment, steps
from devices.errors import BugError, HostError
from devices.undo import MemoryUndo

USER = 2000000123

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="to take rights away one must have them: root")


async def said(script: str, confinement: Confinement, **spawn: Any) -> list[str]:
    """The lines that a shell script prints in this confinement."""
    child = await Child.spawn(
        ["/bin/sh", "-c", script], name="sh", undo=MemoryUndo(), confinement=confinement, **spawn
    )
    await child.wait(20)
    return child.stderr_tail(1000).splitlines()


# --- the value


def test_left_out_is_the_strictest() -> None:
    one = Confinement()
    assert (one.mask, one.network, one.view, one.own_pids) == (0, confine.NO_NETWORK, View(), True)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"user": -1}, "user -1"),
        ({"user": 1 << 31}, "user 2147483648"),
        ({"user": 5, "capabilities": ("chown",)}, "user 5 cannot keep capabilities: chown"),
        ({"capabilities": ("chown", "cap_fly")}, "no capabilities cap_fly"),
    ],
)
def test_what_cannot_be_is_no_value(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(BugError, match=words):
        Confinement(**keys)


def test_capabilities_have_the_kernels_numbers() -> None:
    names = Path("/usr/include/linux/capability.h").read_text().splitlines()
    table = [line.split() for line in names if line.startswith("#define CAP_") and line.split()[2].isdigit()]
    assert [f"CAP_{name.upper()}" for name in confine.CAPABILITIES] == [words[1] for words in table]
    assert Confinement(capabilities=("mknod", "chown")).mask == 1 << 27 | 1


def test_the_order_of_the_steps() -> None:
    """All that needs rights comes first; the user goes before its capabilities, the filter is last."""
    one = Confinement(network="/x", capabilities=("chown",), view=View(), filter=b"x", writes=0)
    words = steps(one, "/bin/true", Descriptors(cgroups=[7, 8], network=9, filter=10))
    kinds = [word for word in words if word.isalpha() or "-" in word[1:]]
    order = [kinds.index(word) for word in ("tell", "enter", "unshare", "mount", "root", "readonly", "limit")]
    order += [kinds.index(word) for word in ("bounding", "user", "capabilities", "die-with-parent")]
    assert order == sorted(order)
    assert words[:6] == ["tell", "7", "0", "tell", "8", "0"]
    assert words[6:9] == ["enter", "9", "0x40000000"]
    assert words[words.index("bounding") :] == [
        *("bounding", "0x1", "user", "0", "capabilities", "0x1"),
        *("die-with-parent", "9", "no-new-privileges", "filter", "10"),
    ]


def test_a_view_has_its_parts_once_and_parents_first(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/file").touch()
    binds = (
        Bind(path=f"{tmp_path}/a/b", writable=True),
        Bind(path=f"{tmp_path}/a/b/file"),
        Bind(path="/usr/bin"),
    )
    words = steps(Confinement(view=View(binds=binds)), "/usr/bin/true", Descriptors())
    made = [words[at + 1] for at, word in enumerate(words) if word in ("dir", "file", "link")]
    bound = [words[at + 1] for at, word in enumerate(words) if word == "bind"]

    assert len(made) == len(set(made))
    assert all(os.path.dirname(path) in {*made, "/proc"} for path in made)
    assert "/usr" in bound
    assert "/usr/bin" not in bound  # is there with /usr
    assert bound[-2:] == [f"{tmp_path}/a/b", f"{tmp_path}/a/b/file"]
    with pytest.raises(HostError, match="/nope cannot be used: No such file"):
        steps(Confinement(view=View(binds=(Bind(path="/nope"),))), "/bin/true", Descriptors())
    with pytest.raises(HostError, match=r"/etc/passwd is no character device"):
        steps(Confinement(view=View(nodes=("/etc/passwd",))), "/bin/true", Descriptors())


@pytest.mark.parametrize(
    ("program", "home"),
    [
        ("/opt/kata/bin/qemu", "/opt/kata"),
        ("/opt/kata/libexec/virtiofsd", "/opt/kata"),
        ("/opt/tools/qemu", "/opt/tools"),
        ("/opt/private/qemu", "/opt/private/qemu"),
        ("/opt/missing/qemu", "/opt/missing/qemu"),
        ("/qemu", "/qemu"),
        ("/bin/qemu", "/bin/qemu"),
    ],
)
def test_what_a_program_needs_of_its_own(program: str, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prefix; a directory that others cannot enter would be of no use to another user."""

    def look(path: str) -> os.stat_result:
        if "missing" in path:
            raise FileNotFoundError
        return os.stat_result((0o040700 if "private" in path else 0o040755, *range(9)))

    monkeypatch.setattr(os, "stat", look)
    assert confine._home(program) == home


def test_limits_are_the_wanted_ones_or_what_may_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def limits(one: Confinement) -> dict[int, int]:
        return dict(confine._limits(one))

    monkeypatch.setattr(confine, "_may_raise", lambda: False)
    monkeypatch.setattr(resource, "getrlimit", lambda number: (100, 5000))
    found = limits(Confinement(user=5, files=9000, locked=4000, writes=0, threads=7))
    assert found == {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 5000,
        resource.RLIMIT_MEMLOCK: 4000,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NPROC: 7,
    }
    with pytest.raises(
        HostError, match=r"64 MiB of memory have to be locked, and the limit is 0 MiB; try: Limit"
    ):
        limits(Confinement(locked=64 << 20))
    monkeypatch.setattr(confine, "_may_raise", lambda: True)
    assert limits(Confinement(files=9000, locked=64 << 20))[resource.RLIMIT_MEMLOCK] == 64 << 20
    assert resource.RLIMIT_NPROC not in limits(Confinement())  # root has none


# --- what it makes of a child


async def test_a_child_of_another_user_is_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by the child itself: no right, no group, no way to get one; a /proc of its own, where it is the
    first; its own nodes, and an environment without a word of ours."""
    monkeypatch.setenv("SECRET_OF_CONTAINERD", "x")
    one = Confinement(user=USER, view=View(nodes=("/dev/net/tun",)), files=77)
    facts = """
        echo $$ $(id -u) $(id -g) $(id -G) $(ulimit -n) $(ulimit -Hc) $(umask)
        grep -E 'CapInh|CapPrm|CapEff|CapBnd|CapAmb|NoNewPrivs' /proc/self/status | cut -f2 | xargs
        stat -c '%n %A %u %t:%T' /dev/*
        ls /; ls /proc | grep -c '^[0-9]'; cat /proc/net/dev | wc -l
        echo > /x; echo > /dev/x; echo > /proc/sys/kernel/core_pattern; mkdir /usr/x
        env
    """
    lines = await said(facts, one, env={"OWN": "1"})

    assert lines[0] == f"1 {USER} {USER} {USER} 77 0 0077"
    assert lines[1] == " ".join(["0000000000000000"] * 5 + ["1"])
    nodes = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("/dev/")}
    assert nodes["/dev/null"] == ["crw-rw-rw-", "0", "1:3"]
    assert nodes["/dev/net"][0] == "drwxr-xr-x"
    assert {"dev", "proc", "usr"} <= set(lines)
    assert not {"home", "root", "var", "tmp", "run", "boot", "srv"} & set(lines)
    assert sum("Read-only file system" in line for line in lines) == 4
    told = dict(line.split("=", 1) for line in lines if "=" in line)
    assert told == {**environment({"OWN": "1"}), "PWD": "/"}  # the last is the shell's own


async def test_root_keeps_what_is_named_and_cannot_have_more() -> None:
    one = Confinement(capabilities=("chown", "mknod"))
    lines = await said("grep Cap /proc/self/status; mount -t tmpfs x /usr; mount -o remount,rw /", one)

    mask, none = f"{one.mask:016x}", "0" * 16
    assert [line.partition(":")[2].strip() for line in lines[:5]] == [none, mask, mask, mask, none]
    refused = [line for line in lines[5:] if line.startswith("mount: ")]
    assert len(refused) == 2
    assert all("permission denied" in line or "must be superuser" in line for line in refused)


async def test_root_without_a_capability_has_nobodys_rights(tmp_path: Path) -> None:
    """A file of another user's is closed to it, the host's processes are out of sight and reach."""
    (tmp_path / "secret").touch(mode=0o600)
    os.chown(tmp_path / "secret", 5, 5)
    one = Confinement(view=View(binds=(Bind(path=str(tmp_path), writable=True),)))
    script = f"cat {tmp_path}/secret; chown 0 {tmp_path}/secret; kill -0 {os.getpid()}; echo $(id -u)"
    lines = await said(script, one)

    assert "Permission denied" in lines[0]
    assert "not permitted" in lines[1]
    assert "No such process" in lines[2] or "Illegal" in lines[2] or "kill" in lines[2]
    assert lines[3] == "0"


async def test_later_mounts_appear_where_they_are_to(tmp_path: Path) -> None:
    """What is mounted below a directory that `follows` is seen by a child that runs already, else not."""
    from devices.mounts import MS_NOSUID, bind, set_propagation, unmount
    from devices.syscalls import mount

    for name in ("shared", "other"):
        (tmp_path / name / "below").mkdir(parents=True)
        bind(f"{tmp_path}/{name}", f"{tmp_path}/{name}")
        set_propagation(f"{tmp_path}/{name}", "shared")
    (tmp_path / "go").mkdir()
    binds = (
        Bind(path=f"{tmp_path}/shared", follows=True),
        Bind(path=f"{tmp_path}/other"),
        Bind(path=f"{tmp_path}/go"),
    )
    script = f"until test -e {tmp_path}/go/now; do sleep 0.02; done; ls {tmp_path}/*/below"
    child = await Child.spawn(
        ["/bin/sh", "-c", script],
        name="sh",
        undo=MemoryUndo(),
        confinement=Confinement(view=View(binds=binds)),
    )
    try:
        for name in ("shared", "other"):
            mount("tmpfs", f"{tmp_path}/{name}/below", "tmpfs", MS_NOSUID, "")
            (tmp_path / name / "below" / f"in-{name}").touch()
        (tmp_path / "go" / "now").touch()
        await child.wait(20)
        assert "in-shared" in child.stderr_tail(10)
        assert "in-other" not in child.stderr_tail(10)
    finally:
        await child.kill()
        for name in ("shared/below", "other/below", "shared", "other"):
            unmount(f"{tmp_path}/{name}")


async def test_children_are_placed_before_they_run(tmp_path: Path) -> None:
    """Each writes itself into the files, in their order."""
    for name in ("a", "b"):
        (tmp_path / name).touch()
    children.place_children([f"{tmp_path}/a", f"{tmp_path}/b"])
    try:
        await said("exit 0", Confinement())
        assert [(tmp_path / name).read_text() for name in ("a", "b")] == ["0", "0"]
        children.place_children([f"{tmp_path}/missing"])
        with pytest.raises(HostError, match=r"cannot start sh .*missing"):
            await said("exit 0", Confinement())
    finally:
        children.place_children([])


# --- what cannot be done

# (system call, its argument that must be, value), and the step that fails. Both sides of one number:
# the argument None is any.
FAILURES = {
    "tell": ("write", 2, 1),
    "enter": ("setns", 1, 0x40000000),
    "unshare": ("unshare", 0, 0x8020000),
    "umask": None,
    "mount": ("mount", None, 0),
    "bind": ("open_tree", None, 0),
    "bind ": ("mount_setattr", 2, 0x9000),
    "bind  ": ("move_mount", None, 0),
    "dir": ("mkdir", None, 0),
    "node": ("mknod", None, 0),
    "node ": ("chown", None, 0),
    "link": ("symlink", None, 0),
    "file": ("open", None, 0),
    "root": ("pivot_root", None, 0),
    "root ": ("umount2", None, 0),
    "root  ": ("chdir", None, 0),
    "readonly": ("mount_setattr", 2, 0),
    "limit": ("prlimit64", 1, resource.RLIMIT_CORE),
    "bounding": ("prctl", 0, 24),
    "bounding ": ("prctl", 0, 23),
    "user": ("setgroups", None, 0),
    "user ": ("setresgid", None, 0),
    "user  ": ("setresuid", None, 0),
    "capabilities": ("prctl", 0, 47),
    "capabilities ": ("capset", None, 0),
    "die-with-parent": ("prctl", 0, 1),
    "no-new-privileges": ("prctl", 0, 38),
    "filter": ("seccomp", None, 0),
    "filter ": ("pread64", 2, 32768),
}
NUMBERS = {
    "write": 1, "open": 2, "pread64": 17, "mkdir": 83, "symlink": 88, "chown": 92, "chdir": 80,
    "setgroups": 116, "setresuid": 117, "setresgid": 119, "capset": 126, "mknod": 133, "pivot_root": 155,
    "prctl": 157, "mount": 165, "umount2": 166, "unshare": 272, "prlimit64": 302, "setns": 308,
    "seccomp": 317, "open_tree": 428, "move_mount": 429, "mount_setattr": 442,
}  # fmt: skip

# In a process of its own for each case: the kernel itself refuses one system call there, and in its children.
REFUSING = """
import asyncio, ctypes, errno, json, os, struct, sys
from devices.child import Child, place_children
from devices.confine import Bind, Confinement, View
from devices.errors import HostError
from devices.seccomp import vsock_daemon
from devices.undo import MemoryUndo
cases, netns, place, file = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]
def refuse(number, argument, value):
    code = [(0x20, 0, 0, 0), (0x15, 1, 0, number), (6, 0, 0, 0x7FFF0000)]
    if argument is not None:
        code += [(0x20, 0, 0, 16 + 8 * argument), (0x15, 1, 0, value), (6, 0, 0, 0x7FFF0000)]
    code = b"".join(struct.pack("=HBBI", *each) for each in [*code, (6, 0, 0, 0x50000 | errno.EUSERS)])
    assert libc.prctl(22, 2, ctypes.byref(Program(len(code) // 8, code)), 0, 0) == 0
async def main():
    undo = MemoryUndo()
    view = View(binds=(Bind(path=file),), nodes=("/dev/net/tun",))
    for network in (netns, ""):
        one = Confinement(user=2000000124, network=network, view=view, filter=vsock_daemon())
        try:
            child = await Child.spawn(["/bin/echo", "it ran"], name="echo", undo=undo, confinement=one)
        except HostError as error:
            assert undo.entries == []
            return str(error)
        assert await child.wait(20) == 0 and child.stderr_tail() == "it ran"
    return "ran"
for case, words in cases.items():
    reader, writer = os.pipe()
    if os.fork() == 0:
        place_children([place])
        if words:
            refuse(*words)
        os.write(writer, asyncio.run(main()).encode())
        os._exit(0)
    os.close(writer)
    print(json.dumps([case, os.read(reader, 9999).decode()]))
    os.close(reader)
    os.wait()
"""


def test_whatever_step_fails_the_program_does_not_run(tmp_path: Path) -> None:
    """The kernel refuses one system call after the other (EUSERS, which none of them knows): the child ends
    with that step named."""
    (tmp_path / "file").touch()
    (tmp_path / "place").touch()
    cases: dict[str, list[int | None]] = {"": []}
    cases |= {step: [NUMBERS[words[0]], *words[1:]] for step, words in FAILURES.items() if words is not None}
    holder = subprocess.Popen(["unshare", "-n", "sh", "-c", "echo; exec sleep 100"], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    try:
        holder.stdout.readline()
        given = [cases, f"/proc/{holder.pid}/ns/net", f"{tmp_path}/place", f"{tmp_path}/file"]
        done = subprocess.run(
            [sys.executable, "-c", REFUSING, json.dumps(given)],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
            cwd=Path(__file__).parents[3],
        )
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    answers = dict(json.loads(line) for line in done.stdout.splitlines())

    assert answers.pop("") == "ran"
    assert set(answers) == {step for step, words in FAILURES.items() if words}
    for step, answer in answers.items():
        assert f"it cannot be confined: {step.strip()}" in answer, step
        assert "Too many users" in answer, step


def test_every_step_of_the_helper_is_in_that_table() -> None:
    source = Path(confine.HELPER).with_name("confine.c").read_text()
    names = {line.split('"')[1] for line in source.splitlines() if line.startswith('    {"')}
    assert names == {step.strip() for step in FAILURES}


async def test_a_program_that_cannot_be_executed_is_told(tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(b"\x7fELF but no more")
    (tmp_path / "odd").chmod(0o755)
    with pytest.raises(HostError, match=r"it cannot be confined: exec .*/odd: Exec format error"):
        await Child.spawn([f"{tmp_path}/odd"], name="odd", undo=MemoryUndo(), confinement=Confinement())


async def test_without_the_helper_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confine, "HELPER", "/nope/kata-confine")
    with pytest.raises(
        HostError, match=r"/nope/kata-confine, which confines it, is not there; try: make setup"
    ):
        await said("true", Confinement())


async def test_a_child_that_dies_while_it_is_confined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held up by a pipe that nobody reads, then killed: it never was the program, and nothing is left."""
    undo, pipe = MemoryUndo(), tmp_path / "pipe"
    os.mkfifo(pipe)
    held = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        while True:
            os.write(held, b"x" * 4096)
    except BlockingIOError:
        pass
    children.place_children([str(pipe)])
    try:
        spawning = asyncio.create_task(
            Child.spawn(["/bin/echo", "it ran"], name="echo", undo=undo, confinement=Confinement())
        )
        while not (found := [pid for pid in _children() if "kata-confine" in _cmdline(pid)]):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        os.kill(found[0], signal.SIGKILL)
        with pytest.raises(HostError, match="it was killed while it was confined"):
            await spawning
        monkeypatch.setattr(children, "_REPORT_DEADLINE", 0.05)
        with pytest.raises(HostError, match=r"it was not confined within 0\.05 s"):
            await Child.spawn(["/bin/echo"], name="echo", undo=undo, confinement=Confinement())
    finally:
        children.place_children([])
        os.close(held)
    assert undo.entries == []
    assert [pid for pid in _children() if "kata-confine" in _cmdline(pid)] == []


def _children() -> list[int]:
    return [
        int(word)
        for thread in os.listdir("/proc/self/task")
        for word in Path(f"/proc/self/task/{thread}/children").read_text().split()
    ]


def _cmdline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
