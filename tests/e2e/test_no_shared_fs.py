"""shared_fs = "none" under QEMU: root file systems go in as disks, volumes as copies, and nothing is left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from testing import leaks
from testing.containerd import KATA, Containerd
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
