"""An image is made once for each content, kept while it is used, and removed when the store is too large."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from devices.child import Child
from devices.confine import Confinement
from devices.errors import HostError
from devices.undo import MemoryUndo
from shim.protocols import RootfsMount
from shim.resources import disk_images
from shim.resources.disk_images import ImageStore, make_scratch, rootfs_digest
from tests.security.test_confinement import bits, table


def _overlay(upper: Path, *lower: Path) -> list[RootfsMount]:
    layers = ":".join(str(layer).replace(":", "\\:") for layer in lower)
    options = ("index=off", f"workdir={upper}-work", f"upperdir={upper}", f"lowerdir={layers}")
    return [RootfsMount("overlay", "overlay", "", options)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("content")
    return tmp_path / "tree"


def test_layers_name_the_content(tmp_path: Path) -> None:
    for name in ("a", "b:c", "up"):
        (tmp_path / name).mkdir()
    known = rootfs_digest(_overlay(tmp_path / "up", tmp_path / "a", tmp_path / "b:c"))
    assert known == rootfs_digest(_overlay(tmp_path / "up", tmp_path / "a", tmp_path / "b:c"))
    assert len(known) == 40
    assert known != rootfs_digest(_overlay(tmp_path / "up", tmp_path / "b:c", tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "old")
    (tmp_path / "a").mkdir()
    assert known != rootfs_digest(_overlay(tmp_path / "up", tmp_path / "a", tmp_path / "b:c"))
    (tmp_path / "up" / "written").touch()
    assert rootfs_digest(_overlay(tmp_path / "up", tmp_path / "a")) == ""
    assert rootfs_digest(_overlay(tmp_path / "up", tmp_path / "missing")) == ""
    assert rootfs_digest([RootfsMount("bind", "/", "", ())]) == ""


async def test_an_image_is_made_once(tmp_path: Path, tree: Path) -> None:
    undo = MemoryUndo()
    store = ImageStore(undo, str(tmp_path / "store"))
    first, held = await store.image(str(tree), "d1")
    stamp = os.stat(first).st_ino
    second, again = await store.image(str(tree), "d1")
    assert (second, os.stat(second).st_ino) == (first, stamp)
    other, third = await store.image(str(tree), "d2")
    assert other != first
    listing = subprocess.run(
        ["dump.erofs", "--ls", "--path=/", first], capture_output=True, text=True, check=True
    ).stdout
    assert "file" in listing
    assert undo.entries == []
    assert sorted(os.listdir(tmp_path / "store")) == ["d1.erofs", "d2.erofs"]
    for fd in (held, again, third):
        os.close(fd)


async def test_two_at_once_get_the_same(tmp_path: Path, tree: Path) -> None:
    store = ImageStore(MemoryUndo(), str(tmp_path / "store"))
    images = await asyncio.gather(*(store.image(str(tree), "d1") for _ in range(2)))
    assert len({path for path, _ in images}) == 1
    for path, fd in images:
        assert os.pread(fd, 4, 1024) == bytes.fromhex("e2e1f5e0")  # erofs's magic, little end first
        assert os.path.exists(path)
        os.close(fd)


async def test_the_oldest_unused_goes_first(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ImageStore(MemoryUndo(), str(tmp_path / "store"))
    _, used = await store.image(str(tree), "used")
    _, idle = await store.image(str(tree), "idle")
    os.close(idle)
    monkeypatch.setattr(disk_images, "STORE_LIMIT", 0)
    _, new = await store.image(str(tree), "new")
    assert sorted(os.listdir(tmp_path / "store")) == ["new.erofs", "used.erofs"]
    os.close(used)
    os.close(new)


async def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    undo = MemoryUndo()
    store = ImageStore(undo, str(tmp_path / "store"))
    (tmp_path / "file").touch()
    for tree, words in (("file", r"mkfs\.erofs exited with code"), ("missing", "missing cannot be used")):
        with pytest.raises(HostError, match=words):
            await store.image(str(tmp_path / tree), "d1")
    assert os.listdir(tmp_path / "store") == []
    assert undo.entries == []


async def test_mkfs_may_what_the_table_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of SECURITY.md, and sees the image that it makes and the tree that it reads: nothing else."""
    seen: dict[str, Confinement] = {}
    spawn = Child.spawn

    async def watched(argv: list[str], *, confinement: Confinement, **keys: Any) -> Child:
        seen[os.path.basename(argv[0])] = confinement
        return await spawn(argv, confinement=confinement, **keys)

    monkeypatch.setattr(Child, "spawn", watched)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/secret").touch(mode=0o600)
    os.chown(tmp_path / "tree/secret", 5, 5)
    image, held = await ImageStore(MemoryUndo(), str(tmp_path / "store")).image(str(tmp_path / "tree"), "d")
    os.close(held)
    await make_scratch(MemoryUndo(), str(tmp_path / "s.ext4"))
    for name, written in (("mkfs.erofs", f"{image}."), ("mkfs.ext4", f"{tmp_path}/s.ext4")):
        row, one = table()[name], seen[name]
        assert (str(one.user), one.mask) == (row["user"], bits(row["capabilities"]))
        assert (one.network, one.own_pids) == ("", True)
        assert one.view is not None
        assert next(bind.path for bind in one.view.binds if bind.writable).startswith(written)
        assert {bind.path for bind in one.view.binds if not bind.writable} <= {
            f"{tmp_path}/tree",
            "/etc/mke2fs.conf",
        }
        assert f"nofile {one.files}" in row["limits"]


async def test_a_scratch_disk_costs_only_what_is_written(tmp_path: Path) -> None:
    await make_scratch(MemoryUndo(), str(tmp_path / "s.ext4"))
    info = os.stat(tmp_path / "s.ext4")
    assert info.st_size == disk_images.SCRATCH_SIZE
    assert info.st_blocks * 512 < 32 << 20
    with pytest.raises(FileExistsError):
        await make_scratch(MemoryUndo(), str(tmp_path / "s.ext4"))
