"""Firecracker under KVM, by containerd, jailed and not: a container's whole life, and nothing left."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from devices.users import RANGE, parse_range
from shim.resources.cgroup_paths import memberships
from testing import leaks
from testing.containerd import KATA, Containerd
from testing.guest import Value
from tests.benchhost.conftest import BUSYBOX, PATIENCE
from tests.benchhost.firecrackers import section
from tests.security.test_confinement import bits, table

JAILED = pytest.param("jailed", marks=pytest.mark.benchhost(ci=True))
PLAIN = pytest.param("plain", marks=pytest.mark.benchhost)


@pytest.fixture(scope="module", params=[JAILED, PLAIN])
def overrides(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Value | None]]:
    keys = section(tmp_path_factory.mktemp("firecracker"), jailed=request.param == "jailed")
    if request.param == "jailed":  # as a user of the sandbox's own
        del keys["jailer_uid"], keys["jailer_gid"]
    return {"hypervisor.firecracker": keys, "runtime": {"hypervisor_name": "firecracker"}}


def _the_firecracker() -> Path:
    """/proc/PID of the one that runs in here."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "comm").read_text() == "firecracker\n":
                found.append(process)
        except OSError:
            continue
    (only,) = found
    return only


def _compare(process: Path, name: str) -> None:
    """Its row of SECURITY.md with what /proc says."""
    row = table()[name]
    status = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines())
    user = int(status["Uid"].split()[0])
    assert (user in parse_range(RANGE)) == row["user"].startswith("the sandbox's")
    assert user in parse_range(RANGE) or user == 0
    assert status["Gid"].split()[0] == str(user)
    assert status["Groups"].strip() == ""
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == bits(row["capabilities"])
    assert int(status["CapBnd"], 16) & ~bits(table()["jailer"]["capabilities"]) == 0
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    own = row["own namespaces"].split(", ")
    for kind in ("mnt", "ipc", "pid", "net"):
        if kind != "net":  # this container has no network of its own
            ours = os.readlink(f"/proc/{_shim()}/ns/{kind}")
            assert (os.readlink(process / "ns" / kind) != ours) == (kind in own), kind
    words = (process / "environ").read_bytes().decode().split("\0")
    assert {word.partition("=")[0] for word in words if word} <= set(row["environment"].split(", "))


def _shim() -> int:
    """The pid of the one shim in here."""
    (pid,) = [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if b"containerd-shim-kata" in (process / "cmdline").read_bytes()
    ]
    return pid


def test_a_container_lives_under_firecracker(
    containerd: Containerd, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    jailed = "jailed" in request.node.name

    def snapshot() -> dict[str, set[str]]:
        return leaks.snapshot(root=str(containerd.root), ignore=[containerd.pid])

    before = snapshot()
    volume = tmp_path / "volume"
    (volume / "below").mkdir(parents=True)
    (volume / "below" / "file").write_text("from the host\n")
    (volume / "link").symlink_to("below/file")
    name = containerd.new_id("fc")
    script = "trap 'exit 42' TERM; touch /trapped; while :; do sleep 0.1; done"
    mount = f"type=bind,src={volume},dst=/volume,options=rbind:ro"
    containerd.ctr(
        "run", "--detach", "--runtime", KATA, "--mount", mount, BUSYBOX, name, "sh", "-c", script,
        timeout=PATIENCE,
    )  # fmt: skip
    process = _the_firecracker()
    _compare(process, "Firecracker in its jail" if jailed else "Firecracker without")
    deadline = time.monotonic() + 60
    while memberships(process.name)[""] != f"/default/{name}":  # whom ctr's containers are charged to
        assert time.monotonic() < deadline
        time.sleep(0.1)

    def exec_(exec_id: str, *command: str, stdin: bytes | None = None) -> bytes:
        return containerd.ctr(
            "task", "exec", "--exec-id", exec_id, name, *command, stdin=stdin, timeout=60
        ).out

    waiting = "until test -e /trapped; do sleep 0.1; done; cat /volume/link; touch /volume/x 2>&1; echo $?"
    assert exec_("e1", "sh", "-c", waiting).splitlines() == [
        b"from the host",
        b"touch: /volume/x: Read-only file system",
        b"1",
    ]
    # The root file system: an image below, a scratch disk of its own above.
    mounted = exec_(
        "e2", "sh", "-c", "head -1 /proc/mounts; head -c 5000000 /dev/zero >/big; ls -l /big"
    ).split()
    assert mounted[0] == b"overlay"
    assert b"5000000" in mounted
    text = bytes(range(256)) * 8000
    digest = exec_("e3", "sha256sum", stdin=text).split()[0].decode()
    assert digest == hashlib.sha256(text).hexdigest()

    containerd.ctr("task", "kill", "-s", "SIGTERM", name)
    deadline = time.monotonic() + 60
    while "STOPPED" not in containerd.ctr("task", "ls").text and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "exit code 42" in containerd.ctr("task", "rm", name).error  # `ctr` warns of it
    containerd.ctr("container", "rm", name)
    assert leaks.settle(before, snapshot, timeout=30) == {}
    assert list(Path("/var/lib/kata-containers/sandboxes").iterdir()) == []


@pytest.mark.parametrize("overrides", [PLAIN], indirect=True)
def test_the_exit_code_comes_back(containerd: Containerd) -> None:
    done = containerd.run(BUSYBOX, "sh", "-c", "uname -r; exit 9", timeout=PATIENCE, check=False)
    assert done.code == 9
    assert done.text
