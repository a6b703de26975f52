"""A slot has one user, the kinds are kept apart, and a slot that could not be filled is free again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from devices.config import BlockConfig
from devices.errors import HypervisorError
from devices.undo import MemoryUndo
from hypervisors.firecracker.config import FirecrackerConfig
from hypervisors.firecracker.drives import EMPTY, Drives
from hypervisors.firecracker.jail import Den
from hypervisors.http_api import HttpApi


class Api(HttpApi):
    """Takes the calls down, or refuses them."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.refuse = False

    async def request(
        self, method: str, path: str, body: Any, *, timeout: float, fds: Sequence[int] = ()
    ) -> Any:
        assert timeout > 0
        assert not fds
        if self.refuse:
            raise HypervisorError("refused")
        self.calls.append((f"{method} {path}", body["path_on_host"]))


async def _drives(tmp_path: Path, slots: int = 1) -> Drives:
    drives = Drives(FirecrackerConfig(block_device_slots=slots), Den.plain(str(tmp_path), MemoryUndo()))
    calls = await drives.boot_with([BlockConfig(id="image", path="/img", read_only=True)])
    assert [(call.path, call.body["path_on_host"], call.body["is_read_only"]) for call in calls] == [
        ("/drives/drive0", "/img", True),
        *((f"/drives/drive{1 + n}", EMPTY, True) for n in range(slots)),
        *((f"/drives/drive{1 + slots + n}", EMPTY, False) for n in range(slots)),
    ]
    return drives


async def test_disks_come_and_go(tmp_path: Path) -> None:
    drives, api = await _drives(tmp_path), Api()
    assert await drives.fill(BlockConfig(id="a", path="/a"), api) == "/dev/vdc"
    assert await drives.fill(BlockConfig(id="b", path="/b", read_only=True), api) == "/dev/vdb"
    assert drives.has("a")
    with pytest.raises(
        HypervisorError, match="no free slot for the writable disk c: this VM has 1"
    ) as caught:
        await drives.fill(BlockConfig(id="c", path="/c"), api)
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    assert await drives.announce(BlockConfig(id="a", path="/a"), api)
    assert await drives.empty("a", api)
    assert not await drives.empty("a", api)
    assert not await drives.announce(BlockConfig(id="a", path="/a"), api)
    assert await drives.fill(BlockConfig(id="c", path="/c"), api) == "/dev/vdc"
    assert api.calls == [
        ("PATCH /drives/drive2", "/a"),
        ("PATCH /drives/drive1", "/b"),
        ("PATCH /drives/drive2", "/a"),
        ("PATCH /drives/drive2", EMPTY),
        ("PATCH /drives/drive2", "/c"),
    ]


async def test_what_is_refused_changes_nothing(tmp_path: Path) -> None:
    drives, api = await _drives(tmp_path), Api()
    api.refuse = True
    with pytest.raises(HypervisorError, match="refused"):
        await drives.fill(BlockConfig(id="a", path="/a"), api)
    assert not drives.has("a")
    api.refuse = False
    await drives.fill(BlockConfig(id="b", path="/b"), api)
    api.refuse = True
    with pytest.raises(HypervisorError, match="refused"):
        await drives.empty("b", api)
    assert drives.has("b")
