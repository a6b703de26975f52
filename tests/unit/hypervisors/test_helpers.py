"""What serves a device is watched: whose end is the VM's, whose is not, and when it is none at all."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from devices.config import DeviceConfig, ShareFsConfig, VhostUserBlkConfig, VhostUserNetConfig
from devices.errors import HypervisorError
from hypervisors.helpers import Helpers

DISK = VhostUserBlkConfig(id="disk", path="/nope")
SHARE = ShareFsConfig(id="share", source="/nope")
CARD = VhostUserNetConfig(id="card", path="/nope", mac="02:00:00:00:00:01")


class Stub:
    """A helper that does what the test says."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.lost: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.stopped = 0
        self.pids = [7]
        self.inside = False

    def describe_loss(self) -> str:
        return f"{self.name} is gone"

    def evidence(self) -> dict[str, str]:
        return {self.name: "its words"}

    def handed_over(self) -> None:
        pass

    def abort(self) -> None:
        pass

    async def stop(self) -> None:
        self.stopped += 1


class Watched:
    def __init__(self) -> None:
        self.helpers = Helpers()
        self.losses: list[str] = []
        self.helpers.on_loss = self.losses.append

    def add(self, device: DeviceConfig) -> Stub:
        stub = Stub(device.id)
        self.helpers.add(device, stub)
        return stub


@pytest.mark.parametrize("device", [DISK, SHARE])
async def test_the_end_of_what_the_guest_waits_for_is_told(device: DeviceConfig) -> None:
    watched = Watched()
    watched.add(device).lost.set_result(None)
    await asyncio.sleep(0)
    assert watched.losses == [f"{device.id} is gone"]


async def test_a_cards_end_is_logged_only() -> None:
    watched = Watched()
    watched.add(CARD).lost.set_result(None)
    await asyncio.sleep(0)
    assert watched.losses == []


async def test_what_ends_with_its_device_is_no_loss() -> None:
    watched = Watched()
    stub = watched.add(DISK)
    with watched.helpers.unsettled("disk"):
        stub.lost.set_result(None)
        await asyncio.sleep(0)
        await watched.helpers.end("disk")
    assert (watched.losses, stub.stopped) == ([], 1)
    await watched.helpers.end("disk")
    assert watched.helpers.of("disk") is None


async def test_what_ended_while_its_device_stayed_is_one_afterwards() -> None:
    """An unplug that fails: the guest has the disk still, and nobody serves it."""
    watched = Watched()
    stub = watched.add(DISK)
    with pytest.raises(HypervisorError), watched.helpers.unsettled("disk"):
        stub.lost.set_result(None)
        await asyncio.sleep(0)
        assert watched.losses == []
        raise HypervisorError("the guest did not let go")
    assert watched.losses == ["disk is gone"]


async def test_an_earlier_one_of_the_same_id_is_none() -> None:
    watched = Watched()
    first = watched.add(DISK)
    watched.add(DISK)
    first.lost.set_result(None)
    await asyncio.sleep(0)
    assert watched.losses == []


async def test_their_words_outlive_them() -> None:
    watched = Watched()
    stubs = [watched.add(DISK), watched.add(CARD)]
    assert watched.helpers.pids() == [7, 7]
    await watched.helpers.end_all()
    await watched.helpers.end_all()
    assert [stub.stopped for stub in stubs] == [1, 1]
    assert watched.helpers.evidence() == {"disk": "its words", "card": "its words"}
