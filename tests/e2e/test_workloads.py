"""What people's pods meet works in a VM as under runc: volumes of all kinds, names, limits; and errors say
what is wrong. One pod, through containerd's CRI.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from testing.cri import Cri, Pod

from .conftest import CRI_BUSYBOX as BUSYBOX
from .probe import build_probe

pytestmark = pytest.mark.kata_only

MIB = 1 << 20
SLEEP = ("sleep", "100000")


class Kubelet:
    """The directories of a pod's volumes, as kubelet makes them."""

    def __init__(self, path: Path) -> None:
        self.pod = path / "pods/7e1c/volumes"
        self._states = 0

    def mount(self, kind: str, name: str, fstype: str, options: str = "mode=777") -> Path:
        """An emptyDir with a file system of its own."""
        made = self.pod / f"kubernetes.io~{kind}" / name
        made.mkdir(parents=True)
        subprocess.run(["mount", "-t", fstype, "-o", options, name, str(made)], check=True)
        return made

    def config_map(self, text: str) -> Path:
        """One with the key `key`; a second time it is rewritten as kubelet does it."""
        made = self.pod / "kubernetes.io~configmap/conf"
        self._states += 1
        new, old = made / f"..{self._states}", made / f"..{self._states - 1}"
        new.mkdir(parents=True)
        (new / "key").write_text(f"{text}\n")
        (made / "..data_tmp").symlink_to(new.name)
        os.rename(made / "..data_tmp", made / "..data")
        if old.exists():
            (old / "key").unlink()
            old.rmdir()
        else:
            (made / "key").symlink_to("..data/key")
        return made

    def close(self) -> None:
        """Unmount all."""
        for path in sorted(self.pod.glob("kubernetes.io~*/*")):
            if path.is_mount():
                subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture(scope="module")
def kubelet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kubelet]:
    made = Kubelet(tmp_path_factory.mktemp("kubelet"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the probe."""
    return build_probe(tmp_path_factory.mktemp("tools"))


@pytest.fixture(scope="module")
def places(
    kubelet: Kubelet, tools: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Path]]:
    """A volume of each kind by its place in the container. As with kubelet, all is mounted before the pod is
    made: where `/` is not shared (a machine without systemd) no later mount reaches it."""
    nest = tmp_path_factory.mktemp("nest")
    (nest / "sub").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "sub", str(nest / "sub")], check=True)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(nest / "socket"))
            yield {
                "/dev/shm": kubelet.mount("empty-dir", "shm", "tmpfs", "size=200m,mode=1777"),
                "/cache": kubelet.mount("empty-dir", "cache", "tmpfs", "size=200m"),
                "/conf": kubelet.config_map("one"),
                "/tools": tools,
                "/nest": nest,
                "/socket": nest / "socket",
            }
    finally:
        subprocess.run(["umount", "-l", str(nest / "sub")], check=True)


@pytest.fixture(scope="module")
def pod(cri: Cri, places: dict[str, Path]) -> Iterator[Pod]:
    """On the host's network, whose spec names no host."""
    made = cri.run_pod()
    yield made
    made.remove()


@pytest.fixture(scope="module")
def box(pod: Pod, places: dict[str, Path]) -> str:
    """A container with one volume of each kind; its id."""
    mounts = [
        {"container_path": place, "host_path": str(path), "readonly": place in ("/conf", "/nest")}
        for place, path in places.items()
    ]
    return pod.run(*SLEEP, image=BUSYBOX, mounts=mounts, resources={"memory_limit_in_bytes": 512 * MIB})


def log_of(pod: Pod, needle: str) -> str:
    """The line of the shim's log with `needle`."""
    lines = pod.cri.containerd.log.read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if needle in line), "")


@pytest.mark.parametrize(("place", "name"), [("/dev/shm", "shm"), ("/cache", "cache")])
def test_a_memory_volume_is_the_volume(pod: Pod, box: str, kubelet: Kubelet, place: str, name: str) -> None:
    """Also at /dev/shm, which without a volume is the pod's own: as large as it is, and on the host."""
    shown = pod.sh(box, f"echo from the guest > {place}/x; df -k {place} | tail -1")
    volume = kubelet.pod / "kubernetes.io~empty-dir" / name

    assert "204800" in shown
    assert (volume / "x").read_text() == "from the guest\n"
    other = pod.run(*SLEEP, image=BUSYBOX)
    assert pod.sh(other, "df -k /dev/shm | tail -1; ls /dev/shm").split()[1] == "65536"


def test_the_host_name_is_the_hosts_where_nobody_names_another(pod: Pod, box: str) -> None:
    assert pod.sh(box, "hostname; cat /etc/hostname") == "\n".join([socket.gethostname()] * 2)


def test_read_only_is_not_recursive(pod: Pod, box: str) -> None:
    """What is mounted below a read-only volume stays as it is; only "rro" is for all of it."""
    script = "touch /nest/x; echo $?; touch /nest/sub/x; echo $?"
    done = pod.exec(box, "sh", "-c", script)

    assert done.stdout.decode().split() == ["1", "0"]
    assert b"Read-only file system" in done.stderr


def test_a_config_maps_change_is_an_event(pod: Pod, box: str, kubelet: Kubelet, tools: Path) -> None:
    """A program that watches it by inotify is told when kubelet rewrites it, and finds the new state."""
    mounts = [
        {
            "container_path": "/conf",
            "host_path": str(kubelet.pod / "kubernetes.io~configmap/conf"),
            "readonly": True,
        },
        {"container_path": "/tools", "host_path": str(tools)},
    ]
    watcher = pod.run("/tools/probe", "watch", "/conf", image=BUSYBOX, mounts=mounts)
    pod.wait_output(watcher, "watching")
    assert pod.sh(box, "cat /conf/key; ls -A /conf").split() == ["one", "..1", "..data", "key"]
    begin = time.monotonic()
    kubelet.config_map("two")
    pod.wait_output(watcher, "gone ..1")
    seconds = time.monotonic() - begin

    assert pod.output(watcher).split("\n")[1:5] == ["made ..2", "made ..data_tmp", "moved ..data", "gone ..1"]
    assert pod.sh(box, "cat /conf/key; ls -A /conf").split() == ["two", "..2", "..data", "key"]
    assert "Read-only" in pod.exec(box, "sh", "-c", "echo x > /conf/key").stderr.decode()
    print(f"told after {seconds:.2f} s")


def test_limits_are_a_hosts_and_follow_the_memory(pod: Pod, box: str) -> None:
    """The container's limit made the VM larger while it ran, and what the kernel takes from its memory."""
    shown = pod.sh(
        box,
        "ulimit -Hn; ulimit -n; ulimit -u; cd /proc/sys;"
        " cat kernel/threads-max fs/inotify/max_user_watches user/max_user_namespaces;"
        " /tools/probe threads 3000; grep MemTotal /proc/meminfo",
    ).split()
    files, soft, processes, most, watches, namespaces, threads = shown[:7]

    assert (int(files), int(soft), processes) == (1 << 20, 1 << 20, "unlimited")
    total = int(shown[8]) << 10
    assert total > 600 * MIB
    assert int(most) >= total // (128 << 10) * 9 // 10, (
        "the kernel's own rule: an eighth of memory for stacks"
    )
    assert int(watches) > 20000
    assert int(namespaces) > 2000
    assert threads == "3000"


def test_what_cannot_work_is_in_the_log(pod: Pod, box: str, tmp_path: Path) -> None:
    """A socket of the host as a volume, and a directory that only a supplemental group opens: with QEMU's own
    virtiofsd it stays closed."""
    assert pod.exec(box, "sh", "-c", "test -S /socket").exit_code == 0
    assert "/socket" in log_of(pod, "a socket or FIFO of the host as a volume")

    group = tmp_path / "group"
    group.mkdir()
    os.chown(group, 0, 2000)
    group.chmod(0o2775)
    user = {"run_as_user": {"value": 1000}, "run_as_group": {"value": 3000}, "supplemental_groups": [2000]}
    member = pod.run(
        *SLEEP,
        image=BUSYBOX,
        mounts=[{"container_path": "/group", "host_path": str(group)}],
        linux={"security_context": {**user, "namespace_options": pod.namespaces}},
    )
    done = pod.exec(member, "sh", "-c", "id -G; touch /group/x")
    assert done.stdout.split() == [b"3000", b"2000"]
    assert "'/group'" in log_of(pod, "volumes are shared with the VM")
    told = log_of(pod, "no files can be made by a supplemental group")
    if done.exit_code:
        assert f"/group ({group}, of group 2000)" in told
    else:
        assert told == ""


def test_errors_name_what_the_user_wrote(pod: Pod, tools: Path) -> None:
    """The mount by its place and the host's path, with a code and what to try."""
    mounts = [{"container_path": "/etc/passwd", "host_path": str(tools)}]
    container = pod.create("true", image=BUSYBOX, mounts=mounts)
    with pytest.raises(grpc.RpcError) as caught:
        pod.start(container)

    text = caught.value.details()
    assert f"the mount at /etc/passwd (of {tools}) cannot be made: Not a directory" in text
    assert "; try: one of the two is a file and the other a directory" in text
    # 2.x has the code as such only.
    assert text.endswith(": invalid argument") or caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
