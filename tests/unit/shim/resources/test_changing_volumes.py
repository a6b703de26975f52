"""A volume that changes while it is copied never lends a file of the host, nor more than its bound."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from devices.errors import CallerError
from devices.syscalls import mount
from proto import agent_pb2
from shim.resources import copied_volumes
from shim.resources.copied_volumes import copy_volume
from shim.spec.guest_spec import Volume
from tests.unit.attacker import attacking
from tests.unit.shim.namespaces import in_mount_namespace
from tests.unit.steps import Steps

SECRET = b"only the host may read this"
MOST = 4096  # bytes that the volume may have


class Guest:
    """Takes what comes, and says so to `steps`: it is the guest that paces the copy."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.data = b""
        self.names: list[str] = []

    async def copy_file(self, request: agent_pb2.CopyFileRequest) -> None:
        self.steps.step()
        self.data += request.data
        self.names.append(request.path.rpartition("cid-volume")[2])


class Place:
    """A volume with one of each, and beside it what only the host may see."""

    def __init__(self, base: Path, *, recursive: bool = True) -> None:
        self.host = base / "host"
        self.host.mkdir(parents=True)
        (self.host / "b").write_bytes(SECRET)
        (self.host / "c").write_bytes(SECRET)
        self.tree = base / "tree"
        (self.tree / "d").mkdir(parents=True)
        for name in ("a", "b", "d/b", "d/c", "z"):
            (self.tree / name).write_text(f"content of {name}\n")
        (self.tree / "link").symlink_to("b")
        self.volume = Volume(0, str(self.tree), "/vol", True, recursive, "cid-volume")

    async def copy(self, steps: Steps) -> Guest:
        """With no more than a deadline's patience; a refusal is an answer, too."""
        guest = Guest(steps)
        async with asyncio.timeout(120):
            with contextlib.suppress(CallerError):
                await copy_volume(guest, self.volume)
        return guest


def _replace(path: Path) -> Path:
    """Nothing is there any more, as a rename would have it."""
    if path.is_dir() and not path.is_symlink():
        os.rename(path, path.with_name("was"))
    else:
        path.unlink()
    return path


CHANGES: dict[str, Callable[[Place], None]] = {
    "a file becomes a link": lambda p: _replace(p.tree / "b").symlink_to(p.host / "b"),
    "a file below becomes a link": lambda p: _replace(p.tree / "d/b").symlink_to("../../host/b"),
    "a directory becomes a link": lambda p: _replace(p.tree / "d").symlink_to(p.host),
    "the volume becomes a link": lambda p: _replace(p.tree).symlink_to(p.host),
    "a file becomes a magic link": lambda p: _replace(p.tree / "b").symlink_to(f"/proc/self/cwd/{p.host}/b"),
    "a file becomes a fifo": lambda p: os.mkfifo(_replace(p.tree / "b")),
    "a file becomes a device": lambda p: os.mknod(
        _replace(p.tree / "b"), 0o666 | stat.S_IFCHR, os.makedev(1, 5)
    ),
    "a file becomes large": lambda p: os.truncate(p.tree / "b", 1 << 40),
    "a file is another, large one": lambda p: os.truncate(_touch(_replace(p.tree / "d/c")), 1 << 40),
    "a directory becomes large": lambda p: _fill(p.tree),
}


def _fill(tree: Path) -> None:
    for number in range(9):
        os.truncate(_touch(tree / f"z{number}"), 999)


def _touch(path: Path) -> Path:
    path.touch()
    return path


@pytest.fixture(autouse=True)
def bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copied_volumes, "MAX_BYTES", MOST)


@pytest.mark.skipif(os.geteuid() != 0, reason="a device node needs root")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
async def test_at_whatever_step_it_changes(tmp_path: Path, change: Callable[[Place], None]) -> None:
    """Before each single system call, and each answer of the guest's, of one copy."""
    dry = Steps()
    with dry.counting():
        whole = await Place(tmp_path / "0").copy(dry)
    assert whole.names == ["", "/a", "/b", "/d", "/link", "/z", "/d/b", "/d/c"]
    assert dry.count > 30
    first = (
        2 if change is CHANGES["the volume becomes a link"] else 1
    )  # before that it is what the caller named
    for at in range(first, dry.count + 1):
        place = Place(tmp_path / str(at))
        steps = Steps(partial(change, place), at)
        with steps.counting():
            guest = await place.copy(steps)
        assert SECRET not in guest.data, f"step {at} of {dry.count}"
        assert len(guest.data) <= MOST, f"step {at} of {dry.count}"
        kinds = {stat.S_IFMT(mode) for mode in steps.opened}
        assert kinds <= {stat.S_IFREG, stat.S_IFDIR}, f"step {at} of {dry.count} opened {steps.opened}"


async def test_what_it_had_is_what_is_sent(tmp_path: Path) -> None:
    """A file that grows or shrinks under the reading has the size that was counted."""
    for size in (0, 1 << 40):
        place = Place(tmp_path / str(size))
        guest = Guest(Steps())
        sent = guest.copy_file

        async def then_change(request: agent_pb2.CopyFileRequest) -> None:
            if request.path.endswith("/a"):
                os.truncate(place.tree / "z", size)  # noqa: B023
            await sent(request)  # noqa: B023

        guest.copy_file = then_change  # type: ignore[method-assign]
        if size:
            with pytest.raises(CallerError, match=r"the mount at /vol \(.*\) has more than") as caught:
                await copy_volume(guest, place.volume)
            assert caught.value.code == "INVALID_ARGUMENT"
            assert guest.names == ["", "/a", "/b", "/d", "/link"]
        else:
            await copy_volume(guest, place.volume)
            assert guest.data.count(b"content of") == 4


async def test_what_vanishes_while_it_is_copied_is_told(tmp_path: Path) -> None:
    place = Place(tmp_path)
    steps = Steps(lambda: os.unlink(place.tree / "z"))

    class Leaving(Guest):
        async def copy_file(self, request: agent_pb2.CopyFileRequest) -> None:
            if request.path.endswith("/a"):
                os.unlink(place.tree / "z")
            await super().copy_file(request)

    with pytest.raises(CallerError, match="changed while it was copied: No such file") as caught:
        await copy_volume(Leaving(steps), place.volume)
    assert (caught.value.code, caught.value.hint) == ("UNAVAILABLE", "try again")


@pytest.mark.parametrize("recursive", [True, False])
def test_mounts_below_it_are_copied_only_where_they_are_meant(tmp_path: Path, recursive: bool) -> None:
    """`rbind` has them, `bind` has what they cover; also when they come at any step."""

    def body() -> None:
        async def both() -> None:
            dry = Steps()
            with dry.counting():
                await Place(tmp_path / "0", recursive=recursive).copy(dry)
            for at in range(2, dry.count + 1):
                place = Place(tmp_path / str(at), recursive=recursive)
                steps = Steps(partial(mount, str(place.host), str(place.tree / "d"), "", 0x1000, ""), at)
                with steps.counting():
                    guest = await place.copy(steps)
                assert recursive or SECRET not in guest.data, f"step {at} of {dry.count}"
            place = Place(tmp_path / "last", recursive=recursive)
            mount(str(place.host), str(place.tree / "d"), "", 0x1000, "")
            assert (SECRET in (await place.copy(Steps())).data) == recursive

        asyncio.run(both())

    in_mount_namespace(body)


async def test_a_racing_writer_gets_nothing_of_the_host(tmp_path: Path) -> None:
    """Thousands of changes beside the copy, by somebody who waits for nobody."""
    place = Place(tmp_path)
    new = place.tree.parent / "new"

    def swap(_number: int) -> None:
        for name, target in (("b", place.host / "b"), ("d", place.host), ("d/b", place.host / "b")):
            with contextlib.suppress(OSError):
                os.symlink(target, new)
                with contextlib.suppress(IsADirectoryError):
                    os.rename(new, place.tree / name)
                if new.is_symlink():  # a directory was in its place
                    os.rename(place.tree / name, place.tree / "was")
                    os.rename(new, place.tree / name)
                    os.unlink(place.tree / name)
                    os.rename(place.tree / "was", place.tree / name)
                else:
                    new.write_text("content")
                    os.rename(new, place.tree / name)
            with contextlib.suppress(OSError):
                os.unlink(new)

    copies = 0
    with attacking(swap) as changed:
        end = time.monotonic() + 120  # some two seconds on a quiet machine
        while copies < 200 or changed() < 300:
            assert time.monotonic() < end, (copies, changed())
            guest = await place.copy(Steps())
            assert SECRET not in guest.data
            copies += 1
