"""containerd's mounts are mounted as they say, many layers included, and unmounted without a trace."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices import mounts
from devices.syscalls import mount
from tests.unit.shim.namespaces import in_mount_namespace


@dataclass(frozen=True)
class _Mount:
    type: str
    source: str
    options: Sequence[str] = ()
    target: str = ""


def test_options() -> None:
    """Options are flags, propagation, or data; later ones win, unknown ones go to the file system."""
    flags, propagation, data = mounts.parse_options(["ro", "nosuid", "rw", "rslave", "size=1k", "index=off"])

    assert flags == mounts.MS_NOSUID
    assert propagation == mounts.MS_SLAVE | mounts.MS_REC
    assert data == "size=1k,index=off"


def test_overlay(tmp_path: Path) -> None:
    """An overlay of two layers shows both, takes writes, and is gone after unmount."""
    for name in ("a", "b", "up", "work", "root"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "from-a").write_text("1")
    (tmp_path / "b" / "from-b").write_text("2")
    root = str(tmp_path / "root")

    def body() -> None:
        # tmpfs, since the test's own directory may lie on an overlay, which cannot be an upper one
        mount("t", str(tmp_path / "up"), "tmpfs", 0, "")
        (tmp_path / "up" / "u").mkdir()
        (tmp_path / "up" / "w").mkdir()
        options = [
            "index=off",
            f"workdir={tmp_path}/up/w",
            f"upperdir={tmp_path}/up/u",
            f"lowerdir={tmp_path}/a:{tmp_path}/b",
        ]
        mounts.mount_rootfs([_Mount("overlay", "overlay", options)], root)
        assert mounts.is_mountpoint(root)
        assert sorted(os.listdir(root)) == ["from-a", "from-b"]
        (tmp_path / "root" / "new").write_text("3")
        assert (tmp_path / "up" / "u" / "new").read_text() == "3"
        mounts.unmount(root)
        assert not mounts.is_mountpoint(root)
        assert os.listdir(root) == []

    in_mount_namespace(body)


@pytest.mark.parametrize("count", [30, 120])
def test_overlay_of_many_layers(tmp_path: Path, count: int) -> None:
    """Layers whose paths exceed one page of options are mounted all the same, in their order."""
    base = tmp_path / ("io.containerd.snapshotter.v1.overlayfs" * 2) / "snapshots"
    layers = []
    for number in range(count):
        layer = base / str(number) / "fs"
        layer.mkdir(parents=True)
        (layer / f"only-{number}").write_text("")
        (layer / "all").write_text(str(number))
        layers.append(str(layer))
    root = tmp_path / "root"
    root.mkdir()
    options = ["lowerdir=" + ":".join(layers)]
    assert count < 100 or len(options[0]) > 2 * 4096

    def body() -> None:
        here = os.getcwd()
        mounts.mount_rootfs([_Mount("overlay", "overlay", options)], str(root))
        assert len(os.listdir(root)) == count + 1
        assert (root / "all").read_text() == "0"
        assert os.getcwd() == here
        mounts.unmount(str(root))

    in_mount_namespace(body)


def test_layers_with_colons() -> None:
    """A name with an escaped colon stays one layer when its path is shortened."""
    directory, data = mounts._shorten_overlay(r"ro,lowerdir=/s/a\:b/fs:/s/c/fs,x=y")

    assert directory == "/s"
    assert data == r"ro,lowerdir=a\:b/fs:c/fs,x=y"


@given(st.lists(st.text("abc/\\:.", min_size=1, max_size=10), min_size=1, max_size=5))
def test_shortening_keeps_what_is_named(names: list[str]) -> None:
    """Relative to the common directory, the layers are the same paths."""
    layers = ["/snap/" + name.replace("\\", "").replace(":", "\\:") for name in names]
    directory, data = mounts._shorten_overlay("lowerdir=" + ":".join(layers))

    relative = [part.replace("\0", ":") for part in data[9:].replace("\\:", "\0").split(":")]
    assert [os.path.normpath(os.path.join(directory, part)) for part in relative] == [
        os.path.normpath(layer.replace("\\:", ":")) for layer in layers
    ]


def test_bind_read_only(tmp_path: Path) -> None:
    """A read-only bind refuses writes, its source does not."""
    (tmp_path / "src").mkdir()
    (tmp_path / "dst").mkdir()

    def body() -> None:
        mounts.bind(str(tmp_path / "src"), str(tmp_path / "dst"), read_only=True)
        with pytest.raises(OSError, match="Read-only") as caught:
            (tmp_path / "dst" / "x").write_text("")
        assert caught.value.errno == errno.EROFS
        (tmp_path / "src" / "x").write_text("")
        mounts.unmount_below(str(tmp_path))
        assert mounts.mounts_below(str(tmp_path)) == []

    in_mount_namespace(body)


def test_failure_is_undone_and_told(tmp_path: Path) -> None:
    """When the second mount fails the first is undone, and the error names both sides and the cause."""
    (tmp_path / "src").mkdir()
    target = tmp_path / "root"
    target.mkdir()
    wanted = [_Mount("bind", str(tmp_path / "src"), ["bind"]), _Mount("bind", "/does/not/exist", ["bind"])]

    def body() -> None:
        with pytest.raises(mounts.MountError, match=r"cannot mount bind /does/not/exist on .*does not exist"):
            mounts.mount_rootfs(wanted, str(target))
        assert not mounts.is_mountpoint(str(target))

    in_mount_namespace(body)


def test_unknown_file_system(tmp_path: Path) -> None:
    """A file system that the kernel lacks is named, with what to try."""

    def body() -> None:
        with pytest.raises(mounts.MountError, match="this kernel has no nosuchfs; try: modprobe nosuchfs"):
            mounts.mount_rootfs([_Mount("nosuchfs", "none")], str(tmp_path))

    in_mount_namespace(body)


@pytest.mark.parametrize("target", ["../x", "a/../../x"])
def test_target_stays_inside(tmp_path: Path, target: str) -> None:
    """A mount's own target cannot leave the root file system."""
    with pytest.raises(mounts.MountError, match="leaves the root"):
        mounts.mount_rootfs([_Mount("tmpfs", "t", (), target)], str(tmp_path))


def test_unmount_of_nothing(tmp_path: Path) -> None:
    """Nothing mounted, or nothing there at all, is fine."""

    def body() -> None:
        mounts.unmount(str(tmp_path))
        mounts.unmount(str(tmp_path / "missing"))

    in_mount_namespace(body)


def test_unmount_follows_no_link(tmp_path: Path) -> None:
    """A link in the place of a mount point leads nowhere."""
    (tmp_path / "mnt").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mnt")

    def body() -> None:
        mount("t", str(tmp_path / "mnt"), "tmpfs", 0, "")
        mounts.unmount(str(tmp_path / "link"))
        assert mounts.is_mountpoint(str(tmp_path / "mnt"))

    in_mount_namespace(body)


def test_private_namespace_sends_nothing(tmp_path: Path) -> None:
    """What is mounted inside does not appear outside."""

    def body() -> None:
        mount("t", str(tmp_path), "tmpfs", 0, "")
        assert mounts.is_mountpoint(str(tmp_path))

    in_mount_namespace(body)

    assert not mounts.is_mountpoint(str(tmp_path))


def test_parse_mountinfo() -> None:
    """Optional fields, escaped blanks and unknown lines are understood as proc(5) says."""
    data = (
        b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n"
        b"37 36 0:5 / /a\\134b ro - tmpfs none rw\n"
        b"garbage\n"
        b"38 37 0:6 / /cut"
    )
    first, second = mounts.parse_mountinfo(data)

    assert (first.mount_id, first.parent_id, first.root, first.target) == (36, 35, "/mnt1", "/mnt 2")
    assert (first.fstype, first.source) == ("ext3", "/dev/root")
    assert second.target == "/a\\b"


@given(st.binary(max_size=200))
def test_parse_mountinfo_of_anything(data: bytes) -> None:
    """No bytes make the parser fail."""
    for entry in mounts.parse_mountinfo(data):
        assert isinstance(entry.target, str)
