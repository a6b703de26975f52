"""Mount options, PCI paths and device entries mean the same in the guest as on the host."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from agent.storage import blockdev
from agent.storage.blockdev import (
    find_device,
    pci_directory,
    resolve_devices,
    wait_for_address,
    wait_for_link,
    wait_for_size,
)
from agent.storage.mounts import mounts_below, parse_options
from agent.storage.storages import Storages
from proto import agent_pb2
from ttrpc import Code, RpcError


def test_mount_options() -> None:
    assert parse_options(["nosuid", "nodev", "ro", "size=1m", "mode=755"]) == (7, "size=1m,mode=755")
    assert parse_options(["ro", "rw", "rbind", "defaults"]) == (4096 | 16384, "")


def test_mounts_below(tmp_path: Path) -> None:
    info = tmp_path / "mountinfo"
    info.write_text(
        "1 0 0:1 / / rw - ext4 /dev/vda rw\n"
        "2 1 0:2 / /run/a rw - tmpfs a rw\n"
        "3 2 0:3 / /run/a/b\\040c rw - tmpfs b rw\n"
        "4 1 0:4 / /run/ab rw - tmpfs c rw\n"
    )

    assert mounts_below("/run/a", str(info)) == ["/run/a/b c", "/run/a"]


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its disks have their nodes, unless the test takes them away."""
    monkeypatch.setattr(blockdev, "_there", lambda node: True)
    root = tmp_path / "devices/pci0000:00"
    (root / "0000:00:02.0/virtio3/block/vdb").mkdir(parents=True)
    behind = root / "0000:00:03.0"
    (behind / "pci_bus/0000:07").mkdir(parents=True)
    (behind / "0000:07:0a.1/virtio4/block/vdc").mkdir(parents=True)
    (root / "0000:00:05.0/virtio6/net/eth0").mkdir(parents=True)
    (tmp_path / "class/scsi_device/2:0:1:5/device/block/sdb").mkdir(parents=True)
    return tmp_path


def test_pci_paths(sysfs: Path) -> None:
    base = f"{sysfs}/devices/pci0000:00"

    assert pci_directory("02", str(sysfs)) == f"{base}/0000:00:02.0"
    assert pci_directory("03/0a.1", str(sysfs)) == f"{base}/0000:00:03.0/0000:07:0a.1"
    assert pci_directory("04", str(sysfs)) is None
    assert pci_directory("02/01", str(sysfs)) is None
    for wrong in ("", "../..", "02/", "zz", "0x"):
        with pytest.raises(RpcError):
            pci_directory(wrong, str(sysfs))


async def test_devices_that_are_there(sysfs: Path) -> None:
    assert await find_device("blk", "02", sysfs=str(sysfs)) == "/dev/vdb"
    assert await find_device("blk", "03/0a.1", sysfs=str(sysfs)) == "/dev/vdc"
    assert await find_device("scsi", "1:5", sysfs=str(sysfs)) == "/dev/sdb"
    assert await find_device("mmioblk", "/dev/null") == "/dev/null"


async def test_a_disk_without_its_node_is_waited_for(sysfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its container would be refused the node otherwise, now and then on a busy host."""
    monkeypatch.setattr(blockdev, "_there", lambda node: False)
    for driver, source in (("blk", "02"), ("scsi", "1:5")):
        with pytest.raises(RpcError, match="appeared within"):
            await find_device(driver, source, sysfs=str(sysfs), timeout=0.05)


async def test_a_memory_disk_is_found_by_its_slot(sysfs: Path) -> None:
    """Whatever number the kernel gave it."""
    nd = sysfs / "bus/nd/devices"
    for number, slot in ((0, 3), (1, 0)):
        (nd / f"region{number}/pfn{number}/block/pmem{number}").mkdir(parents=True)
        (nd / f"region{number}/mapping0").write_text(f"nmem{number},0,4096\n")
        (nd / f"nmem{number}/nfit").mkdir(parents=True)
        (nd / f"nmem{number}/nfit/handle").write_text(f"{slot + 1:#x}\n")
    assert await find_device("nvdimm", "/dev/pmem3", sysfs=str(sysfs)) == "/dev/pmem0"
    assert await find_device("nvdimm", "/dev/pmem0", sysfs=str(sysfs)) == "/dev/pmem1"
    with pytest.raises(RpcError):
        await find_device("nvdimm", "/dev/pmem1", sysfs=str(sysfs), timeout=0.05)


async def test_a_network_card_is_waited_for_by_its_path(sysfs: Path) -> None:
    await wait_for_link("05", sysfs=str(sysfs))
    with pytest.raises(RpcError, match=r"no network card 02 appeared within 0.05 s"):
        await wait_for_link("02", sysfs=str(sysfs), timeout=0.05)


async def test_a_network_card_is_waited_for_by_its_address(
    sysfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card without a PCI path (microvm) was "no interface" where its driver came after the agent."""
    events: list[float] = []

    async def on_uevent(look: Any, timeout: float) -> object:
        events.append(timeout)
        if timeout < 1:
            raise TimeoutError
        assert look() is None
        (sysfs / "class/net/eth0").mkdir(parents=True)
        (sysfs / "class/net/gone").mkdir()
        (sysfs / "class/net/eth0/address").write_text("02:00:00:00:00:0a\n")
        return look()

    monkeypatch.setattr(blockdev, "on_uevent", on_uevent)
    await wait_for_address("02:00:00:00:00:0A", sysfs=str(sysfs), timeout=9)
    await wait_for_address("02:00:00:00:00:0a", sysfs=str(sysfs), timeout=9)
    await wait_for_address("02:00:00:00:00:0b", sysfs=str(sysfs), timeout=0.5)

    assert events == [9, 0.5]


async def test_a_device_that_never_comes(sysfs: Path) -> None:
    with pytest.raises(RpcError) as caught:
        await find_device("blk", "09", sysfs=str(sysfs), timeout=0.05)

    assert caught.value.code == Code.NOT_FOUND


@pytest.mark.parametrize(
    ("driver", "source", "code"),
    [
        ("scsi", "a:b", Code.INVALID_ARGUMENT),
        ("mmioblk", "/dev/../etc/passwd", Code.INVALID_ARGUMENT),
        ("nvdimm", "pmem0", Code.INVALID_ARGUMENT),
        ("blk-ccw", "fe.0.0001", Code.UNIMPLEMENTED),
    ],
)
async def test_sources_that_are_none(driver: str, source: str, code: Code) -> None:
    with pytest.raises(RpcError) as caught:
        await find_device(driver, source, timeout=0.01)

    assert caught.value.code == code


async def test_a_device_gets_the_guests_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def null(*_: Any) -> str:
        return "/dev/null"

    monkeypatch.setattr(blockdev, "find_device", null)
    linux: dict[str, Any] = {
        "devices": [{"path": "/dev/data", "type": "c", "major": 8, "minor": 16}],
        "resources": {
            "devices": [
                {"allow": False, "access": "rwm"},
                {"allow": True, "type": "c", "major": 8, "minor": 16, "access": "rw"},
                {"allow": True, "type": "c", "major": 8, "minor": 17, "access": "rw"},
            ]
        },
    }
    await resolve_devices([agent_pb2.Device(type="blk", id="02", container_path="/dev/data")], linux)

    number = os.stat("/dev/null").st_rdev
    assert linux["devices"][0]["major"] == os.major(number)
    assert linux["resources"]["devices"][1]["minor"] == os.minor(number)
    assert linux["resources"]["devices"][2]["minor"] == 17
    with pytest.raises(RpcError):
        await resolve_devices([agent_pb2.Device(type="blk", id="02", container_path="/dev/other")], linux)


@pytest.mark.parametrize("target", ["/etc", "/run/kata-containers", "/run/kata-containers/../x", "", "x"])
async def test_a_storage_cannot_cover_the_guest(target: str) -> None:
    storage = agent_pb2.Storage(driver="ephemeral", source="tmpfs", fstype="tmpfs", mount_point=target)
    with pytest.raises(RpcError) as caught:
        await Storages().add([storage])

    assert caught.value.code == Code.INVALID_ARGUMENT


async def test_an_unknown_driver_is_named() -> None:
    storage = agent_pb2.Storage(driver="image_guest_pull", mount_point="/run/kata-containers/x")
    with pytest.raises(RpcError, match="image_guest_pull") as caught:
        await Storages().add([storage])

    assert caught.value.code == Code.UNIMPLEMENTED


async def test_a_storage_is_used_until_its_last_user_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    async def driver(storage: agent_pb2.Storage) -> None:
        await asyncio.sleep(0)
        done.append(f"mount {storage.mount_point[-1]}")
        if storage.source == "bad":
            raise RpcError(Code.INTERNAL, "bad")

    monkeypatch.setattr("agent.storage.storages._DRIVERS", {"d": driver})
    monkeypatch.setattr("agent.storage.storages._unmount", lambda path: done.append(f"umount {path[-1]}"))
    base = "/run/kata-containers"
    one, two = (agent_pb2.Storage(driver="d", mount_point=f"{base}/{name}") for name in "ab")
    storages = Storages()
    first = await storages.add([one, two])
    second = await storages.add([one])
    await storages.release(first)
    await storages.release(second)
    with pytest.raises(RpcError):
        await storages.add([one, agent_pb2.Storage(driver="d", mount_point=f"{base}/c", source="bad")])

    assert done == ["mount a", "mount b", "umount b", "umount a", "mount a", "mount c", "umount a"]


async def test_a_disk_in_a_slot_is_waited_for_until_it_has_its_size(tmp_path: Path) -> None:
    size = tmp_path / "class/block/vdb/size"
    size.parent.mkdir(parents=True)
    size.write_text("8\n")
    await wait_for_size("/dev/vdb", 4096, sysfs=str(tmp_path))
    with pytest.raises(RpcError, match="did not come to have 8192 bytes") as caught:
        await wait_for_size("/dev/vdb", 8192, sysfs=str(tmp_path), timeout=0.05)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
