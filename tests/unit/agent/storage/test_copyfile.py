"""CopyFile writes whole files below its base and nowhere else, whatever links lie in the way."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from agent.storage.copyfile import copy_file
from proto import agent_pb2
from ttrpc import Code, RpcError


def _request(base: Path, name: str, **fields: Any) -> agent_pb2.CopyFileRequest:
    fields = {"file_mode": 0o100640, "dir_mode": 0o750, "uid": os.getuid(), "gid": os.getgid(), **fields}
    fields.setdefault("file_size", len(fields.get("data", b"")))
    return agent_pb2.CopyFileRequest(path=f"{base}/{name}", **fields)


def test_a_file_in_pieces_appears_when_it_is_whole(tmp_path: Path) -> None:
    copy_file(_request(tmp_path, "a/b/file", data=b"1234", file_size=6), str(tmp_path))
    assert not (tmp_path / "a/b/file").exists()
    copy_file(_request(tmp_path, "a/b/file", data=b"56", file_size=6, offset=4), str(tmp_path))

    assert (tmp_path / "a/b/file").read_bytes() == b"123456"
    assert stat.S_IMODE((tmp_path / "a/b/file").stat().st_mode) == 0o640
    assert os.listdir(tmp_path / "a/b") == ["file"]


def test_an_empty_file_a_directory_and_a_link(tmp_path: Path) -> None:
    copy_file(_request(tmp_path, "empty"), str(tmp_path))
    copy_file(_request(tmp_path, "dir", file_mode=0o040711), str(tmp_path))
    copy_file(_request(tmp_path, "link", file_mode=0o120777, data=b"empty"), str(tmp_path))

    assert (tmp_path / "empty").read_bytes() == b""
    assert stat.S_IMODE((tmp_path / "dir").stat().st_mode) == 0o711
    assert (tmp_path / "link").readlink() == Path("empty")


def test_a_second_copy_replaces_the_first(tmp_path: Path) -> None:
    copy_file(_request(tmp_path, "f", data=b"long text"), str(tmp_path))
    copy_file(_request(tmp_path, "f", data=b"short"), str(tmp_path))

    assert (tmp_path / "f").read_bytes() == b"short"


@pytest.mark.parametrize("name", ["", "..", "../x", "a/../../x", "a//b", "./a", "a/"])
def test_paths_that_are_not_plainly_below(tmp_path: Path, name: str) -> None:
    with pytest.raises(RpcError) as caught:
        copy_file(_request(tmp_path, name, data=b"x"), str(tmp_path))

    assert caught.value.code == Code.INVALID_ARGUMENT


def test_a_path_beside_the_base(tmp_path: Path) -> None:
    request = agent_pb2.CopyFileRequest(path=f"{tmp_path}-other/x", file_mode=0o100600)
    with pytest.raises(RpcError, match="not below"):
        copy_file(request, str(tmp_path))


def test_a_link_to_a_directory_is_not_followed(tmp_path: Path) -> None:
    outside, base = tmp_path / "outside", tmp_path / "base"
    outside.mkdir()
    copy_file(_request(base, "trap", file_mode=0o120777, data=str(outside).encode()), str(base))
    with pytest.raises(RpcError):
        copy_file(_request(base, "trap/x", data=b"x"), str(base))

    assert list(outside.iterdir()) == []


def test_a_link_to_a_file_is_replaced(tmp_path: Path) -> None:
    outside, base = tmp_path / "outside", tmp_path / "base"
    outside.write_bytes(b"keep")
    base.mkdir()
    for name in ("f", "f.kata-partial"):
        (base / name).symlink_to(outside)
    copy_file(_request(base, "f", data=b"new"), str(base))

    assert outside.read_bytes() == b"keep"
    assert not (base / "f").is_symlink()
    assert (base / "f").read_bytes() == b"new"


def test_a_continued_piece_does_not_follow_a_link(tmp_path: Path) -> None:
    outside, base = tmp_path / "outside", tmp_path / "base"
    outside.write_bytes(b"keep")
    base.mkdir()
    (base / "f.kata-partial").symlink_to(outside)
    with pytest.raises(RpcError):
        copy_file(_request(base, "f", data=b"new", offset=4, file_size=7), str(base))

    assert outside.read_bytes() == b"keep"


def test_a_piece_beyond_the_size(tmp_path: Path) -> None:
    with pytest.raises(RpcError, match="beyond"):
        copy_file(_request(tmp_path, "f", data=b"123", file_size=2), str(tmp_path))


def test_a_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RpcError, match="is no file"):
        copy_file(_request(tmp_path, "f", file_mode=0o060600), str(tmp_path))
