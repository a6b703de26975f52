"""Removing a tree never leaves it: not through links, not through mounts, not when things are swapped."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from devices.syscalls import mount
from shim.state import safefs
from shim.state.safefs import SafeRemoveError, remove_tree
from tests.unit.attacker import attacking
from tests.unit.shim.namespaces import in_mount_namespace

MS_BIND = 0x1000


def test_removes_everything(tmp_path: Path) -> None:
    """Files, directories, links, FIFOs and sockets go; the parent stays."""
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "file").write_text("x")
    (tree / "link").symlink_to("/etc")
    os.mkfifo(tree / "fifo")
    os.chmod(tree / "a", 0o500)

    remove_tree(str(tree))

    assert list(tmp_path.iterdir()) == []


def test_missing_is_fine(tmp_path: Path) -> None:
    """Nothing there, nor its parent."""
    remove_tree(str(tmp_path / "no"))
    remove_tree(str(tmp_path / "no" / "way"))


def test_links_are_removed_not_followed(tmp_path: Path) -> None:
    """What links point to stays, also when the tree itself is a link."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "data").write_text("x")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "dir").symlink_to(precious)
    (tree / "file").symlink_to(precious / "data")
    (tmp_path / "link").symlink_to(precious)

    remove_tree(str(tree))
    remove_tree(str(tmp_path / "link"))

    assert (precious / "data").read_text() == "x"
    assert not tree.exists()
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_never_crosses_a_mount(tmp_path: Path, kind: str) -> None:
    """A mount in the tree keeps its content, is reported by its path, and the rest goes."""
    volume = tmp_path / "volume"
    volume.mkdir()
    tree = tmp_path / "tree"
    target = tree / "rw" / "passthrough" / "c1" / "mnt"
    target.mkdir(parents=True)
    (tree / "other").mkdir()

    def body() -> None:
        if kind == "bind":
            mount(str(volume), str(target), "", MS_BIND, "")  # the same file system: st_dev tells nothing
        else:
            mount("t", str(target), "tmpfs", 0, "")
        (target / "data").write_text("precious")
        with pytest.raises(SafeRemoveError, match="is a mount") as caught:
            remove_tree(str(tree))
        assert (target / "data").read_text() == "precious"
        assert any(str(target) in left for left in caught.value.left)
        assert not (tree / "other").exists()

    in_mount_namespace(body)


def test_mounted_file(tmp_path: Path) -> None:
    """A file with another one mounted over it stays, and so does the other."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "hosts").write_text("")
    (tmp_path / "precious").write_text("x")

    def body() -> None:
        mount(str(tmp_path / "precious"), str(tree / "hosts"), "", MS_BIND, "")
        with pytest.raises(SafeRemoveError):
            remove_tree(str(tree))
        assert (tmp_path / "precious").read_text() == "x"

    in_mount_namespace(body)


def test_tree_that_is_a_mount(tmp_path: Path) -> None:
    """The tree itself must not be a mount either."""
    tree = tmp_path / "tree"
    tree.mkdir()

    def body() -> None:
        mount("t", str(tree), "tmpfs", 0, "")
        (tree / "data").write_text("x")
        with pytest.raises(SafeRemoveError):
            remove_tree(str(tree))
        assert (tree / "data").read_text() == "x"

    in_mount_namespace(body)


def test_very_deep_tree(tmp_path: Path) -> None:
    """A guest can nest directories deeper than recursion or descriptors allow; they go all the same."""
    tree = tmp_path / "tree"
    tree.mkdir()
    fd = os.open(tree, os.O_RDONLY)
    for number in range(3000):
        os.mkdir("d", dir_fd=fd)
        if number % 500 == 0:
            os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)

    remove_tree(str(tree))

    assert list(tmp_path.iterdir()) == []


def test_wide_and_deep_moves_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several branches that are too deep are moved up side by side."""
    monkeypatch.setattr(safefs, "_MAX_DEPTH", 2)
    for branch in range(5):
        path = tmp_path / "tree" / "x" / "y" / f"b{branch}"
        for level in range(8):
            path = path / f"l{level}"
        path.mkdir(parents=True)
        (path / "file").write_text("")

    remove_tree(str(tmp_path / "tree"))

    assert list(tmp_path.iterdir()) == []


def test_swap_race(tmp_path: Path) -> None:
    """Directories swapped for links while the tree goes never lead outside."""
    precious = tmp_path / "precious"
    precious.mkdir()
    for number in range(20):
        (precious / str(number)).write_text("x")
    tree = tmp_path / "tree"

    def swap(_number: int) -> None:
        if not (tree / "was").exists():
            os.rename(tree / "d", tree / "was")
        os.symlink(precious, tree / "d")
        os.unlink(tree / "d")
        os.rename(tree / "was", tree / "d")

    end, tries = time.monotonic() + 120, 0
    with attacking(swap) as changed:
        while tries < 300 or changed() < 100:
            assert time.monotonic() < end, (tries, changed())
            tries += 1
            try:
                (tree / "d" / "e").mkdir(parents=True, exist_ok=True)
                remove_tree(str(tree))
            except OSError:
                continue

    assert all((precious / str(number)).exists() for number in range(20))


@pytest.mark.parametrize("path", ["", "relative", "/", "/run/..", "/run/."])
def test_refuses_odd_paths(path: str) -> None:
    """What does not name a directory below another is a bug of the caller."""
    with pytest.raises(ValueError, match="not a path"):
        remove_tree(path)
