"""Binds are what they say when they appear, nothing is followed on unmount, and what is mounted is known."""

from __future__ import annotations

import errno
import os
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
        flags = {"unbindable": 1 << 17}.get(propagation) or mounts.PROPAGATION[propagation]
        mount("none", "/", "", flags, "")
        os.close(mounts.make_private())

    in_mount_namespace(body)


@pytest.mark.parametrize("shared", [True, False])
def test_what_the_host_mounts_later_is_seen_or_told(tmp_path: Path, shared: bool) -> None:
    """A volume of a pod that runs already: where the root is not shared, an error, not an empty directory."""
    for name in ("volume", "target"):
        (tmp_path / name).mkdir()

    def body() -> None:
        mount("none", "/", "", mounts.PROPAGATION["rshared" if shared else "rprivate"], "")
        order, done = os.pipe(), os.pipe()
        host = os.fork()
        if host == 0:  # stays in the mount namespace that the other one leaves
            os.read(order[0], 1)
            mount("t", str(tmp_path / "volume"), "tmpfs", 0, "")
            (tmp_path / "volume/file").write_text("there")
            os.write(done[1], b".")
            os.read(order[0], 1)
            os._exit(0)
        mounts.make_private()
        mounts.bind(str(tmp_path / "volume"), str(tmp_path / "target"))  # nothing is mounted there yet
        mounts.unmount(str(tmp_path / "target"))
        os.write(order[1], b".")
        os.read(done[0], 1)
        try:
            if shared:
                mounts.bind(str(tmp_path / "volume"), str(tmp_path / "target"))
                assert os.listdir(tmp_path / "target") == ["file"]
            else:
                volume = str(tmp_path / "volume")
                fd = os.open(volume, os.O_PATH)
                for source in (volume, fd):
                    with pytest.raises(HostError, match=f"mounted at {volume} does not reach") as caught:
                        mounts.bind(source, str(tmp_path / "target"))
                os.close(fd)
                assert "mount --make-rshared /" in caught.value.hint
        finally:
            os.write(order[1], b".")
            os.waitpid(host, 0)

    in_mount_namespace(body)


def test_what_the_shim_mounted_itself_is_not_the_hosts(tmp_path: Path) -> None:
    """A root file system: here a mount, on the host the directory below it."""
    for name in ("root", "target"):
        (tmp_path / name).mkdir()

    def body() -> None:
        mount("t", str(tmp_path / "root"), "tmpfs", 0, "")
        mounts.bind(str(tmp_path / "root"), str(tmp_path / "target"))
        assert mounts.is_mountpoint(str(tmp_path / "target"))

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
