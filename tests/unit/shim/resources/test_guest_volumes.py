"""What kubelet rewrites is copied in the guest, and copied again when it changes; the rest stays shared."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from devices.errors import GuestError
from proto import agent_pb2
from shim.resources.guest_volumes import GuestVolumes, Own
from shim.spec.guest_spec import plan_volumes


class Kubelet:
    """A config map's volume as the atomic writer makes it."""

    def __init__(self, directory: Path, kind: str = "configmap") -> None:
        self.path = directory / f"pods/7e1c/volumes/kubernetes.io~{kind}/conf"
        self.path.mkdir(parents=True)
        self._number = 0
        self.write("first")
        (self.path / "key").symlink_to("..data/key")

    def write(self, text: str) -> None:
        """A new state of the only key."""
        old, new = f"..{self._number}", f"..{self._number + 1}"
        self._number += 1
        (self.path / new).mkdir()
        (self.path / new / "key").write_text(text)
        os.symlink(new, self.path / "..data_tmp")
        os.rename(self.path / "..data_tmp", self.path / "..data")
        if (self.path / old).exists():
            (self.path / old / "key").unlink()
            (self.path / old).rmdir()


class Agent:
    """Keeps what it is told; `fails` once."""

    def __init__(self) -> None:
        self.told: list[list[str]] = []
        self.heard = asyncio.Event()
        self.fails = False

    async def copy_again(self, storages: Sequence[agent_pb2.Storage]) -> None:
        self.told.append([storage.mount_point for storage in storages])
        self.heard.set()
        if self.fails:
            self.fails = False
            raise GuestError("no")

    async def hears(self) -> None:
        async with asyncio.timeout(30):
            await self.heard.wait()
        self.heard.clear()


def spec(*sources: Path) -> dict[str, Any]:
    mounts = [
        {"destination": f"/v{number}", "type": "bind", "source": str(path), "options": ["rbind", "ro"]}
        for number, path in enumerate(sources)
    ]
    return {"mounts": mounts}


@pytest.fixture
def make() -> Callable[..., tuple[GuestVolumes, Agent]]:
    tasks = set()

    def _make(*, live: bool = True, stock: bool = False) -> tuple[GuestVolumes, Agent]:
        agent = Agent()
        return GuestVolumes(
            lambda: agent, lambda work: tasks.add(asyncio.ensure_future(work)), live=live, stock=stock
        ), agent

    return _make


async def find(volumes: GuestVolumes, document: dict[str, Any]) -> Own:
    return await volumes.find(plan_volumes(document, "c1"), document)


@pytest.mark.parametrize("kind", ["configmap", "secret", "projected", "downward-api"])
async def test_what_kubelet_rewrites_is_a_copy(
    tmp_path: Path, make: Callable[..., tuple[GuestVolumes, Agent]], kind: str
) -> None:
    volumes, _ = make()
    document = spec(tmp_path, Kubelet(tmp_path, kind).path)
    own = await find(volumes, document)
    own.rewrite(document)

    (storage,) = own.storages
    assert [volume.index for volume in own.shared] == [0, 1], "the agent copies from the share"
    assert (storage.driver, storage.source) == ("watchable-bind", own.shared[1].guest_path)
    assert document["mounts"][0]["source"] == str(tmp_path)
    assert document["mounts"][1]["source"] == storage.mount_point
    assert document["mounts"][1]["options"] == ["rbind", "ro"]
    assert own.words == {storage.mount_point: str(own.shared[1].source)}


async def test_others_stay_shared(tmp_path: Path, make: Callable[..., tuple[GuestVolumes, Agent]]) -> None:
    volumes, _ = make()
    plain = Kubelet(tmp_path, "empty-dir").path
    below = Kubelet(tmp_path / "sub").path / "key"
    by_hand = tmp_path / "hand/volumes/kubernetes.io~secret/s"
    by_hand.mkdir(parents=True)
    large = Kubelet(tmp_path / "large").path
    (large / "..1/big").write_bytes(bytes(5 << 20))
    document = spec(plain, below, by_hand, large, tmp_path / "missing")
    own = await find(volumes, document)

    assert [volume.index for volume in own.shared] == [0, 1, 2, 3, 4]
    assert own.storages == []
    assert await find(volumes, {}) == Own()
    copied, _ = make(live=False)  # the whole of it was a copy already
    assert (await find(copied, spec(Kubelet(tmp_path / "x").path))).storages == []


async def test_a_change_is_told_once_to_who_uses_it(
    tmp_path: Path, make: Callable[..., tuple[GuestVolumes, Agent]]
) -> None:
    volumes, agent = make()
    kubelet = Kubelet(tmp_path)
    own = await find(volumes, spec(kubelet.path))
    for name in ("c1", "c2"):
        volumes.begin(name, own)
    place = own.storages[0].mount_point

    agent.fails = True  # a guest that is busy with something else misses one, and hears of the next
    for text in ("second", "third"):
        kubelet.write(text)
        await agent.hears()
    assert {mount for told in agent.told for mount in told} == {place}

    volumes.remove("c1")
    kubelet.write("fourth")
    await agent.hears()
    volumes.remove("c2")
    volumes.remove("c2")
    count = len(agent.told)
    kubelet.write("fifth")
    await asyncio.sleep(0)
    volumes.close()
    volumes.close()
    assert len(agent.told) == count


async def test_an_agent_of_katas_looks_for_itself(
    tmp_path: Path, make: Callable[..., tuple[GuestVolumes, Agent]]
) -> None:
    volumes, agent = make(stock=True)
    kubelet = Kubelet(tmp_path)
    own = await find(volumes, spec(kubelet.path))
    volumes.begin("c1", own)
    kubelet.write("second")
    await asyncio.sleep(0)

    assert len(own.storages) == 1
    assert agent.told == []
