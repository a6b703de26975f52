"""What is no regular file, or too large, is not read, and nobody waits for it."""

from __future__ import annotations

import os
import pty
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from devices.small_file import read_small


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 70_000)
    (tmp_path / "link").symlink_to("f")

    assert read_small(str(tmp_path / "f"), 70_000) == b"x" * 70_000
    assert read_small(str(tmp_path / "link"), 70_000) == b"x" * 70_000
    with pytest.raises(OSError, match="it has more than 69999 bytes"):
        read_small(str(tmp_path / "f"), 69_999)


def test_an_empty_one_and_one_that_says_no_size() -> None:
    assert read_small("/proc/self/comm", 100).endswith(b"\n"), "its size is 0 by stat"
    with pytest.raises(FileNotFoundError):
        read_small("/no/such/file", 1)


def _socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, _socket, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, make: Callable[[str], object]) -> None:
    path = str(tmp_path / "x")
    make(path)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=r"no regular file|No such device or address"):
        read_small(path, 100)

    assert os.listdir("/proc/self/fd") == before


def test_a_terminal_does_not_become_ours() -> None:
    controller, terminal = pty.openpty()
    with pytest.raises(OSError, match="no regular file"):
        read_small(os.ttyname(terminal), 100)
    os.close(controller)
    os.close(terminal)
