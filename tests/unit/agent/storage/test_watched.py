"""A copy of a volume that the host rewrites becomes the same, by the steps that its watchers expect."""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from pathlib import Path

import pytest

from agent.storage import watched
from agent.storage.storages import Storages
from agent.storage.watched import bring_up_to_date
from proto import agent_pb2
from ttrpc import Code, RpcError


def tree(path: Path) -> dict[str, object]:
    """{path below: what is there}"""
    found: dict[str, object] = {}
    for folder, folders, files in os.walk(path):
        for name in folders + files:
            full = Path(folder) / name
            info = full.lstat()
            what: object = stat.S_IMODE(info.st_mode), info.st_uid
            if full.is_symlink():
                what = os.readlink(full)
            elif full.is_file():
                what = (*what, full.read_bytes(), info.st_mtime_ns)  # type: ignore[misc]
            found[str(full.relative_to(path))] = what
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """As kubelet's atomic writer makes it."""
    made = tmp_path / "source"
    (made / "..1/sub").mkdir(parents=True)
    (made / "..1/key").write_text("one")
    (made / "..1/key").chmod(0o400)
    (made / "..1/sub/deep").write_text("deep")
    (made / "..data").symlink_to("..1")
    (made / "key").symlink_to("..data/key")
    return made


def test_it_is_the_same_and_follows(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "made/target"
    bring_up_to_date(str(source), str(target))
    assert tree(target) == tree(source)
    assert (target / "key").read_text() == "one"
    inode = (target / "..1/key").stat().st_ino
    bring_up_to_date(str(source), str(target))
    assert (target / "..1/key").stat().st_ino == inode, "what is the same is left alone"

    (source / "..2").mkdir()
    (source / "..2/key").write_text("two")
    (source / "..data").unlink()
    (source / "..data").symlink_to("..2")
    for path in ("..1/sub/deep", "..1/key"):
        (source / path).unlink()
    (source / "..1/sub").rmdir()
    (source / "..1").rmdir()
    (source / "plain").write_text("x")
    source.chmod(0o750)
    bring_up_to_date(str(source), str(target))
    assert tree(target) == tree(source)
    assert stat.S_IMODE(target.stat().st_mode) == 0o750

    (source / "plain").unlink()
    (source / "plain").mkdir()
    (target / "left_tmp").write_text("of a copy that was cut short")
    bring_up_to_date(str(source), str(target))
    assert tree(target) == tree(source)


def test_the_link_moves_last_and_by_a_rename(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    bring_up_to_date(str(source), str(target))
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK)
    libc.inotify_add_watch(fd, os.fsencode(target), 0x100 | 0x200 | 0x80)  # CREATE, DELETE, MOVED_TO
    (source / "..2").mkdir()
    (source / "..2/key").write_text("two")
    (source / "..data").unlink()
    (source / "..data").symlink_to("..2")
    (source / "..1/key").unlink()
    bring_up_to_date(str(source), str(target))
    data, seen = os.read(fd, 65536), []
    os.close(fd)
    while data:
        _, mask, _, length = struct.unpack_from("iIII", data)
        seen.append((mask & 0xFFF, data[16 : 16 + length].rstrip(b"\0").decode()))
        data = data[16 + length :]

    assert seen == [(0x100, "..2"), (0x100, "..data_tmp"), (0x80, "..data")], (
        "what kubelet's own are on a host"
    )


def test_links_are_not_followed_and_sizes_are_bounded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    (source / "out").symlink_to("/etc")
    bring_up_to_date(str(source), str(target))
    assert os.readlink(target / "out") == "/etc"
    with pytest.raises(NotADirectoryError):
        bring_up_to_date(str(source / "out"), str(tmp_path / "other"))

    monkeypatch.setattr(watched, "MAX_BYTES", 6)
    with pytest.raises(RpcError, match="watched volume") as caught:
        bring_up_to_date(str(source), str(tmp_path / "third"))
    assert caught.value.code == Code.RESOURCE_EXHAUSTED
    monkeypatch.setattr(watched, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(watched, "MAX_ENTRIES", 5)
    with pytest.raises(RpcError, match="more than 5 entries"):
        bring_up_to_date(str(source), str(tmp_path / "fourth"))


async def test_as_a_storage(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mounted by two containers it is there until the second one goes; only what is there is brought up to
    date."""
    monkeypatch.setattr("agent.storage.storages.ROOTS", (f"{tmp_path}/",))
    target = tmp_path / "copy"
    storage = agent_pb2.Storage(driver="watchable-bind", source=str(source), mount_point=str(target))
    storages = Storages()
    with pytest.raises(RpcError) as missing:
        await storages.update([storage])
    assert missing.value.code == Code.NOT_FOUND

    first, second = await storages.add([storage]), await storages.add([storage])
    (source / "..1/new").write_text("new")
    await storages.update([storage])
    assert tree(target) == tree(source)
    await storages.release(first)
    assert target.is_dir()
    await storages.release(second)
    assert not target.exists()
    with pytest.raises(RpcError):
        await storages.add(
            [agent_pb2.Storage(driver="watchable-bind", source="/nope", mount_point=str(target))]
        )
    assert not target.exists()
    with pytest.raises(RpcError, match="cannot be updated"):
        await storages.update([agent_pb2.Storage(driver="blk", mount_point=str(target))])
