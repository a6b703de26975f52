"""shared_fs = "none" under QEMU: root file systems go in as disks, volumes as copies, and nothing is left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from testing import leaks
from testing.containerd import KATA, Containerd
from testing.guest import Value
from testing.images import busybox_image

pytestmark = pytest.mark.kata_only
BUSYBOX = "local/busybox:1"


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    archive = tmp_path_factory.mktemp("images") / "busybox.tar"
    busybox_image(archive, BUSYBOX)
    with Containerd(debug=True, overrides={"hypervisor.qemu": {"shared_fs": "none"}}) as daemon:
        daemon.ctr("image", "import", str(archive))
        yield daemon


def test_a_container_without_a_shared_directory(blocks: Containerd, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    (volume / "below").mkdir(parents=True)
    (volume / "below" / "file").write_text("from the host\n")

    def snapshot() -> dict[str, set[str]]:
        return leaks.snapshot(tag=blocks.tag, root=str(blocks.root), ignore=[blocks.pid])

    before = snapshot()
    name = blocks.new_id("blocks")
    mount = f"type=bind,src={volume},dst=/volume,options=rbind:ro"
    writes = "head -c 3000000 /dev/zero >/big; wc -c </big"
    script = f"cat /volume/below/file; {writes}; grep ' / ' /proc/mounts; exit 9"
    done = blocks.ctr(
        "run", "--rm", "--runtime", KATA, "--mount", mount, BUSYBOX, name, "sh", "-c", script,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.code == 9, done.error
    first, size, root = done.text.splitlines()
    assert (first, size) == ("from the host", "3000000")
    assert root.startswith("overlay / overlay rw,")
    assert leaks.settle(before, snapshot) == {}
    assert not Path("/var/lib/kata-containers/sandboxes", name).exists()


def test_a_snapshotters_image_file_is_the_disk(tmp_path: Path) -> None:
    busybox_image(tmp_path / "busybox.tar", BUSYBOX)
    overrides: dict[str, dict[str, Value | None]] = {"hypervisor.qemu": {"shared_fs": "none"}}
    with Containerd(debug=True, version="1.7", blockfile=True, overrides=overrides) as daemon:
        daemon.ctr("image", "import", "--snapshotter", "blockfile", str(tmp_path / "busybox.tar"))
        name = daemon.new_id("blockfile")
        run = ("run", "--runtime", KATA, "--snapshotter", "blockfile", BUSYBOX, name)
        script = "grep ' / ' /proc/mounts; cat /file; echo kept >/file; exit 5"
        done = daemon.ctr(*run, "sh", "-c", script, timeout=120, check=False)
        assert done.code == 5, done.error
        device, *rest = done.text.split()
        assert device.startswith("/dev/vd")
        assert rest[:2] == ["/", "ext4"]
        assert "kept" not in rest
        # What it wrote is in its snapshot: the next task of the same container finds it.
        again = daemon.ctr("task", "start", name, timeout=120, check=False)
        assert (again.code, again.text.splitlines()[-1]) == (5, "kept"), again.error
        daemon.remove(name)
