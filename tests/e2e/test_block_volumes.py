"""Disks as a container's files: a directly assigned volume, and a root file system without a shared one."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devices.errors import CallerError
from devices.in_use import probe
from shim.state.journalfile import load
from testing.containerd import KATA, Containerd
from testing.guest import PROJECT, Value, write_configuration
from testing.images import busybox_image

pytestmark = pytest.mark.kata_only

ASSIGNED = Path("/run/kata-containers/shared/direct-volumes")
IMAGE = "local/busybox:1"
E2FS = {**os.environ, "PATH": os.environ["PATH"] + ":/sbin:/usr/sbin"}


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A volume's path and the image of its disk, assigned as Kata's storage driver does it."""
    path, image = tmp_path / "volume", tmp_path / "disk.img"
    path.mkdir()
    subprocess.run(["mke2fs", "-q", "-t", "ext4", image, "8M"], check=True, env=E2FS, capture_output=True)
    folder = _assignment(path)
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True)
    info = {"volume-type": "block", "device": str(image), "fstype": "ext4", "metadata": {"fsGroup": "1234"}}
    (folder / "mountInfo.json").write_text(json.dumps(info))
    yield path, image
    (folder / "mountInfo.json").unlink()
    for parent in made:
        with contextlib.suppress(OSError):  # somebody else's volumes are there too
            parent.rmdir()


def test_a_directly_assigned_volume_is_mounted_by_the_guest(
    containerd: Containerd, volume: tuple[Path, Path]
) -> None:
    path, image = volume
    mount = ("--mount", f"type=bind,src={path},dst=/vol,options=rbind")
    script = "grep ' /vol ' /proc/mounts; stat -c %g /vol; echo kept > /vol/file; sync"
    result = containerd.run(IMAGE, "sh", "-c", script, options=mount, timeout=120)

    mounted, group = result.out.decode().splitlines()
    assert mounted.split()[0].startswith("/dev/vd")
    assert mounted.split()[2] == "ext4"
    assert group == "1234"
    assert list(path.iterdir()) == []
    done = subprocess.run(["debugfs", "-R", "cat file", image], check=True, env=E2FS, capture_output=True)
    assert done.stdout == b"kept\n"


def test_a_volume_is_asked_about_and_grows_while_it_is_used(
    containerd: Containerd, volume: tuple[Path, Path], no_leaks: Callable[[], None]
) -> None:
    path, image = volume
    name = containerd.new_id("grows")
    mount = ("--mount", f"type=bind,src={path},dst=/vol,options=rbind")
    containerd.ctr("run", "--detach", "--runtime", KATA, *mount, IMAGE, name, "sleep", "100000", timeout=120)

    def kata_ctl(*words: str) -> str:
        command = [str(PROJECT / ".venv/bin/kata-ctl"), "direct-volume", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (before, inodes) = json.loads(kata_ctl("stats", str(path)))["usage"]
    kata_ctl("resize", str(path), str(24 << 20))
    (after, _) = json.loads(kata_ctl("stats", str(path)))["usage"]
    shown = containerd.ctr("task", "exec", "--exec-id", "df", name, "df", "-k", "/vol").text.splitlines()[-1]
    containerd.remove(name)

    assert inodes["unit"] == 2
    assert before["total"] < 8 << 20 < 20 << 20 < after["total"]
    assert int(shown.split()[1]) << 10 == after["total"]
    assert image.stat().st_size == 24 << 20
    subprocess.run(["e2fsck", "-fn", image], check=True, env=E2FS, capture_output=True)
    assert [each.name for each in _assignment(path).iterdir()] == ["mountInfo.json"]


def test_after_kill_9_of_the_shim_nothing_of_volume_and_swap_is_left(
    containerd: Containerd, volume: tuple[Path, Path], tmp_path: Path, no_leaks: Callable[[], None]
) -> None:
    path, image = volume
    name, swap = containerd.new_id("killed"), tmp_path / "swap"
    overrides: dict[str, dict[str, Value | None]] = {
        "hypervisor.qemu": {"enable_guest_swap": True, "guest_swap_path": str(swap)}
    }
    configuration = write_configuration(tmp_path / "configuration.toml", overrides)
    options = ("--runtime-config-path", str(configuration))
    mount = ("--mount", f"type=bind,src={path},dst=/vol,options=rbind")
    run = ("run", "--detach", "--runtime", KATA, *options, *mount, IMAGE, name, "sleep", "100000")
    containerd.ctr(*run, timeout=120)
    assert (swap / f"{containerd.key(name)}.swap").exists()
    assert Path(f"/run/kata/{name}/shim-monitor.sock").exists()
    assert (_assignment(path) / name).exists()
    with pytest.raises(CallerError, match="another VM's"):
        probe(str(image), read_only=False)

    (journal,) = (
        record for record in load(f"/run/kata/{name}").records if record.facts.get("name") == "shim"
    )
    os.kill(int(journal.facts["pid"]), signal.SIGKILL)
    containerd.remove(name)
    no_leaks()
    assert list(swap.iterdir()) == []
    assert not Path(f"/run/kata/{name}").exists()
    assert [each.name for each in _assignment(path).iterdir()] == ["mountInfo.json"]
    probe(str(image), read_only=False)


def _assignment(path: Path) -> Path:
    return ASSIGNED / base64.urlsafe_b64encode(str(path).encode()).decode()


def _loop_files(below: Path) -> list[str]:
    """The files below this directory that are behind loop devices."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # it goes just now
            found.append(path.read_text().strip())
    return [path for path in found if path.startswith(f"{below}/")]


def test_a_container_without_a_shared_file_system(
    containerd: Containerd, tmp_path: Path, no_leaks: Callable[[], None]
) -> None:
    """Its root is disks that are plugged into the running VM, its volumes are copies."""
    configuration = write_configuration(
        tmp_path / "configuration.toml", {"hypervisor.qemu": {"shared_fs": "none"}}
    )
    volume = tmp_path / "volume" / "below"
    volume.mkdir(parents=True)
    (volume / "file").write_text("from the host\n")
    name = containerd.new_id("disks")
    mount = ("--mount", f"type=bind,src={volume.parent},dst=/vol,options=rbind:ro")
    options = ("--runtime-config-path", str(configuration), *mount)
    writes = "head -c 3000000 /dev/zero >/big; wc -c </big"
    script = f"cat /vol/below/file; {writes}; grep ' / ' /proc/mounts; ! grep virtiofs /proc/mounts; exit 9"
    result = containerd.run(IMAGE, "sh", "-c", script, options=options, timeout=120, name=name, check=False)

    assert result.code == 9, result.error
    first, size, root = result.text.splitlines()
    assert (first, size) == ("from the host", "3000000")
    assert root.startswith("overlay / overlay rw,")
    assert not Path("/var/lib/kata-containers/sandboxes", containerd.key(name)).exists()


@pytest.mark.parametrize("shared_fs", ["none", "virtio-fs"])
def test_a_snapshotters_image_file_is_the_root(tmp_path: Path, shared_fs: str) -> None:
    """containerd's blockfile snapshotter; what a container writes is in its snapshot afterwards. The image is
    a disk of the VM, or, with a shared directory, mounted on the host and shared."""
    busybox_image(tmp_path / "busybox.tar", IMAGE)
    overrides: dict[str, dict[str, Value | None]] = {"hypervisor.qemu": {"shared_fs": shared_fs}}
    with Containerd(debug=True, version="1.7", blockfile=True, overrides=overrides) as daemon:
        daemon.ctr("image", "import", "--snapshotter", "blockfile", str(tmp_path / "busybox.tar"))
        name = daemon.new_id("blockfile")
        run = ("run", "--runtime", KATA, "--snapshotter", "blockfile", IMAGE, name)
        script = "grep ' / ' /proc/mounts; cat /file; echo kept >/file; exit 5"
        done = daemon.ctr(*run, "sh", "-c", script, timeout=120, check=False)
        assert done.code == 5, done.error
        device, *rest = done.text.split()
        if shared_fs == "none":
            assert device.startswith("/dev/vd")
            assert rest[:2] == ["/", "ext4"]
        else:
            assert rest[:2] == ["/", "virtiofs"]
        assert "kept" not in rest
        # What it wrote is in its snapshot: the next task of the same container finds it.
        again = daemon.ctr("task", "start", name, timeout=120, check=False)
        assert (again.code, again.text.splitlines()[-1]) == (5, "kept"), again.error
        daemon.remove(name)
        until = time.monotonic() + 30  # the kernel takes a loop device back in its own time
        while _loop_files(daemon.root) and time.monotonic() < until:
            time.sleep(0.05)
        assert _loop_files(daemon.root) == []
