"""A volume arrives in the guest as it is on the host, in pieces, or is refused before its first byte."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from agent.storage.copyfile import copy_file
from devices.errors import CallerError
from proto import agent_pb2
from shim.resources import copied_volumes
from shim.resources.copied_volumes import copy_volume
from shim.spec.guest_spec import Volume


class Guest:
    """The agent's own CopyFile, below a directory of the test."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.requests: list[agent_pb2.CopyFileRequest] = []

    async def copy_file(self, request: agent_pb2.CopyFileRequest) -> None:
        assert len(request.data) <= 1 << 20
        moved = agent_pb2.CopyFileRequest()
        moved.CopyFrom(request)
        moved.path = str(self.base) + request.path
        self.requests.append(moved)
        copy_file(moved, str(self.base))


def _volume(source: Path) -> Volume:
    return Volume(0, str(source), "/in/container", True, True, "cid-volume")


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    base = tmp_path / "guest"
    base.mkdir()
    return Guest(base)


async def test_a_tree(tmp_path: Path, guest: Guest) -> None:
    tree = tmp_path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "b" / "file").write_bytes(os.urandom(2_500_000))
    (tree / "a" / "b" / "file").chmod(0o640)
    (tree / "empty").touch()
    (tree / "link").symlink_to("/etc/passwd")
    (tree / "a").chmod(0o711)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tree / "socket"))
        await copy_volume(guest, _volume(tree))
    copied = Path(str(guest.base) + _volume(tree).guest_path)
    assert (copied / "a/b/file").read_bytes() == (tree / "a/b/file").read_bytes()
    assert stat.S_IMODE((copied / "a/b/file").stat().st_mode) == 0o640
    assert stat.S_IMODE((copied / "a").stat().st_mode) == 0o711
    assert (copied / "empty").read_bytes() == b""
    assert (copied / "link").readlink() == Path("/etc/passwd")
    assert not (copied / "socket").exists()


async def test_a_file_by_a_link_is_the_file(tmp_path: Path, guest: Guest) -> None:
    (tmp_path / "real").write_text("nameserver 10.0.0.1\n")
    (tmp_path / "resolv.conf").symlink_to("real")
    await copy_volume(guest, _volume(tmp_path / "resolv.conf"))
    copied = Path(str(guest.base) + _volume(tmp_path).guest_path)
    assert copied.read_text() == "nameserver 10.0.0.1\n"
    assert not copied.is_symlink()


@pytest.mark.parametrize("limit", ["MAX_ENTRIES", "MAX_BYTES"])
async def test_too_much_is_refused_by_name(
    tmp_path: Path, guest: Guest, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(copied_volumes, limit, 3)
    for number in range(4):
        (tmp_path / "guest" / f"f{number}").write_text("x")
    with pytest.raises(CallerError, match=r"the mount at /in/container \(.*guest\) has more than") as caught:
        await copy_volume(guest, _volume(tmp_path / "guest"))
    assert caught.value.code == "INVALID_ARGUMENT"
    assert guest.requests == []


@pytest.mark.parametrize("source", ["/nope", "/dev/null"])
async def test_what_cannot_be_copied_is_refused(guest: Guest, source: str) -> None:
    with pytest.raises(CallerError, match=source):
        await copy_volume(guest, _volume(Path(source)))
