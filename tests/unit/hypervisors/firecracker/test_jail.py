"""A jail is made where nobody could plant anything, lends what is named, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path

import pytest

from devices import mounts
from devices.errors import BugError, HostError
from devices.syscalls import mount
from devices.undo import MemoryUndo
from hypervisors.firecracker.jail import Den, jail_id
from tests.unit.shim.namespaces import in_mount_namespace
from tests.unit.steps import Steps


def _base() -> str:
    """A directory of root's below directories of root's, in this namespace only."""
    mount("tmpfs", "/mnt", "tmpfs", 0, "mode=0755")
    os.mkdir("/mnt/kata", 0o700)
    return "/mnt/kata"


def _jail(undo: MemoryUndo, base: str, uid: int = 0) -> Den:
    return Den.jail("sid", "/usr/bin/firecracker", undo, uid=uid, gid=uid, base=base)


def test_ids_that_the_jailer_would_refuse() -> None:
    """A jail is named by its sandbox's state directory, which no other sandbox of the host has."""
    assert jail_id("/run/kata-shim/abc-1") == "abc-1"
    assert len(jail_id("/run/kata-shim/a_b.c")) == 32
    assert len(jail_id("/run/kata-shim/" + "a" * 70)) == 32
    assert jail_id("/x/a_b") != jail_id("/x/a.b")


def test_a_jails_life(tmp_path: Path) -> None:
    """Made, filled by name, emptied, gone: with every step in the undo log before it was taken."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"data")
    folder = tmp_path / "folder"
    folder.mkdir()

    def body() -> None:
        undo, base = MemoryUndo(), _base()
        den = _jail(undo, base, uid=1234)
        assert den.root == "/mnt/kata/firecracker/sid/root"
        assert os.stat(den.root).st_uid == 1234
        assert [entry.kind for entry in undo.entries] == ["dir", "mount"]
        assert den.lend(str(disk), "drive0") == "drive0"
        assert Path(den.path("drive0")).read_bytes() == b"data"
        with pytest.raises(OSError, match="Read-only"):
            Path(den.path("drive0")).write_bytes(b"x")
        den.lend(str(folder), "snapshot", read_only=False)
        Path(den.path("snapshot"), "f").write_text("x")
        with pytest.raises(BugError):
            den.lend(str(disk), "drive0")
        den.take_back("drive0")
        den.take_back("drive0")
        assert not os.path.exists(den.path("drive0"))
        den.make_fifo("log.fifo")
        den.make_file("empty", 4096)
        assert os.stat(den.path("empty")).st_uid == 1234
        den.close()
        den.close()
        assert undo.entries == []
        assert os.listdir(base) == []
        assert mounts.mounts_below(base) == []

    in_mount_namespace(body)
    assert (folder / "f").read_text() == "x"


def test_nothing_is_made_in_what_others_could_have_made() -> None:
    """A planted link, a directory that is there already, a parent that others may write to: all refused."""

    def body() -> None:
        undo, base = MemoryUndo(), _base()
        os.mkdir("/mnt/elsewhere")
        os.symlink("/mnt/elsewhere", f"{base}/firecracker")
        with pytest.raises(HostError, match="is a symbolic link"):
            _jail(undo, base)
        os.unlink(f"{base}/firecracker")
        os.mkdir(f"{base}/firecracker", 0o700)
        os.symlink("/mnt/elsewhere", f"{base}/firecracker/sid")
        with pytest.raises(HostError, match="exists already"):
            _jail(undo, base)
        os.unlink(f"{base}/firecracker/sid")
        os.mkdir(f"{base}/firecracker/sid")
        with pytest.raises(HostError, match="exists already"):
            _jail(undo, base)
        assert os.listdir(f"{base}/firecracker") == ["sid"]  # what was found is left alone
        os.rmdir(f"{base}/firecracker/sid")
        os.chmod(f"{base}/firecracker", 0o777)
        with pytest.raises(HostError, match="others could change"):
            _jail(undo, base)
        os.chmod(f"{base}/firecracker", 0o700)
        os.chown(f"{base}/firecracker", 1000, 1000)
        with pytest.raises(HostError, match="belongs to user 1000"):
            _jail(undo, base)
        assert os.listdir("/mnt/elsewhere") == []
        assert undo.entries == []

    in_mount_namespace(body)


@pytest.mark.parametrize("what", ["disk", "folder"])
def test_who_owns_the_jail_cannot_lead_root_out_of_it(tmp_path: Path, what: str) -> None:
    """At whatever step it exchanges the name: nothing is mounted, made or given away outside."""
    (tmp_path / "disk").write_bytes(b"data")
    (tmp_path / "folder").mkdir()

    def body() -> None:
        outside = "/mnt/outside"

        def swap(den: Den) -> None:
            for name in ("lent", "log.fifo"):
                with contextlib.suppress(OSError):  # what is mounted on is not renamed here
                    if os.path.lexists(den.path(name)):
                        os.rename(den.path(name), den.path("was"))
                    os.symlink(f"{outside}/{what}", den.path(name))

        base, at, count = _base(), 0, 1
        os.makedirs(f"{outside}/folder")
        Path(outside, "disk").touch()
        while at <= count:
            den = _jail(MemoryUndo(), base, uid=1234)
            steps = Steps(partial(swap, den), at)
            with steps.counting(), contextlib.suppress(OSError):
                den.lend(str(tmp_path / what), "lent", read_only=False)
                den.make_fifo("log.fifo")
            count = count if at else steps.count
            assert mounts.mounts_below(outside) == []
            assert [os.stat(f"{outside}/{name}").st_uid for name in ("disk", "folder")] == [0, 0]
            with contextlib.suppress(OSError):  # what it has renamed is in the way
                den.close()
            mounts.unmount_below(base)
            for left in ("firecracker/sid", "firecracker"):
                if os.path.isdir(f"{base}/{left}"):
                    os.rmdir(f"{base}/{left}")
            at += 1
        assert count > 5

    in_mount_namespace(body)


def test_names_in_a_jail_are_names(tmp_path: Path) -> None:
    def body() -> None:
        den = _jail(MemoryUndo(), _base())
        for name in ("../x", "a/b", "", ".hidden"):
            with pytest.raises(BugError):
                den.lend(str(tmp_path), name)
        den.close()

    in_mount_namespace(body)


def test_without_a_jailer_the_host_is_seen_as_it_is(tmp_path: Path) -> None:
    den = Den.plain(str(tmp_path), MemoryUndo())
    assert den.lend("/boot/vmlinux", "kernel") == "/boot/vmlinux"
    assert den.path("fc.sock") == f"{tmp_path}/fc.sock"
    den.make_fifo("log.fifo")
    den.close()
    assert list(tmp_path.iterdir()) == []
