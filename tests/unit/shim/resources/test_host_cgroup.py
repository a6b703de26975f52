"""A pod's VM, daemons and shim go to its cgroup on the host, by Kata's rule, and nothing of it stays."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devices import child as children
from devices.errors import CallerError
from devices.mounts import MountEntry
from devices.undo import MemoryUndo
from shim.launch import undo_kinds
from shim.resources import cgroup_paths, host_cgroup
from shim.resources.cgroup_paths import Hierarchy, hierarchies, memberships, relative_path
from shim.resources.host_cgroup import CgroupSettings, HostCgroup, cgroup_settings, release
from shim.spec.limits import Size
from shim.state.journalfile import Record

ME = os.getpid()
GIB = 1 << 30

V1 = ("cpu,cpuacct", "cpuset", "memory", "pids", "name=systemd")
FILES = {
    "cpu,cpuacct": ("cpu.shares", "cpu.cfs_quota_us", "cpu.cfs_period_us"),
    "cpuset": ("cpuset.cpus", "cpuset.mems"),
    "memory": ("memory.limit_in_bytes",),
    "pids": ("pids.max",),
}
V2_FILES = {"memory": "memory.max", "cpu": "cpu.max", "pids": "pids.max"}


class Host:
    """Cgroup file systems that behave like the kernel's, as far as directories, their files and moves go."""

    def __init__(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, *, v1: tuple[str, ...], v2: str | None
    ) -> None:
        self.root = root
        self.mounts = [Hierarchy(str(root / name), name) for name in v1]
        self.controllers = (v2 or "").split()
        if v2 is not None:
            self.mounts.append(Hierarchy(str(root / "unified"), ""))
        self.where = {(ME, each.identity): "/containerd" for each in self.mounts}
        self.written: dict[str, str] = {}
        self.refused: set[str] = set()
        self._mkdir, self._rmdir = os.mkdir, os.rmdir
        for each in self.mounts:
            (root / each.mount).mkdir()
            self._fill(each.mount)
            self.mkdir(f"{each.mount}/containerd")
        for name in ("cpus", "mems"):
            if "cpuset" in v1:
                (root / "cpuset" / f"cpuset.{name}").write_text("0-1\n")
        monkeypatch.setattr(host_cgroup, "hierarchies", lambda: self.mounts)
        monkeypatch.setattr(host_cgroup, "memberships", self.memberships)
        monkeypatch.setattr(host_cgroup, "_try_write", self.write)
        monkeypatch.setattr(os, "mkdir", self.mkdir)
        monkeypatch.setattr(os, "rmdir", self.rmdir)

    def of(self, path: str) -> Hierarchy | None:
        return next((each for each in self.mounts if path.startswith(f"{each.mount}/")), None)

    def _fill(self, path: str) -> None:
        identity = next(each.identity for each in self.mounts if f"{path}/".startswith(f"{each.mount}/"))
        names = ["cgroup.procs", *(() if identity == "" else ("tasks", *FILES.get(identity, ())))]
        if identity == "":
            names += ["cgroup.subtree_control"]
            above = Path(path).parent / "cgroup.subtree_control"
            given = above.read_text().split() if above.exists() else self.controllers
            Path(path, "cgroup.controllers").write_text(" ".join(given))
            names += [V2_FILES[name] for name in given if name in V2_FILES and above.exists()]
        for name in names:
            Path(path, name).touch()

    def mkdir(self, path: str, mode: int = 0o777) -> None:
        if path in self.refused:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        self._mkdir(path, mode)
        if self.of(path) is not None:
            self._fill(path)

    def rmdir(self, path: str, **_: Any) -> None:
        if self.of(str(path)) is not None and os.path.isdir(path):
            inside = list(self.inside(path))
            if inside or any(each.is_dir() for each in Path(path).iterdir()):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
            for each in Path(path).iterdir():
                each.unlink()
        self._rmdir(path)

    def inside(self, path: str | Path) -> list[int]:
        hierarchy = self.of(f"{path}/")
        assert hierarchy is not None
        name = str(path).removeprefix(hierarchy.mount) or "/"
        return [
            pid for (pid, identity), at in self.where.items() if (identity, at) == (hierarchy.identity, name)
        ]

    def memberships(self, pid: int | str = "self") -> dict[str, str]:
        number = ME if pid == "self" else int(pid)
        found = {identity: at for (one, identity), at in self.where.items() if one == number}
        if not found and number != ME:
            raise FileNotFoundError
        return found

    def write(self, path: str, value: object, *, quiet: bool = False) -> bool:
        if path in self.refused or not os.path.exists(path):
            return False
        directory, name = os.path.split(path)
        if name == "cgroup.procs":
            hierarchy = self.of(path)
            assert hierarchy is not None
            at = directory.removeprefix(hierarchy.mount) or "/"
            self.where[int(str(value)), hierarchy.identity] = at
        elif name == "cgroup.subtree_control":
            Path(path).write_text(f"{Path(path).read_text()} {str(value).lstrip('+')}")
        self.written[path.removeprefix(f"{self.root}/")] = str(value)
        return True

    def start(self, pid: int) -> None:
        """A child of ours: where the files say that it writes itself, else where we are."""
        for each in self.mounts:
            self.where[pid, each.identity] = self.where[ME, each.identity]
        for path in children._cgroups:
            hierarchy = self.of(path)
            assert hierarchy is not None
            assert os.path.exists(path)
            self.where[pid, hierarchy.identity] = os.path.dirname(path).removeprefix(hierarchy.mount)

    def places(self, pid: int) -> dict[str, str]:
        return {identity: at for (one, identity), at in self.where.items() if one == pid}

    def end(self, *pids: int) -> None:
        for key in [key for key in self.where if key[0] in pids]:
            del self.where[key]

    def directories(self) -> set[str]:
        return {
            os.path.relpath(path, self.root)
            for path, _, _ in os.walk(self.root)
            if path != str(self.root) and not path.endswith("/containerd") and Path(path).parent != self.root
        }


MakeHost = Callable[..., Host]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeHost:
    (tmp_path / "cgroup").mkdir()
    monkeypatch.setattr(children, "_cgroups", ())
    return lambda **keys: Host(tmp_path / "cgroup", monkeypatch, **keys)


KINDS: dict[str, dict[str, Any]] = {
    "version 1": {"v1": V1, "v2": None},
    "hybrid": {"v1": V1, "v2": ""},
    "version 2": {"v1": (), "v2": "cpuset cpu io memory pids"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("only", [True, False])
@pytest.mark.parametrize("keep_shim", [False, True])
async def test_where_everybody_goes(host: MakeHost, kind: str, only: bool, keep_shim: bool) -> None:
    """The shim, QEMU and a daemon, on each kind of host, by both of Kata's rules."""
    world, undo = host(**KINDS[kind]), MemoryUndo()
    settings = CgroupSettings(
        path="kubepods/pod1/abc", overhead="" if only else "kata_overhead/abc", keep_shim=keep_shim
    )
    cgroup = HostCgroup(settings, undo)
    await cgroup.open()
    qemu, daemon = 1 << 22, (1 << 22) + 1
    world.start(qemu)
    world.start(daemon)
    home = "/kubepods/pod1/abc" if only else "/kata_overhead/abc"
    if kind != "hybrid":  # there version 2, which counts nothing, is told later
        assert set(world.places(qemu).values()) == {home}, "before its first instruction"
    await cgroup.follow([qemu, daemon], [qemu, qemu + 7])

    shim = "/containerd" if keep_shim else home
    assert set(world.places(ME).values()) == {shim}
    assert set(world.places(daemon).values()) == {home}
    assert world.places(qemu).get("", "/kubepods/pod1/abc") == "/kubepods/pod1/abc"
    assert {at for identity, at in world.places(qemu).items() if identity} <= {home}
    threads = [
        path for path, value in world.written.items() if path.endswith("tasks") and value == str(qemu + 7)
    ]
    counted = ["cpu,cpuacct/kubepods/pod1/abc/tasks", "cpuset/kubepods/pod1/abc/tasks"]
    assert threads == ([] if only or kind == "version 2" else counted)

    world.end(qemu, daemon)
    assert await cgroup.close() == []
    assert await cgroup.close() == []
    assert set(world.places(ME).values()) == {"/containerd"}
    assert world.directories() == set()
    assert undo.entries == []
    assert children._cgroups == ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("only", [True, False])
async def test_under_systemd(host: MakeHost, kind: str, only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for the scope, with the shim in it, or the VMM in the pod's own; where it manages nothing
    (version 1's other controllers) the same path is made by hand. What systemd made it removes."""
    world, undo, asked = host(**KINDS[kind]), MemoryUndo(), []
    managed = [each for each in world.mounts if each.identity in ("", "memory", "name=systemd")]

    def start_scope(unit: str, slice_name: str, pids: list[int], *, arrived: Callable[[], bool]) -> None:
        asked.append((unit, slice_name, list(pids)))
        where = relative_path(f"{slice_name}::{unit.removesuffix('.scope')}", "")
        for each in managed:
            at = each.mount
            for part in where.split("/"):
                host_cgroup._enable(at)  # delegated: with all controllers
                at = f"{at}/{part}"
                os.makedirs(at, exist_ok=True)
            for pid in pids:
                world.where[pid, each.identity] = f"/{where}"
        assert arrived()

    monkeypatch.setattr(host_cgroup, "manages", lambda: True)
    monkeypatch.setattr(host_cgroup, "start_scope", start_scope)
    spec = {"linux": {"cgroupsPath": "kubepods-pod1.slice:cri-containerd:abc"}}
    settings = cgroup_settings(spec, "abc", only=only, limited=Size(1, GIB), keep_shim=False)
    pods = "/kubepods.slice/kubepods-pod1.slice/cri-containerd-abc.scope"
    home = pods if only else "/kata.slice/kata-overhead.slice/kata-abc.scope"
    cgroup = HostCgroup(settings, undo)
    await cgroup.open()
    qemu, daemon = 1 << 22, (1 << 22) + 1
    world.start(qemu)
    world.start(daemon)
    for _ in range(2):  # also after the VM has got more vCPUs
        await cgroup.follow([qemu, daemon], [qemu + 7])

    assert set(world.places(ME).values()) == {home}
    assert set(world.places(daemon).values()) == {home}
    moved = {each.identity for each in managed}
    assert world.places(qemu) == {
        each.identity: pods if each.identity in moved else home for each in world.mounts
    }
    first = ("cri-containerd-abc.scope", "kubepods-pod1.slice", [ME])
    if not only:
        assert asked == [("kata-abc.scope", "kata-overhead.slice", [ME]), (*first[:2], [qemu])]
    else:
        assert asked == [first]
    await cgroup.limit(Size(2, GIB))
    file = "unified{}/memory.max" if kind == "version 2" else "memory{}/memory.limit_in_bytes"
    assert world.written[file.format(pods)] == str(GIB + (512 << 20))

    world.end(qemu, daemon)
    assert await cgroup.close() == []
    assert set(world.places(ME).values()) == {"/containerd"}
    assert {path.split("/")[0] for path in world.directories()} == {
        os.path.basename(each.mount) for each in managed
    }
    assert undo.entries == []


async def test_a_systemd_that_does_not_do_it_is_done_without(
    host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = logged(monkeypatch)
    world = host(v1=V1, v2=None)

    def start_scope(*_: object, **__: object) -> None:
        raise OSError("systemd: access denied")

    monkeypatch.setattr(host_cgroup, "manages", lambda: True)
    monkeypatch.setattr(host_cgroup, "start_scope", start_scope)
    settings = CgroupSettings(path="a.slice/x-b.scope", scope="a.slice:x:b")
    cgroup = HostCgroup(settings, MemoryUndo())
    await cgroup.open()
    await cgroup.follow([])
    assert said == ["systemd does not make the pod's scope"]
    assert set(world.places(ME).values()) == {"/a.slice/x-b.scope"}
    assert await cgroup.close() == []
    assert world.directories() == set()


async def test_limits_follow_the_vm(host: MakeHost) -> None:
    """What the pod may have is the VM's size and some room; shares and processes from the start."""
    world = host(v1=V1, v2=None)
    limited = CgroupSettings(path="a/b", limited=Size(1.5, GIB), shares=512)
    cgroup = HostCgroup(limited, MemoryUndo())
    await cgroup.open()
    assert world.written["cpu,cpuacct/a/b/cpu.shares"] == "512"
    assert world.written["pids/a/b/pids.max"] == "4096"
    assert "memory/a/b/memory.limit_in_bytes" not in world.written  # not while it boots
    for size, emulated, memory, quota in (
        (Size(2.5, GIB), False, GIB + (512 << 20), 275_000),
        (Size(3.5, 2 * GIB), True, 3 * GIB + (512 << 20), 375_000),
    ):
        await cgroup.limit(size, emulated=emulated)
        assert world.written["memory/a/b/memory.limit_in_bytes"] == str(memory)
        assert world.written["cpu,cpuacct/a/b/cpu.cfs_quota_us"] == str(quota)
        assert world.written["cpu,cpuacct/a/b/cpu.cfs_period_us"] == "100000"
    await cgroup.close()


async def test_limits_of_version_2(host: MakeHost) -> None:
    world = host(v1=(), v2="cpu memory pids")
    cgroup = HostCgroup(CgroupSettings(path="a.slice/b.scope", limited=Size(1, GIB)), MemoryUndo())
    await cgroup.open()
    await cgroup.limit(Size(2, GIB))
    assert world.written["unified/cgroup.subtree_control"]
    assert (world.root / "unified/a.slice/cgroup.subtree_control").read_text().split() == [
        "cpu",
        "memory",
        "pids",
    ]
    assert world.written["unified/a.slice/b.scope/memory.max"] == str(GIB + (512 << 20))
    assert world.written["unified/a.slice/b.scope/cpu.max"] == "225000 100000"
    assert world.written["unified/a.slice/b.scope/pids.max"] == "4096"
    await cgroup.close()


async def test_who_names_no_limit_gets_none(host: MakeHost) -> None:
    world = host(v1=V1, v2=None)
    cgroup = HostCgroup(CgroupSettings(path="a/b"), MemoryUndo())
    await cgroup.open()
    await cgroup.limit(Size(2, GIB))
    assert not [path for path in world.written if "limit" in path or "quota" in path or "shares" in path]
    await cgroup.close()


async def test_another_ones_cgroup_is_joined_and_left_as_it_is(host: MakeHost) -> None:
    """It is not limited and not removed; of what is above it, only what we made goes."""
    world, undo = host(v1=V1, v2=None), MemoryUndo()
    for each in world.mounts:
        os.mkdir(f"{each.mount}/theirs")
    cgroup = HostCgroup(CgroupSettings(path="theirs", limited=Size(1, GIB), shares=9), undo)
    await cgroup.open()
    await cgroup.limit(Size(2, GIB))
    await cgroup.follow([])

    assert set(world.places(ME).values()) == {"/theirs"}
    assert not [path for path in world.written if "limit" in path or "quota" in path or "shares" in path]
    assert await cgroup.close() == []
    assert world.directories() == {f"{each.identity}/theirs" for each in world.mounts}


async def test_two_pods_share_what_is_above_them(host: MakeHost) -> None:
    """The first to go leaves the directory in which the other one is."""
    world = host(v1=("memory",), v2=None)
    first, second = (HostCgroup(CgroupSettings(path=f"default/{name}"), MemoryUndo()) for name in "ab")
    await first.open()
    await second.open()
    assert await first.close() == []
    assert world.directories() == {"memory/default", "memory/default/b"}
    assert await second.close() == []
    assert world.directories() == {"memory/default"}  # whose maker is gone; empty, and anybody's


def test_what_was_made_above_another_ones_cgroup_is_left_to_it(host: MakeHost) -> None:
    """Two that start at once: one makes the directory above, the other the one that both are in."""
    world = host(v1=("memory",), v2=None)
    above = f"{world.mounts[0].mount}/default"
    os.mkdir(above)
    os.mkdir(f"{above}/theirs")
    begin = time.monotonic()
    release({"paths": above})
    assert time.monotonic() - begin < 1
    assert world.directories() == {"memory/default", "memory/default/theirs"}


async def test_a_host_without_cgroups_is_told(host: MakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    said = logged(monkeypatch)
    host(v1=(), v2=None)
    cgroup = HostCgroup(CgroupSettings(path="a/b"), MemoryUndo())
    await cgroup.open()
    await cgroup.follow([])
    await cgroup.limit(Size(1, GIB))
    assert await cgroup.close() == []
    assert said == ["this host has no cgroups: the pod is charged to nobody"]


async def test_a_host_that_lets_nobody_make_one_is_told(
    host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read-only, as in many containers: the pod runs where its caller is."""
    said = logged(monkeypatch)
    world, undo = host(v1=V1, v2=None), MemoryUndo()
    world.refused = {f"{each.mount}/a" for each in world.mounts}
    cgroup = HostCgroup(CgroupSettings(path="a/b"), undo)
    await cgroup.open()
    await cgroup.follow([])

    assert children._cgroups == ()
    assert set(world.places(ME).values()) == {"/containerd"}
    assert said.count("no cgroup for the pod") == len(V1)
    assert said[-1] == "the pod has no cgroup on this host: it is charged to its caller's"
    assert await cgroup.close() == []
    assert undo.entries == []


async def test_a_hierarchy_that_takes_nobody_is_left_out(host: MakeHost) -> None:
    """A child that cannot join would not be started: that is tried before, by a thread."""
    world = host(v1=V1, v2=None)
    world.refused = {f"{world.root}/memory/a/b/tasks"}
    cgroup = HostCgroup(CgroupSettings(path="a/b"), MemoryUndo())
    await cgroup.open()
    assert sorted(path.split("/")[-4] for path in children._cgroups) == sorted(set(V1) - {"memory"})
    await cgroup.close()


async def test_a_controller_that_is_missing_is_told(host: MakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    said = logged(monkeypatch)
    host(v1=(), v2="memory")
    cgroup = HostCgroup(CgroupSettings(path="a/b", limited=Size(1, GIB)), MemoryUndo())
    await cgroup.open()
    await cgroup.limit(Size(2, GIB))
    assert said == ["the host does not limit the pod"] * 2  # pids.max, cpu.max
    await cgroup.close()


async def test_whoever_stays_in_it_is_moved_out_and_not_ended(
    host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_cgroup, "_GRACE", 0.2)
    world = host(v1=("memory",), v2=None)
    cgroup = HostCgroup(CgroupSettings(path="a/b"), MemoryUndo())
    await cgroup.open()
    stray = subprocess.Popen(["sleep", "100"])
    try:
        world.where[stray.pid, "memory"] = "/a/b"
        (world.root / "memory/a/b/cgroup.procs").write_text(f"{stray.pid}\n")
        release({"paths": f"{world.root}/memory/a/b\n{world.root}/memory/a"}, 0.2)
        assert world.where[stray.pid, "memory"] == "/"
        assert stray.poll() is None
        assert world.directories() == set()
    finally:
        stray.kill()
        stray.wait()
    await cgroup.close()


async def test_delete_removes_what_a_dead_shim_made(host: MakeHost) -> None:
    """By the record alone; the shim's own place is no obstacle once it is dead."""
    world, undo = host(**KINDS["hybrid"]), MemoryUndo()
    cgroup = HostCgroup(CgroupSettings(path="kubepods/x", overhead="kata_overhead/x"), undo)
    await cgroup.open()
    await cgroup.follow([])
    (entry,) = undo.entries
    world.end(ME)
    undo_kinds.release(Record(1, entry.kind, entry.facts))
    undo_kinds.release(Record(1, entry.kind, entry.facts))

    assert world.directories() == set()


def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []

    class Log:
        def warning(self, words: str, **_: object) -> None:
            said.append(words)

    monkeypatch.setattr(host_cgroup, "_log", Log())
    return said


# --- where


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("", "the/default"),
        ("/kubepods/burstable/pod1/abc", "kubepods/burstable/pod1/abc"),
        ("default/x", "default/x"),
        ("//a///b/", "a/b"),
        (
            "kubepods-burstable-pod1_2.slice:cri-containerd:abc",
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice/cri-containerd-abc.scope",
        ),
        ("system.slice:docker:abc", "system.slice/docker-abc.scope"),
        (":docker:abc", "system.slice/docker-abc.scope"),
        ("-.slice:x:abc", "x-abc.scope"),
        ("a.slice::abc", "a.slice/abc.scope"),
        ("a.slice:x:b.slice", "a.slice/b.slice"),
    ],
)
def test_the_path_in_both_forms(path: str, where: str) -> None:
    assert relative_path(path, "the/default") == where


@pytest.mark.parametrize(
    "path",
    [
        "/", "..", "/a/../b", "/a/./b", "a\0b", "/a/cgroup.procs", "/cgroup.kill", "/a\nb", "x" * 300,
        "/a" * 2000, "a-.slice:x:y", "-a.slice:x:y", "a--b.slice:x:y", "nothing:x:y", "a.slice:x:",
        "a/b.slice:x:y", "a.slice:x/..:y", ".slice:x:y", "\u202e/x",
    ],
)  # fmt: skip
def test_a_path_that_leads_elsewhere_is_refused(path: str) -> None:
    with pytest.raises(CallerError, match=r"linux\.cgroupsPath") as caught:
        relative_path(path, "x")
    assert caught.value.code == "INVALID_ARGUMENT"


def entry(target: str, fstype: str, own: str, root: str = "/") -> MountEntry:
    return MountEntry(1, 1, "0:1", root, target, "rw", fstype, "cgroup", own)


def test_which_hierarchies_there_are() -> None:
    """Each once, at the mount that shows it whole; what is mounted and not ours to join is no hierarchy."""
    known = ["name=systemd", "cpu,cpuacct", "memory", ""]
    mounts = [
        entry("/old/memory", "cgroup", "rw,memory"),
        entry("/s/systemd", "cgroup", "rw,xattr,name=systemd"),
        entry("/s/cpu", "cgroup", "rw,cpu,cpuacct"),
        entry("/s/memory", "cgroup", "rw,memory"),
        entry("/part/memory", "cgroup", "rw,memory", "/docker/x"),
        entry("/s/freezer", "cgroup", "rw,freezer"),
        entry("/s/unified", "cgroup2", "rw"),
        entry("/s", "tmpfs", "rw"),
    ]
    assert hierarchies(mounts, known) == [
        Hierarchy("/s/memory", "memory"),
        Hierarchy("/s/systemd", "name=systemd"),
        Hierarchy("/s/cpu", "cpu,cpuacct"),
        Hierarchy("/s/unified", ""),
    ]
    inside = hierarchies([entry("/s/memory", "cgroup", "rw,memory", "/docker/x")], ["memory"])
    assert inside == [Hierarchy("/s/memory", "memory", "/docker/x")]
    assert inside[0].named("pods/y") == "/docker/x/pods/y"


def test_this_hosts_are_read() -> None:
    own = memberships()
    assert set(own.values())
    for each in hierarchies():
        assert each.identity in own
        assert os.path.exists(f"{each.mount}/cgroup.procs")
    assert cgroup_paths.memberships(ME) == own


# --- what is wanted


@pytest.mark.parametrize(("only", "overhead"), [(True, ""), (False, "kata_overhead/sid")])
def test_what_configuration_and_spec_say(only: bool, overhead: str) -> None:
    spec = {"linux": {"cgroupsPath": "/pods/x", "resources": {"cpu": {"shares": 100}}}}
    keys = {"only": only, "limited": Size(1, 2), "keep_shim": True}
    assert cgroup_settings(spec, "sid", **keys) == CgroupSettings(  # type: ignore[arg-type]
        path="pods/x", overhead=overhead, limited=Size(1, 2), shares=100, keep_shim=True
    )
    bare = cgroup_settings({}, "sid", **keys)  # type: ignore[arg-type]
    assert (bare.path, bare.shares) == ("kata_sandboxed_pod/sid", 0)
    for odd in (1, 1 << 40, "x", None):
        spec = {"linux": {"resources": {"cpu": {"shares": odd}}}}
        assert cgroup_settings(spec, "sid", **keys).shares == 0  # type: ignore[arg-type]
