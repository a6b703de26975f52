"""A volume that stands for a disk is found, checked, plugged once, and bound from where it is mounted."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from devices.config import BlockConfig, DeviceConfig
from devices.errors import CallerError, HostError, HypervisorError, KataError
from devices.holdings import Holdings
from devices.manager import DeviceManager
from devices.undo import MemoryUndo
from proto import csi_pb2
from shim.resources.direct_volumes import Assigned, DirectVolumes, check, find, rewrite
from shim.resources.disks import DiskStyle
from shim.spec.guest_spec import plan_volumes


class Assignments:
    """The directory in which the storage driver says what is assigned."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "direct-volumes"
        self.directory.mkdir()
        self.disk = directory / "disk.img"
        self.disk.write_bytes(bytes(4096))

    def say(self, source: str, text: str | dict[str, Any]) -> None:
        folder = self.directory / base64.urlsafe_b64encode(source.encode()).decode()
        folder.mkdir()
        (folder / "mountInfo.json").write_text(text if isinstance(text, str) else json.dumps(text))

    def assign(self, source: str, **changes: Any) -> None:
        info = {"volume-type": "block", "device": str(self.disk), "fstype": "ext4", "options": ["noatime"]}
        self.say(source, info | changes)

    def find(self, *mounts: dict[str, Any]) -> dict[int, Assigned]:
        return find(plan_volumes({"mounts": list(mounts)}, "c"), str(self.directory))


@pytest.fixture
def given(tmp_path: Path) -> Assignments:
    return Assignments(tmp_path)


def bind(source: str, *options: str) -> dict[str, Any]:
    return {"destination": "/vol", "type": "bind", "source": source, "options": ["rbind", *options]}


PROC = {"destination": "/proc", "type": "proc", "source": "proc"}


def test_only_what_is_assigned_is_found(given: Assignments) -> None:
    given.assign("/var/vol", metadata={"fsGroup": "1000", "fsGroupChangePolicy": "OnRootMismatch"})
    found = given.find(PROC, bind("/etc/hosts"), bind("/var/vol"), bind("/x" * 400))

    assert list(found) == [2]
    volume = found[2]
    assert (volume.device, volume.fstype, volume.options) == (str(given.disk), "ext4", ("noatime",))
    assert (volume.read_only, volume.group, volume.only_if_needed) == (False, 1000, True)
    assert find([], "/nope") == {}


@pytest.mark.parametrize("where", ["mount", "info"])
def test_read_only_is_so_for_the_disk_too(given: Assignments, where: str) -> None:
    given.assign("/var/vol", options=["ro"] if where == "info" else [])
    (volume,) = given.find(bind("/var/vol", *(["ro"] if where == "mount" else []))).values()

    assert (volume.read_only, volume.options) == (True, ("ro",))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"volume-type": "spoolvol"}, CallerError, "type 'spoolvol'"),
        ({"volume-type": "spdkvol", "device": "disk.img"}, HostError, "is no socket"),
        ({"device": "/nope/disk"}, HostError, "/nope/disk, named by"),
        ({"device": "disk.img"}, HostError, "neither a disk nor an image"),
        ({"device": "/dev/null"}, HostError, "neither a disk nor an image"),
        ({"device": 7}, HostError, "is no mountInfo"),
        ({"options": [1]}, HostError, r"options\[0\] must be a string, not 1"),
        ({"metadata": []}, HostError, "metadata must be an object"),
        ({"metadata": {"fsGroup": 7}}, HostError, "metadata.fsGroup must be a string"),
        *(
            ({"metadata": {"fsGroup": group}}, HostError, "metadata.fsGroup must be a number from 0 to 42949")
            for group in ("many", "-1", "1_0", " 7", "\u0667", "4294967295", str(10**30), "9" * 5000)
        ),
    ],
)
def test_what_cannot_be_used_is_told(
    given: Assignments, changes: dict[str, Any], error: type[KataError], text: str
) -> None:
    given.assign("/var/vol", **changes)
    with pytest.raises(error, match=text):
        given.find(bind("/var/vol"))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"volume-type": "block"}', '{"device": "/a", "Device": "/b"}', "[" * 1000]
)
def test_nonsense_is_told_with_its_path(given: Assignments, text: str) -> None:
    given.say("/var/vol", text)
    with pytest.raises(HostError, match=r"direct-volumes/L3Zhci92b2w=/mountInfo.json is no mountInfo"):
        given.find(bind("/var/vol"))


@pytest.mark.timeout(30)
def test_what_is_no_file_or_too_large_is_not_read(given: Assignments) -> None:
    given.say("/var/vol", " " * (1 << 17))
    with pytest.raises(HostError, match=r"cannot read .*mountInfo.json: it has more than 65536 bytes"):
        given.find(bind("/var/vol"))
    path = next(given.directory.rglob("mountInfo.json"))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(HostError, match=r"cannot read .*mountInfo.json: it is no regular file"):
        given.find(bind("/var/vol"))


def test_keys_in_other_letters_are_the_same_keys(given: Assignments) -> None:
    """Kata's runtime is written in Go, whose decoder takes them."""
    given.assign("/var/vol")
    path = next(given.directory.rglob("mountInfo.json"))
    path.write_text(path.read_text().replace('"device"', '"Device"').replace('"options"', '"OPTIONS"'))

    (found,) = given.find(bind("/var/vol")).values()
    assert found.device.startswith("/")


@pytest.mark.skipif(os.geteuid() != 0, reason="mknod needs root")
def test_a_disk_that_is_mounted_on_the_host_is_refused(given: Assignments, tmp_path: Path) -> None:
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    number = next((line[2] for line in lines if not line[2].startswith("0:")), "")
    if not number:
        pytest.skip("nothing here is mounted from a block device")
    major, minor = map(int, number.split(":"))
    os.mknod(tmp_path / "node", 0o600 | stat.S_IFBLK, os.makedev(major, minor))
    given.assign("/var/vol", device=str(tmp_path / "node"))
    with pytest.raises(CallerError, match="is in use on this host: mounted at /"):
        check(plan_volumes({"mounts": [bind("/var/vol")]}, "c"), str(given.directory))


def test_the_spec_binds_it_from_where_the_guest_mounts_it(given: Assignments) -> None:
    given.assign("/var/vol")
    found = given.find(PROC, bind("/var/vol", "nosuid"))
    document = {"mounts": [dict(PROC), bind("/var/vol", "nosuid")]}
    rewrite(document, found)

    assert document["mounts"][0] == PROC
    mount = document["mounts"][1]
    assert mount["source"].startswith("/run/kata-containers/sandbox/storage/")
    assert (mount["type"], mount["options"]) == ("bind", ["rbind", "nosuid"])


class Vm:
    """Plugs disks; `refuses` the ones with this path."""

    def __init__(self) -> None:
        self.plugged: list[str] = []
        self.updated: list[str] = []
        self.refuses = ""

    async def add_device(self, device: DeviceConfig) -> str:
        assert isinstance(device, BlockConfig)
        if device.path == self.refuses:
            raise HypervisorError("no")
        self.plugged.append(device.path)
        return f"02/{len(self.plugged):02x}"

    async def remove_device(self, device_id: str) -> None:
        self.plugged.pop()

    async def update_device(self, device: DeviceConfig) -> None:
        assert isinstance(device, BlockConfig)
        self.updated.append(device.path)


def volumes_of(given: Assignments, manager: DeviceManager, holdings: Holdings) -> DirectVolumes:
    return DirectVolumes(
        manager,
        holdings,
        MemoryUndo(),
        alias="sandbox1",
        style=DiskStyle(),
        directory=str(given.directory),
    )


class Agent:
    """What the guest was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    async def volume_stats(self, path: str) -> csi_pb2.VolumeStatsResponse:
        self.calls.append(("stats", path))
        answer = csi_pb2.VolumeStatsResponse()
        answer.usage.add(available=1, total=3, used=2, unit=csi_pb2.VolumeUsage.BYTES)
        return answer

    async def resize_volume(self, path: str, size: int) -> None:
        self.calls.append(("resize", path, size))


async def test_a_volume_in_use_says_whose_it_is_and_is_found_by_path_or_disk(given: Assignments) -> None:
    given.assign("/var/vol")
    (found,) = given.find(bind("/var/vol")).values()
    manager, vm, agent = DeviceManager(), Vm(), Agent()
    holdings = Holdings(manager, vm)
    volumes = volumes_of(given, manager, holdings)
    await volumes.add("a", {0: found})
    await volumes.add("b", {0: found})
    (folder,) = given.directory.iterdir()

    assert sorted(path.name for path in folder.iterdir()) == ["mountInfo.json", "sandbox1"]
    for name in ("/var/vol", str(given.disk)):
        assert (await volumes.stats(name, agent)).usage[0].used == 2
    assert agent.calls == [("stats", found.mount_point)] * 2
    await volumes.remove("a")
    assert (folder / "sandbox1").exists()
    await volumes.remove("b")
    assert not (folder / "sandbox1").exists()
    with pytest.raises(CallerError, match="no volume '/var/vol' is in this sandbox"):
        await volumes.stats("/var/vol", agent)


async def test_an_image_grows_before_the_disk_and_the_disk_before_the_file_system(
    given: Assignments,
) -> None:
    given.assign("/var/vol")
    found, manager, vm, agent = given.find(bind("/var/vol")), DeviceManager(), Vm(), Agent()
    volumes = volumes_of(given, manager, Holdings(manager, vm))
    await volumes.add("a", found)
    await volumes.resize("/var/vol", 8192, agent, vm)

    assert given.disk.stat().st_size == 8192
    assert vm.updated == [str(given.disk)]
    assert agent.calls == [("resize", found[0].mount_point, 8192)]
    with pytest.raises(CallerError, match="does not shrink to 4096"):
        await volumes.resize("/var/vol", 4096, agent, vm)
    for size in (0, -512, 8193, 1 << 61):
        with pytest.raises(CallerError, match="are no size for a disk"):
            await volumes.resize("/var/vol", size, agent, vm)
    assert given.disk.stat().st_size == 8192


@pytest.mark.parametrize(
    ("changes", "why"), [({"fstype": "erofs"}, "erofs cannot grow"), ({"options": ["ro"]}, "it is read-only")]
)
async def test_what_cannot_grow_is_told_before_anything_is_done(
    given: Assignments, changes: dict[str, Any], why: str
) -> None:
    given.assign("/var/vol", **changes)
    manager, vm = DeviceManager(), Vm()
    volumes = volumes_of(given, manager, Holdings(manager, vm))
    await volumes.add("a", given.find(bind("/var/vol")))
    with pytest.raises(CallerError, match=why):
        await volumes.resize("/var/vol", 1 << 20, Agent(), vm)
    assert given.disk.stat().st_size == 4096


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFCHR])
async def test_an_image_that_has_become_something_else_is_not_opened(given: Assignments, kind: int) -> None:
    """A FIFO would wait for ever, a device would act."""
    given.assign("/var/vol")
    manager, vm = DeviceManager(), Vm()
    volumes = volumes_of(given, manager, Holdings(manager, vm))
    await volumes.add("a", given.find(bind("/var/vol")))
    given.disk.unlink()
    os.mknod(given.disk, 0o600 | kind, os.makedev(1, 5) if kind == stat.S_IFCHR else 0)
    with pytest.raises(HostError, match="cannot grow: it is neither a disk nor an image"):
        async with asyncio.timeout(60):
            await volumes.resize("/var/vol", 8192, Agent(), vm)


async def test_a_clone_of_an_xfs_can_be_mounted_beside_it(given: Assignments) -> None:
    given.assign("/var/vol", fstype="xfs", options=[])
    manager = DeviceManager()
    volumes = volumes_of(given, manager, Holdings(manager, Vm()))
    (storage,) = await volumes.add("a", given.find(bind("/var/vol")))
    assert list(storage.options) == ["nouuid"]


async def test_containers_share_a_disk_and_the_last_one_unplugs_it(given: Assignments) -> None:
    given.assign("/var/vol", metadata={"fsGroup": "7"})
    found, vm = given.find(bind("/var/vol")), Vm()
    manager = DeviceManager()
    holdings = Holdings(manager, vm)
    volumes = volumes_of(given, manager, holdings)
    first = await volumes.add("a", found)
    second = await volumes.add("b", found)

    assert first == second
    storage = first[0]
    assert (storage.driver, storage.source, storage.fstype) == ("blk", "02/01", "ext4")
    assert (list(storage.options), storage.fs_group.group_id) == (["noatime"], 7)
    assert storage.mount_point == found[0].mount_point
    assert vm.plugged == [str(given.disk)]
    assert await holdings.release("a") == []
    assert len(vm.plugged) == 1
    assert await holdings.release("b") == await holdings.release("b") == []
    assert vm.plugged == []


async def test_what_was_plugged_before_an_error_goes_again(given: Assignments, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(4096))
    given.assign("/var/one")
    given.assign("/var/two", device=str(other))
    vm = Vm()
    vm.refuses = str(other)
    manager = DeviceManager()
    holdings = Holdings(manager, vm)
    volumes = volumes_of(given, manager, holdings)
    with pytest.raises(HypervisorError):
        await volumes.add("a", given.find(bind("/var/one"), bind("/var/two")))

    assert await holdings.release("a") == []
    assert vm.plugged == []
