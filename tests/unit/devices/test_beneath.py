"""What is opened beneath a directory is beneath it, and finding it neither waits nor acts."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devices.beneath import connect_to, open_entry, open_in_root, open_named, reopen


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("outside")
    tree = tmp_path / "tree"
    (tree / "d").mkdir(parents=True)
    (tree / "d/file").write_text("inside")
    (tree / "out").symlink_to(tmp_path / "outside")
    (tree / "climb").symlink_to("../outside")
    (tree / "in").symlink_to("d")
    (tree / "magic").symlink_to("/proc/self/fd/0")
    os.mkfifo(tree / "fifo")
    return tree


@pytest.fixture
def top(tree: Path) -> Iterator[int]:
    top = os.open(tree, os.O_PATH | os.O_DIRECTORY)
    yield top
    os.close(top)


def _error(call: Callable[..., int], *arguments: object) -> int:
    with pytest.raises(OSError) as caught:  # noqa: PT011  (its number is asserted)
        os.close(call(*arguments))
    return caught.value.errno or 0


def _read(descriptor: int) -> bytes:
    """Of an O_PATH descriptor, which is closed."""
    try:
        file = reopen(descriptor)
    finally:
        os.close(descriptor)
    with open(file, "rb") as stream:
        return stream.read()


def test_no_link_is_followed_to_an_entry(top: int) -> None:
    assert _read(open_entry(top, "d/file")) == b"inside"
    for link in ("out", "climb", "in", "magic"):
        found = open_entry(top, link)
        assert stat.S_ISLNK(os.fstat(found).st_mode)
        os.close(found)
        assert _error(open_entry, top, f"{link}/file") == errno.ELOOP
    assert _error(open_entry, top, "..") == errno.EXDEV
    assert _error(open_entry, top, "d/../../outside") == errno.EXDEV
    assert _error(open_entry, top, "/etc") == errno.EXDEV


def test_in_a_root_every_link_ends_inside(top: int, tree: Path) -> None:
    assert _read(open_in_root(top, "in/file")) == b"inside"
    assert _read(open_in_root(top, "/../../in/file")) == b"inside"
    for path in ("out/file", "climb/file"):
        assert _error(open_in_root, top, path) == errno.ENOENT
    (tree / "outside").mkdir()
    (tree / "outside/file").write_text("clamped")
    assert _read(open_in_root(top, "climb/file")) == b"clamped"
    (tree / "proc").symlink_to("/")
    assert _error(open_in_root, top, "/proc/self/root") == errno.ENOENT


def test_a_callers_path_may_have_links_but_no_magic_ones(tree: Path) -> None:
    assert _read(open_named(str(tree / "out/file"))) == b"outside"
    found = open_named(str(tree / "out"))
    assert os.path.samestat(os.fstat(found), os.stat(tree.parent / "outside"))
    os.close(found)
    link = open_named(str(tree / "out"), follow=False)
    assert stat.S_ISLNK(os.fstat(link).st_mode)
    os.close(link)
    assert _error(open_named, str(tree / "magic")) == errno.ELOOP
    assert _error(open_named, "/proc/self/cwd") == errno.ELOOP
    assert _error(open_named, str(tree / "nope")) == errno.ENOENT


def test_a_fifo_is_found_without_waiting(top: int, tree: Path) -> None:
    for found in (open_entry(top, "fifo"), open_in_root(top, "fifo"), open_named(str(tree / "fifo"))):
        assert stat.S_ISFIFO(os.fstat(found).st_mode)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.read(found, 1)
        os.close(found)


def test_a_socket_is_the_one_at_the_path(tree: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tree / "s"))
        listener.listen(1)
        with socket.socket(socket.AF_UNIX) as connection:
            connect_to(connection, str(tree / "s"))
            assert connection.getpeername() == str(tree / "s")
        (tree / "alias").symlink_to("s")
        for name, number in (("alias", errno.ENOTSOCK), ("d", errno.ENOTSOCK), ("nope", errno.ENOENT)):
            with socket.socket(socket.AF_UNIX) as connection, pytest.raises(OSError) as caught:  # noqa: PT011
                connect_to(connection, str(tree / name))
            assert caught.value.errno == number
