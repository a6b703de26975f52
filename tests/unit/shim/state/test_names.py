"""Sockets and links that others may want, too, are removed only while they are ours."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.state.names import make_link, remove_link, socket_facts, unlink_dead, unlink_socket
from shim.state.releases import KINDS


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        sock.listen()
        yield sock


def _replace(path: Path) -> socket.socket:
    """Another one's socket at the same place; on some file systems it gets the same inode number."""
    path.unlink()
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def test_a_socket_is_known_again(tmp_path: Path, listener: socket.socket) -> None:
    """By inode and time of creation; what another process put there is left."""
    path = tmp_path / "s"
    facts = socket_facts(str(path))
    KINDS["socket"](facts, 1.0)
    KINDS["socket"](facts, 1.0)
    assert not path.exists()

    path.touch()
    with _replace(path) as other:
        KINDS["socket"](facts, 1.0)
        assert path.exists()
        assert unlink_socket(str(path), int(facts["inode"]), int(facts["made"])) is False
        assert other.fileno() > 0
    gone = socket_facts(str(tmp_path / "none"))
    KINDS["socket"]({**gone, "path": str(path)}, 1.0)  # of one that was gone when it was looked at
    assert path.exists()
    KINDS["socket"]({"path": str(path)}, 1.0)  # one in a directory of ours needs no more than its path
    assert not path.exists()


def test_only_the_dead_are_removed(tmp_path: Path, listener: socket.socket) -> None:
    """A socket that somebody listens on stays."""
    path = str(tmp_path / "s")
    assert not unlink_dead(path)
    assert os.path.exists(path)
    listener.close()
    assert unlink_dead(path)
    assert not os.path.exists(path)
    assert unlink_dead(path)


def test_links(tmp_path: Path) -> None:
    """Made where nothing is, or a link to nothing; removed by whom they point to."""
    link, ours, other = tmp_path / "kata/c1", tmp_path / "run/1", tmp_path / "run/2"
    for directory in (ours, other):
        directory.mkdir(parents=True)

    assert make_link(str(link), str(ours))
    assert make_link(str(link), str(ours))
    assert os.readlink(link) == "../run/1"
    assert not make_link(str(link), str(other))
    assert not remove_link(str(link), str(other))
    KINDS["link"]({"path": str(link), "target": str(other)}, 1.0)
    assert link.resolve() == ours
    ours.rmdir()
    assert make_link(str(link), str(other))
    KINDS["link"]({"path": str(link), "target": str(other)}, 1.0)
    assert not link.is_symlink()
    assert not remove_link(str(link), str(other))
    link.mkdir()
    assert not make_link(str(link), str(other))
    assert not remove_link(str(link), str(other))


def test_two_who_replace_a_dead_link_at_once(tmp_path: Path) -> None:
    """One of them has it, and knows."""
    link = tmp_path / "kata/c1"
    link.parent.mkdir()
    targets = [tmp_path / name for name in "abcdefgh"]
    for target in targets:
        target.mkdir()
    for _ in range(20):
        link.unlink(missing_ok=True)
        link.symlink_to("../gone")
        made: list[Path] = []
        barrier = threading.Barrier(len(targets))

        def work(target: Path, made: list[Path] = made, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(10)
            if make_link(str(link), str(target)):
                made.append(target)

        threads = [threading.Thread(target=work, args=(target,)) for target in targets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert made == [link.resolve()]


def test_a_lock_that_somebody_keeps_delays_only(tmp_path: Path, listener: socket.socket) -> None:
    """Any root process can lock the directory; nobody waits for ever."""
    path = str(tmp_path / "s")
    facts = socket_facts(path)
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    started = time.monotonic()
    assert unlink_socket(path, int(facts["inode"]), int(facts["made"]))
    assert 0.2 < time.monotonic() - started < 5
    os.close(fd)
