"""What each child may is what SECURITY.md says: its table is compared with /proc of a running pod."""

from __future__ import annotations

import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from devices.confine import CAPABILITIES
from devices.users import DIRECTORY, RANGE, parse_range
from shim.resources.cgroup_paths import memberships
from testing import leaks
from testing.containerd import KATA, Containerd
from testing.images import busybox_image
from tests.netlab import NetLab

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
BUSYBOX = "local/busybox:1"
SECRET = "SECRET_OF_CONTAINERD"


def table() -> dict[str, dict[str, str]]:
    """SECURITY.md's rows by the name of the child, each by the names of the columns."""
    text = (ROOT / "SECURITY.md").read_text().partition("## What each child")[2]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    head, *rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


@dataclass(frozen=True)
class Process:
    """One that runs, by /proc."""

    pid: int

    @property
    def base(self) -> Path:
        return Path("/proc", str(self.pid))

    @property
    def status(self) -> dict[str, str]:
        lines = (self.base / "status").read_text().splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}

    def namespace(self, kind: str) -> str:
        return os.readlink(self.base / "ns" / kind)

    @property
    def environment(self) -> dict[str, str]:
        words = (self.base / "environ").read_bytes().decode().split("\0")
        return dict(word.split("=", 1) for word in words if word)

    @property
    def limits(self) -> dict[str, int]:
        found = {}
        for line in (self.base / "limits").read_text().splitlines()[1:]:
            words = re.split(r" {2,}", line)
            found[words[0]] = -1 if words[2] == "unlimited" else int(words[2])
        return found

    @property
    def descriptors(self) -> list[str]:
        found = []
        for name in os.listdir(self.base / "fd"):
            try:
                found.append(os.readlink(self.base / "fd" / name))
            except FileNotFoundError:
                continue
        return found


def find(name: str) -> Process:
    """The one process of this program."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if (entry / "cmdline").read_text().split("\0")[0].endswith(name):
                    found.append(Process(int(entry.name)))
            except OSError:
                continue
    (only,) = found
    return only


@dataclass(frozen=True)
class Pod:
    """One with a volume, a network, and all of its processes."""

    containerd: Containerd
    id: str
    lab: NetLab
    volume: Path

    def exec(self, *command: str) -> str:
        words = ("task", "exec", "--exec-id", f"e{time.monotonic_ns()}", self.id, *command)
        return self.containerd.ctr(*words, timeout=120).text.strip()

    @property
    def shim(self) -> Process:
        return Process(int(Path(self.bundle, "shim.pid").read_text()))

    @property
    def bundle(self) -> Path:
        return next(self.containerd.state.glob(f"io.containerd.runtime.v2.task/*/{self.id}"))


PROGRAMS = {
    "QEMU": "qemu-system-x86_64",
    "virtiofsd": "virtiofsd",
    "vhost-device-vsock": "vhost-device-vsock",
}
CHILDREN = pytest.mark.parametrize("name", PROGRAMS)


def snapshot(containerd: Containerd) -> dict[str, set[str]]:
    return leaks.snapshot(root=str(containerd.root), ignore=[containerd.pid])


@pytest.fixture(scope="module")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    archive = tmp_path_factory.mktemp("images") / "busybox.tar"
    busybox_image(archive, BUSYBOX)
    keys: dict[str, dict[str, str | int | float | bool | list[str] | None]]
    keys = {"runtime": {"sandbox_cgroup_only": True}}
    with Containerd(debug=True, env={SECRET: "x"}, overrides=keys) as daemon:
        daemon.ctr("image", "import", str(archive))
        yield daemon


def start(containerd: Containerd, folder: Path, lab: NetLab) -> Pod:
    name = containerd.new_id("confined")
    folder.mkdir()
    (folder / "file").write_text("from the host\n")
    containerd.ctr(
        "run", "--detach", "--runtime", KATA, "--with-ns", f"network:{lab.pod}",
        "--cgroup", f"/kata-test/{name}", "--memory-limit", str(200 << 20),
        "--mount", f"type=bind,src={folder},dst=/volume,options=rbind:rw", BUSYBOX, name, "sleep", "1000",
        timeout=240,
    )  # fmt: skip
    return Pod(containerd, name, lab, folder)


def stop(pod: Pod) -> None:
    pod.containerd.ctr("task", "kill", "-s", "SIGKILL", pod.id, timeout=60)
    pod.containerd.ctr("task", "rm", "--force", pod.id, timeout=60, check=False)
    pod.containerd.ctr("container", "rm", pod.id, timeout=60)


@pytest.fixture(scope="module")
def pod(containerd: Containerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    before = snapshot(containerd)
    with NetLab() as lab:
        made = start(containerd, tmp_path_factory.mktemp("pod") / "volume", lab)
        yield made
        stop(made)
    assert leaks.settle(before, lambda: snapshot(containerd), timeout=60) == {}


@pytest.fixture(scope="module")
def facts(pod: Pod) -> dict[str, Process]:
    pod.exec("true")
    return {name: find(program) for name, program in PROGRAMS.items()}


@CHILDREN
def test_user_capabilities_and_filter(facts: dict[str, Process], name: str) -> None:
    """By /proc/PID/status of every thread. What a program takes from itself another thread may keep."""
    row, users = table()[name], parse_range(RANGE)
    kept, _, early = row["capabilities"].partition("; until it has taken them from itself: ")
    for task in (facts[name].base / "task").iterdir():
        lines = (task / "status").read_text().splitlines()
        status = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
        first = int(task.name) == facts[name].pid
        ids = {*status["Uid"].split(), *status["Gid"].split()}
        assert len(ids) == 1
        assert (int(ids.pop()) in users) == (row["user"] == "the sandbox's")
        assert status["Groups"] == ""
        wanted = bits(kept)
        if first:
            assert (int(status["CapPrm"], 16), int(status["CapEff"], 16)) == (wanted, wanted)
        for kind in ("CapPrm", "CapEff", "CapBnd"):
            assert int(status[kind], 16) & ~(wanted | bits(early)) == 0, kind
        assert (int(status["CapInh"], 16), int(status["CapAmb"], 16)) == (0, 0)
        assert status["NoNewPrivs"] == {"yes": "1"}[row["NoNewPrivs"]]
        assert row["seccomp"] != "none"
        assert status["Seccomp"] == "2" or not (first or name != "virtiofsd")


def bits(names: str) -> int:
    words = [] if names in ("", "none") else names.split(", ")
    return sum(1 << CAPABILITIES.index(word) for word in words)


@CHILDREN
def test_namespaces(pod: Pod, facts: dict[str, Process], name: str) -> None:
    row, child, shim = table()[name], facts[name], pod.shim
    own = set(row["own namespaces"].split(", "))
    for kind in ("mnt", "ipc", "pid", "net"):
        assert (child.namespace(kind) != shim.namespace(kind)) == (kind in own), kind
        others = [other.namespace(kind) for other in facts.values() if other != child]
        assert child.namespace(kind) not in others, kind
    in_the_pods = child.namespace("net") == os.readlink(pod.lab.pod)
    assert in_the_pods == (row["network"] == "the pod's")
    if row["network"] == "none":
        lines = (child.base / "net/dev").read_text().splitlines()[2:]
        assert [line.split(":")[0].strip() for line in lines] == ["lo"]


@CHILDREN
def test_what_is_in_sight(pod: Pod, facts: dict[str, Process], name: str) -> None:
    """The root is the child's own, read-only; nothing of the host is there but what the table names."""
    child = facts[name]
    mounts = (child.base / "mountinfo").read_text().splitlines()
    points = {line.split()[4]: line.split()[5].split(",") for line in mounts}
    system = {"/", "/proc", "/usr", "/etc/ld.so.cache", "/etc/alternatives"}
    own = {
        "QEMU": r"/sys/devices/system|/run/kata-shim/[^/]+/m|.*/(vmlinux|initrd\.img)",
        "virtiofsd": r"/passthrough/.*",  # it has made the shared directory, in its view, its root
        "vhost-device-vsock": rf"/run/kata-shim/[^/]+/v|{re.escape(str(ROOT))}/build/vsock/usr",
    }[name]
    for point, options in points.items():
        shown = point in system or point in ("/bin", "/sbin", "/lib", "/lib64")
        assert shown or re.fullmatch(own, point), point
        writable = re.fullmatch(r".*/v|.*/passthrough/.*", point)
        assert "ro" in options or writable, point
    root = child.base / "root"
    for path in ("etc/passwd", "etc/shadow", "var", "home", f"{ROOT}/LICENSE", str(pod.containerd.root)):
        assert not (root / path.lstrip("/")).exists(), path
    if name == "virtiofsd":
        assert os.listdir(root) == ["passthrough"]
        return
    processes = [entry for entry in os.listdir(root / "proc") if entry.isdecimal()]
    assert processes == ["1"]
    nodes = {path.name for path in (root / "dev").iterdir() if stat.S_ISCHR(path.lstat().st_mode)}
    assert nodes - {"kvm"} == {"null", "zero", "random", "urandom"}


@CHILDREN
def test_environment(pod: Pod, facts: dict[str, Process], name: str) -> None:
    """Nothing of containerd's, which the shim has."""
    assert SECRET in pod.shim.environment
    assert set(facts[name].environment) == set(table()[name]["environment"].split(", "))


KINDS: dict[str, Callable[[str], bool]] = {
    "null": lambda link: link == "/dev/null",
    "pipe": lambda link: link.startswith("pipe:"),
    "socket": lambda link: link.startswith("socket:"),
    "event": lambda link: (
        re.fullmatch(r"anon_inode:\[(eventfd|eventpoll|signalfd|timerfd|io_uring)\]", link) is not None
    ),
    "random": lambda link: link == "/dev/urandom",
    "kvm": lambda link: link == "/dev/kvm" or "kvm-" in link,
    "memory": lambda link: link.startswith("/memfd:"),
    "disk": lambda link: link.endswith("/rootfs.img"),
    "tap": lambda link: link == "/dev/net/tun",
    "vhost": lambda link: link in ("/dev/vhost-net", "/dev/vhost-vsock"),
    "proc": lambda link: (
        re.fullmatch(r"/proc(/1)?(/fd|/task|/\d+/fd|/\d+/task)?|/1/(fd|task)|/", link) is not None
    ),
    "share": lambda link: link.startswith("/run/kata-containers/shared/sandboxes/") or link == "/",
}


@CHILDREN
def test_descriptors(facts: dict[str, Process], name: str) -> None:
    """Each is of a kind that the table names; none is a file or a directory of the shim's besides."""
    allowed = table()[name]["descriptors"].split(", ")
    links = facts[name].descriptors
    odd = [link for link in links if not any(KINDS[kind](link) for kind in allowed)]
    assert odd == []
    assert len(links) > 5


@CHILDREN
def test_limits(facts: dict[str, Process], name: str) -> None:
    """A limit that the shim must not raise is the shim's own."""
    names = {
        "core": "Max core file size",
        "nofile": "Max open files",
        "fsize": "Max file size",
        "nproc": "Max processes",
    }
    for word in table()[name]["limits"].split(", "):
        kind, wanted = word.split()
        found = facts[name].limits[names[kind]]
        assert found == int(wanted) or 0 < found < int(wanted), kind


@CHILDREN
def test_cgroup(pod: Pod, facts: dict[str, Process], name: str) -> None:
    """In each hierarchy of the host; the shim too."""
    assert table()[name]["cgroup"] == "the pod's"
    deadline = time.monotonic() + 60
    while True:  # version 2 beside version 1 follows once the VM runs
        places = {*memberships(facts[name].pid).values(), *memberships(pod.shim.pid).values()}
        if places == {f"/kata-test/{pod.id}"} or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert places == {f"/kata-test/{pod.id}"}


def test_the_pods_memory_is_charged_and_bounded(pod: Pod) -> None:
    """The host's own account has the guest's memory, and a limit of the VM's size and some room."""
    group = Path("/sys/fs/cgroup/memory/kata-test", pod.id)
    if not group.exists():
        group = Path("/sys/fs/cgroup/kata-test", pod.id)
    files = ("memory.usage_in_bytes", "memory.limit_in_bytes")
    if not (group / files[0]).exists():
        files = ("memory.current", "memory.max")
    usage, limit = (int((group / file).read_text()) for file in files)

    assert usage > 50 << 20
    assert 456 << 20 < limit < 4 << 30


def test_its_files_and_its_network_work(pod: Pod) -> None:
    """Volume both ways, as root of the guest; a connection through the pod's link."""
    assert pod.exec("cat", "/volume/file") == "from the host"
    pod.exec("sh", "-c", "echo from the guest > /volume/new; chown 5:6 /volume/new")
    assert (pod.volume / "new").read_text() == "from the guest\n"
    assert ((pod.volume / "new").stat().st_uid, (pod.volume / "new").stat().st_gid) == (5, 6)
    assert "1 packets received" in pod.exec("ping", "-c", "1", "-W", "20", "10.199.0.1")


def test_two_sandboxes_have_two_users_and_both_are_free_again(
    containerd: Containerd, pod: Pod, facts: dict[str, Process], tmp_path: Path
) -> None:
    """The second shim is killed by SIGKILL; its user is free once `delete` has run."""
    first = int(facts["QEMU"].status["Uid"].split()[0])
    taken = {int(name) for name in os.listdir(DIRECTORY) if name.isdecimal()}
    assert first in taken
    with NetLab() as lab:
        other = start(containerd, tmp_path / "volume", lab)
        (second,) = {int(name) for name in os.listdir(DIRECTORY) if name.isdecimal()} - taken
        assert second != first
        os.kill(other.shim.pid, 9)
        deadline = time.monotonic() + 60
        while str(second) in os.listdir(DIRECTORY):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        containerd.ctr("task", "rm", "--force", other.id, timeout=60, check=False)
        containerd.ctr("container", "rm", other.id, timeout=60)
    assert str(first) in os.listdir(DIRECTORY)
    assert facts["QEMU"].base.exists()


def test_no_socket_of_ours_is_everybodys(pod: Pod) -> None:
    """None has a name in the abstract space, which no permissions guard."""
    names = [
        line.split()[7]
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]
        if len(line.split()) > 7
    ]
    assert [name for name in names if name.startswith("@") and ("kata" in name or pod.id in name)] == []
    assert socket.AF_UNIX
