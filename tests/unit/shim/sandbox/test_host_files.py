"""What a sandbox reads of its first container's mounts is a regular file, bounded, and never waited for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from shim.sandbox.host_files import DEFAULT_SHM, MAX_RESOLV_CONF, read_host_files


def bind(destination: str, source: object) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": str(source)}


def test_without_mounts_there_are_defaults() -> None:
    assert read_host_files({}) == ((), DEFAULT_SHM)
    assert read_host_files({"mounts": [{}, bind("/etc/resolv.conf", "resolv")]}) == ((), DEFAULT_SHM)


def test_lines_and_size_are_those_of_the_first_mount(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"nameserver 10.0.0.1\nsearch \xff.local\n")
    (tmp_path / "b").write_text("nameserver 6.6.6.6\n")
    dns, shm_size = read_host_files(
        {
            "mounts": [
                bind("/etc/resolv.conf", tmp_path / "a"),
                bind("/etc/resolv.conf", tmp_path / "b"),
                bind("/dev/shm", tmp_path),
                bind("/dev/shm", "/nope"),
            ]
        }
    )
    size = os.statvfs(tmp_path)

    assert dns == ("nameserver 10.0.0.1", "search \N{REPLACEMENT CHARACTER}.local")
    assert shm_size == size.f_frsize * size.f_blocks


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "large", "gone"])
def test_what_is_no_file_is_done_without(tmp_path: Path, kind: str) -> None:
    """A FIFO once held the whole shim up."""
    source = tmp_path / "resolv.conf"
    if kind == "fifo":
        os.mkfifo(source)
    elif kind == "directory":
        source.mkdir()
    elif kind == "device":
        source.symlink_to("/dev/zero")
    elif kind == "large":
        source.write_bytes(b"#" * (MAX_RESOLV_CONF + 1))
    spec = {"mounts": [bind("/etc/resolv.conf", source), bind("/dev/shm", "/nope")]}

    assert read_host_files(spec) == ((), DEFAULT_SHM)
