"""The root image holds the tree exactly, passes fsck, and is the same bytes for equal trees."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from guest.image import Tree, write_ext4

TIME = 1_767_225_600


def some_tree(*, reverse: bool = False) -> Tree:
    """A tree with one of each, added in either order."""
    tree = Tree()
    files = [(f"/usr/lib/{i:03}", bytes([i]) * (i * 97)) for i in range(100)]
    for path, data in reversed(files) if reverse else files:
        tree.file(path, data)
    tree.file("/usr/bin/run", "#!/bin/sh\n", 0o755)
    tree.directory("/tmp", 0o1777)
    tree.link("/bin", "usr/bin")
    tree.link("/etc/long", "/a" * 100)
    return tree


def debugfs(image: Path, command: str) -> str:
    """What debugfs answers."""
    return subprocess.run(
        ["debugfs", "-R", command, image], capture_output=True, text=True, check=True
    ).stdout


def test_what_is_in_it(tmp_path: Path) -> None:
    """Contents, modes, owners, links and times; fsck has nothing to say."""
    image = tmp_path / "image"
    write_ext4(some_tree(), str(image), time=TIME)

    assert debugfs(image, "cat /usr/lib/050") == "2" * (50 * 97)
    assert "Mode:  0755" in debugfs(image, "stat /usr/bin/run")
    assert "Mode:  01777" in debugfs(image, "stat /tmp")
    assert '"usr/bin"' in debugfs(image, "stat /bin")
    status = debugfs(image, "stat /usr/lib/050")
    assert "User:     0   Group:     0" in status
    assert status.count(f"0x{TIME:08x}") == 4
    subprocess.run(["fsck.ext4", "-fn", image], capture_output=True, check=True)


def test_equal_trees_give_equal_images(tmp_path: Path) -> None:
    """Neither the order of adding nor the moment of writing nor the place matters."""
    (tmp_path / "elsewhere").mkdir()
    one, two = tmp_path / "one", tmp_path / "elsewhere" / "two"
    write_ext4(some_tree(), str(one), time=TIME)
    write_ext4(some_tree(reverse=True), str(two), time=TIME)

    assert one.read_bytes() == two.read_bytes()


def test_another_tree_gives_another_image(tmp_path: Path) -> None:
    """The comparison above can fail."""
    tree = some_tree()
    tree.file("/usr/lib/000", b"x")
    write_ext4(some_tree(), str(tmp_path / "one"), time=TIME)
    write_ext4(tree, str(tmp_path / "two"), time=TIME)

    assert (tmp_path / "one").read_bytes() != (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("path", ["relative", "/a/../b", "/a b", '/a"b', "/a\nquit"])
def test_names_that_debugfs_would_misread(path: str) -> None:
    """They are refused, not escaped."""
    with pytest.raises(ValueError, match="plain absolute path"):
        Tree().file(path, b"")


def test_a_file_has_no_children() -> None:
    """Adding below a file or a link is a mistake of the caller."""
    with pytest.raises(ValueError, match="not a directory"):
        some_tree().file("/bin/x", b"")
