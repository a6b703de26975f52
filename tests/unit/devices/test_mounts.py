"""Binds are what they say when they appear, nothing is followed on unmount, and what is mounted is known."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices import mounts
from devices.errors import HostError
from devices.syscalls import mount
from tests.unit.shim.namespaces import in_mount_namespace


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


def test_a_root_that_is_no_mount_point_is_named(tmp_path: Path) -> None:
    """A plain chroot: the kernel's "Invalid argument" is told as what it is, and nothing stays open."""
    (tmp_path / "proc").mkdir()

    def body() -> None:
        mount("proc", str(tmp_path / "proc"), "proc", 0, "")
        os.chroot(tmp_path)
        os.chdir("/")
        before = sorted(os.listdir("/proc/self/fd"))
        with pytest.raises(HostError, match="/ is no mount point here") as caught:
            mounts.make_private()
        assert "mount --bind ROOT ROOT" in caught.value.hint
        assert sorted(os.listdir("/proc/self/fd")) == before

    in_mount_namespace(body)


@pytest.mark.parametrize("propagation", ["private", "shared", "slave", "unbindable"])
def test_any_propagation_of_the_root_will_do(propagation: str) -> None:
    """Shared as systemd has it, private as containers do: what is mounted here stays here."""

    def body() -> None:
        flags = {"unbindable": 1 << 17}.get(propagation) or mounts._PROPAGATION[propagation]
        mount("none", "/", "", flags, "")
        os.close(mounts.make_private())

    in_mount_namespace(body)


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
