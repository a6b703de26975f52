"""Disks as a container's files: a directly assigned volume, and a root file system without a shared one."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from testing.containerd import Containerd
from testing.guest import write_configuration

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
    folder = ASSIGNED / base64.urlsafe_b64encode(str(path).encode()).decode()
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True)
    info = {"volume-type": "block", "device": str(image), "fstype": "ext4", "metadata": {"fsGroup": "1234"}}
    (folder / "mountInfo.json").write_text(json.dumps(info))
    yield path, image
    (folder / "mountInfo.json").unlink()
    for parent in made:
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


def test_a_container_without_a_shared_file_system(containerd: Containerd, tmp_path: Path) -> None:
    """Its root is a disk that is plugged into the running VM."""
    configuration = write_configuration(
        tmp_path / "configuration.toml", {"hypervisor.qemu": {"shared_fs": "none"}}
    )
    options = ("--runtime-config-path", str(configuration))
    result = containerd.run(
        IMAGE, "sh", "-c", "echo new > /file; cat /file; mount", options=options, timeout=120
    )

    new, root, *others = result.out.decode().splitlines()
    assert (new, root.split()[0]) == ("new", "overlay")
    assert not any("virtiofs" in line for line in others)
