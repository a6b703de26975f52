"""The pod's cgroup on a real host: who is in which by Kata's rule, also where systemd makes them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.resources.cgroup_paths import hierarchies, memberships
from testing import leaks
from testing.containerd import KATA, Containerd
from testing.images import busybox_image

ROOT = Path(__file__).parents[2]
BUSYBOX = "local/busybox:1"
COUNTED = ("cpu", "cpuacct", "cpuset")


@pytest.fixture(scope="module")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    """One whose shims have Kata's default, and QEMU as root."""
    archive = tmp_path_factory.mktemp("images") / "busybox.tar"
    busybox_image(archive, BUSYBOX)
    keys = {"runtime": {"sandbox_cgroup_only": False}, "hypervisor.qemu": {"rootless": False}}
    with Containerd(debug=True, overrides=keys) as daemon:
        daemon.ctr("image", "import", str(archive))
        yield daemon


def processes(word: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_text().split("\0")
            except OSError:
                continue
            if any(word in each for each in words[1:]) and "kata-confine" not in words[0]:
                found.append(int(entry.name))
    return found


@pytest.mark.kata_only
def test_the_vms_cpu_is_the_pods_and_the_rest_is_overhead(containerd: Containerd) -> None:
    """sandbox_cgroup_only = false. QEMU, which is root here, has no capability either."""

    def snapshot() -> dict[str, set[str]]:
        return leaks.snapshot(root=str(containerd.root), ignore=[containerd.pid])

    before = snapshot()
    name = containerd.new_id("cgroup")
    containerd.ctr(
        "run", "--detach", "--runtime", KATA, "--cgroup", f"/kata-test/{name}", "--cpu-quota", "150000",
        "--cpu-period", "100000", BUSYBOX, name, "sleep", "1000", timeout=240,
    )  # fmt: skip
    qemu = next(
        pid for pid in processes(f"sandbox-{name},") if "qemu" in Path(f"/proc/{pid}/comm").read_text()
    )
    state = Path(f"/proc/{qemu}/status").read_text()
    assert "Uid:\t0\t0\t0\t0" in state
    assert "CapPrm:\t0000000000000000" in state
    assert "NoNewPrivs:\t1" in state
    unified = [each for each in hierarchies() if each.unified]
    others = [each.identity for each in hierarchies() if not each.unified]
    pod, rest = f"/kata-test/{name}", f"/kata_overhead/{name}"
    threads = {
        Path(f"/proc/{qemu}/task/{task}/comm").read_text().strip(): memberships(f"{qemu}/task/{task}")
        for task in os.listdir(f"/proc/{qemu}/task")
    }

    def settled() -> bool:
        return all(memberships(qemu)[each.identity] == pod for each in unified)

    wait_until(settled)
    vcpu = next(places for thread, places in threads.items() if thread.startswith("CPU "))
    for identity in others:
        counted = bool(set(identity.split(",")) & set(COUNTED))
        assert memberships(qemu)[identity] == rest
        wait_until(
            lambda identity=identity, counted=counted: vcpus(qemu)[identity] == (pod if counted else rest)
        )
    assert set(vcpu) == set(memberships(qemu))
    shim = int(next(containerd.state.glob(f"*/*/{name}/shim.pid")).read_text())
    wait_until(lambda: set(memberships(shim).values()) == {rest})

    containerd.ctr("task", "kill", "-s", "SIGKILL", name, timeout=60)
    containerd.ctr("task", "rm", "--force", name, timeout=60, check=False)
    containerd.ctr("container", "rm", name, timeout=60)
    assert leaks.settle(before, snapshot, timeout=60) == {}


def vcpus(qemu: int) -> dict[str, str]:
    """Where the first vCPU is."""
    for task in os.listdir(f"/proc/{qemu}/task"):
        if Path(f"/proc/{qemu}/task/{task}/comm").read_text().startswith("CPU 0"):
            return memberships(f"{qemu}/task/{task}")
    raise AssertionError("QEMU has no vCPU")


def wait_until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- under a systemd of the test's own, on a root of its own, in cgroups of its own

HOST = r"""
set -e
for mount in MOUNTS; do
    mkdir -p "$mount/kata-systemd-$$"
    for file in cpuset.cpus cpuset.mems; do
        [ ! -e "$mount/$file" ] || cat "$mount/$file" > "$mount/kata-systemd-$$/$file"
    done
    echo $$ > "$mount/kata-systemd-$$/cgroup.procs"
done
exec unshare --cgroup --mount --propagation private bash -ec '
root=DIRECTORY/root
mount -t tmpfs tmpfs DIRECTORY
mkdir DIRECTORY/{up,work,root}
mount -t overlay overlay -o lowerdir=/,upperdir=DIRECTORY/up,workdir=DIRECTORY/work $root
mount -t tmpfs tmpfs $root/run
mkdir -p $root/run/units
for unit in minimal basic sysinit shutdown umount final; do
    printf "[Unit]\nDefaultDependencies=no\n" > $root/run/units/$unit.target
done
mount --rbind /dev $root/dev
mount -t sysfs sysfs $root/sys
CGROUPS
exec unshare --pid --fork --kill-child bash -ec "
    mount -t proc proc $root/proc
    exec chroot $root env -i container=other SYSTEMD_UNIT_PATH=/run/units PATH=/usr/bin:/bin \
        /lib/systemd/systemd --system --unit=minimal.target --log-target=null
"
'
"""

PROBE = r"""
import asyncio, json, os, sys
from devices.child import Child
from devices.confine import Confinement
from devices.undo import MemoryUndo
from shim.resources.cgroup_paths import hierarchies, memberships
from shim.resources.host_cgroup import HostCgroup, cgroup_settings
from shim.spec.limits import Size
async def main():
    undo, said = MemoryUndo(), {}
    spec = {"linux": {"cgroupsPath": "kubepods-pod1.slice:cri-containerd:abc"}}
    for only in (True, False):
        limited = Size(1, 1 << 30)
        cgroup = HostCgroup(cgroup_settings(spec, "abc", only=only, limited=limited, keep_shim=False), undo)
        await cgroup.open()
        one, sleep = Confinement(user=2000000777), ["/bin/sleep", "100"]
        children = [await Child.spawn(sleep, name="x", undo=undo, confinement=one) for _ in range(2)]
        await cgroup.follow([child.pid for child in children])
        await cgroup.limit(Size(2, 1 << 30))
        where = memberships(children[0].pid)
        places = [each.mount + where[each.identity] for each in hierarchies()]
        files = [place + name for place in places for name in ("/memory.limit_in_bytes", "/memory.max")]
        said[str(only)] = {
            "shim": sorted(set(memberships().values())),
            "children": [memberships(child.pid) for child in children],
            "limit": next(open(file).read().strip() for file in files if os.path.exists(file)),
        }
        for child in children:
            await child.kill()
        assert await cgroup.close() == []
        said[str(only)]["after"] = sorted(set(memberships().values()))
    assert undo.entries == []
    deadline = asyncio.get_running_loop().time() + 20
    while True:
        paths = [path for each in hierarchies() for path, _, _ in os.walk(each.mount)]
        left = [path for path in paths if path.endswith("abc.scope")]
        if not left or asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(0.1)
    print(json.dumps({**said, "left": left}))
asyncio.run(main())
"""


def _systemd() -> str:
    """Why there is no systemd that this host's cgroups suit; "" if there is one."""
    program = "/lib/systemd/systemd"
    if not Path(program).exists():
        return f"needs systemd ({program})"
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.match(r"systemd (\d+)", said)
    if version and int(version[1]) >= 258 and not all(each.unified for each in hierarchies()):
        return f"needs cgroup v2 alone: systemd {version[1]} knows no v1 any more"
    return ""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_under_a_real_systemd(tmp_path: Path) -> None:
    """The scopes are systemd's, in the slice that the path names; what it does not manage has the same path;
    all are gone afterwards."""
    if why := _systemd():
        pytest.skip(why)
    mounts = hierarchies()
    lines = ["mount -t tmpfs tmpfs $root/sys/fs/cgroup"] if any(not each.unified for each in mounts) else []
    for each in mounts:
        if each.unified and len(mounts) == 1:
            lines.append("mount -t cgroup2 cgroup2 $root/sys/fs/cgroup")
            continue
        at = f"$root/sys/fs/cgroup/{'unified' if each.unified else os.path.basename(each.mount)}"
        kind = "cgroup2 cgroup2" if each.unified else f"cgroup -o {_options(each.identity)} cgroup"
        lines += [f"mkdir {at}", f"mount -t {kind} {at}"]
    script = HOST.replace("MOUNTS", " ".join(each.mount for each in mounts)).replace(
        "DIRECTORY", str(tmp_path)
    )
    systemd = subprocess.Popen(
        ["bash", "-c", script.replace("CGROUPS", "\n".join(lines))],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        ready = Path(f"/proc/{systemd.pid}/root") / str(tmp_path / "root/run/systemd/private").lstrip("/")
        wait_until(lambda: ready.exists() or systemd.poll() is not None)
        assert systemd.poll() is None, systemd.stderr and systemd.stderr.read()
        (first,) = Path(f"/proc/{systemd.pid}/task/{systemd.pid}/children").read_text().split()
        inside = ["nsenter", "--target", first, "--pid", "--mount", "--cgroup", "--root", "--wd=/"]
        done = subprocess.run(
            [*inside, "env", f"PYTHONPATH={ROOT}", sys.executable, "-c", textwrap.dedent(PROBE)],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    finally:
        systemd.kill()
        systemd.wait()
        if systemd.stderr is not None:
            systemd.stderr.close()
        wait_until(lambda: all(_removed(f"{each.mount}/kata-systemd-{systemd.pid}") for each in mounts))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])

    pods = "/kubepods.slice/kubepods-pod1.slice/cri-containerd-abc.scope"
    rest = "/kata.slice/kata-overhead.slice/kata-abc.scope"
    assert said["True"]["shim"] == [pods]
    assert [set(places.values()) for places in said["True"]["children"]] == [{pods}, {pods}]
    assert said["False"]["shim"] == [rest]
    assert set(said["False"]["children"][0].values()) <= {pods, rest}
    assert pods in said["False"]["children"][0].values()
    assert set(said["False"]["children"][1].values()) == {rest}
    assert said["True"]["limit"] == str((1 << 30) + (512 << 20))
    assert pods not in said["True"]["after"]
    assert said["left"] == []


def _options(identity: str) -> str:
    return f"none,{identity}" if identity.startswith("name=") else identity


def _removed(path: str) -> bool:
    """Remove a cgroup and what is below, as far as it is empty already."""
    for directory, _, _ in os.walk(path, topdown=False):
        try:
            os.rmdir(directory)
        except OSError:
            return False
    return True
