"""A device that was passed to the VM becomes the container's: by the guest's own driver, or by vfio-pci."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import vfio
from agent.vfio import attach, forget, rename
from proto import agent_pb2
from ttrpc import Code, RpcError

DISK = "02/00"


class Guest:
    """A sysfs and a /dev with one NVMe disk at 02/00, and a kernel that binds what it is told to."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.modules: list[str] = []
        self.takes = True
        self.directory = root / "devices/pci0000:00/0000:00:02.0/0000:01:00.0"
        (self.directory.parent / "pci_bus/0000:01").mkdir(parents=True)
        for name in ("class/block", "class/net", "class/nvme", "bus/pci/drivers/nvme", "dev", "groups/3"):
            (root / name).mkdir(parents=True)
        monkeypatch.setattr(vfio, "_write", self.write)
        monkeypatch.setattr(vfio, "modprobe", self.modprobe)

    def plug(self, *, code: str = "0x010802", group: bool = False) -> None:
        self.directory.mkdir()
        for name, text in {
            "class": code,
            "vendor": "0x1b36",
            "device": "0x0010",
            "modalias": "pci:v1",
        }.items():
            (self.directory / name).write_text(f"{text}\n")
        if group:
            (self.directory / "iommu_group").symlink_to(self.root / "groups/3")
            (self.root / "dev/vfio").mkdir()
            for name in ("3", "vfio"):
                (self.root / "dev/vfio" / name).write_text("")

    def drive(self, driver: str = "nvme") -> None:
        (self.directory / "driver").unlink(missing_ok=True)
        (self.directory / "driver").symlink_to(self.root / "bus/pci/drivers" / driver)

    def child(self, path: str, kind: str, name: str = "") -> None:
        folder = self.directory / path
        folder.mkdir(parents=True)
        (folder / "subsystem").symlink_to(self.root / "class" / kind)
        if name:
            (folder / "dev").write_text("1:2\n")
            (folder / "uevent").write_text(f"MAJOR=1\nDEVNAME={name}\n")
            (self.root / "dev" / name).write_text("")

    async def modprobe(self, _: object, name: str) -> int:
        self.modules.append(name)
        return 0

    def write(self, path: str, text: str) -> None:
        if path.endswith("/unbind"):
            (self.directory / "driver").unlink()
        elif path.endswith("/drivers_probe") and self.takes:
            assert (self.directory / "driver_override").read_text() == "vfio-pci"
            self.drive("vfio-pci")
        elif path.endswith("/driver_override"):
            Path(path).write_text(text)

    async def attach(
        self, kind: str, *options: str, config: dict[str, Any] | None = None, timeout: float = 0.05
    ) -> dict[str, Any]:
        config = config if config is not None else spec()
        device = agent_pb2.Device(
            id="7", type=kind, container_path="/dev/vfio/7", options=options or [f"0000:65:00.0={DISK}"]
        )
        forget([device], config["linux"])
        config["addresses"] = await attach(
            [device],
            config,
            None,  # type: ignore[arg-type]
            sysfs=str(self.root),
            dev=str(self.root / "dev"),
            timeout=timeout,
        )
        return config


def spec() -> dict[str, Any]:
    return {
        "process": {"env": ["PCIDEVICE_A=0000:65:00.0", "X=0000:65:00.0"], "user": {"uid": 7, "gid": 8}},
        "linux": {
            "devices": [{"path": "/dev/vfio/7", "type": "c", "major": 244, "minor": 7}],
            "resources": {
                "devices": [
                    {"allow": False, "access": "rwm"},
                    {"allow": True, "type": "c", "major": 244, "minor": 7, "access": "rwm"},
                ]
            },
        },
    }


@pytest.fixture
def guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Guest:
    return Guest(tmp_path, monkeypatch)


async def test_the_guests_driver_makes_nodes_for_the_container(guest: Guest) -> None:
    guest.plug()
    guest.drive()
    guest.child("nvme/nvme0", "nvme", "nvme0")
    guest.child("nvme/nvme0/nvme0n1", "block", "nvme0n1")
    config = await guest.attach("vfio-pci-gk")
    assert [entry["path"] for entry in config["linux"]["devices"]] == ["/dev/nvme0", "/dev/nvme0n1"]
    disk = config["linux"]["devices"][1]
    assert (disk["uid"], disk["gid"], disk["fileMode"]) == (7, 8, 0o660)
    rules = config["linux"]["resources"]["devices"]
    assert rules[-1] == {
        "allow": True, "type": disk["type"], "major": disk["major"], "minor": disk["minor"], "access": "rwm",
    }  # fmt: skip
    assert config["addresses"] == {"0000:65:00.0": "0000:01:00.0"}
    assert config["process"]["env"] == ["PCIDEVICE_A=0000:01:00.0", "X=0000:65:00.0"]
    assert guest.modules == []


async def test_a_disk_that_could_have_two_controllers(guest: Guest) -> None:
    """Its block device is elsewhere in sysfs; what is below the controller has no node."""
    guest.plug()
    guest.drive()
    guest.child("nvme/nvme0/nvme1c0n1", "block")
    with pytest.raises(RpcError, match="the guest's /dev/nvme1n1 is gone"):
        await guest.attach("vfio-pci-gk")
    (guest.root / "dev/nvme1n1").write_text("")
    config = await guest.attach("vfio-pci-gk")
    assert [entry["path"] for entry in config["linux"]["devices"]] == ["/dev/nvme1n1"]


async def test_device_and_disk_are_waited_for(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each comes with an event of its own; a module is loaded for a device that no driver has yet."""

    def found() -> None:
        guest.drive()
        guest.child("nvme/nvme0/nvme0n1", "block", "nvme0n1")

    steps: Iterator[Callable[[], None]] = iter([guest.plug, found])

    async def on_uevent(look: Any, timeout: float) -> Any:
        assert look() is None
        next(steps)()
        return look()

    monkeypatch.setattr(vfio, "on_uevent", on_uevent)
    config = await guest.attach("vfio-pci-gk")
    assert [entry["path"] for entry in config["linux"]["devices"]] == ["/dev/nvme0n1"]
    assert guest.modules == ["pci:v1"]


async def test_a_network_card_and_what_has_no_driver_by_nature(guest: Guest) -> None:
    guest.plug(code="0x020000")
    guest.drive()
    guest.child("virtio3/net/eth0", "net")
    assert (await guest.attach("vfio-pci-gk"))["linux"]["devices"] == []
    (guest.directory / "class").write_text("0x00ff00\n")
    (guest.directory / "driver").unlink()
    assert (await guest.attach("vfio-pci-gk"))["addresses"] == {"0000:65:00.0": "0000:01:00.0"}


async def test_a_disk_without_a_driver_is_an_error_and_one_without_media_is_not(guest: Guest) -> None:
    guest.plug()
    with pytest.raises(
        RpcError, match=r"no driver for the PCI device 0000:01:00\.0 \(0x1b36 0x0010\)"
    ) as caught:
        await guest.attach("vfio-pci-gk")
    assert caught.value.code == Code.FAILED_PRECONDITION
    guest.drive()
    guest.child("nvme/nvme0", "nvme", "nvme0")
    config = await guest.attach("vfio-pci-gk")
    assert [entry["path"] for entry in config["linux"]["devices"]] == ["/dev/nvme0"]


async def test_vfio_gives_the_guests_group_and_takes_the_hosts_away(guest: Guest) -> None:
    guest.plug(group=True)
    guest.drive()
    config = await guest.attach("vfio-pci")
    assert os.path.basename(os.readlink(guest.directory / "driver")) == "vfio-pci"
    assert [entry["path"] for entry in config["linux"]["devices"]] == ["/dev/vfio/3", "/dev/vfio/vfio"]
    rules = config["linux"]["resources"]["devices"]
    assert [rule.get("minor") for rule in rules] == [None, *(e["minor"] for e in config["linux"]["devices"])]
    assert guest.modules == ["vfio-pci"]
    await guest.attach("vfio-pci")  # a second container of the pod: it is bound already
    assert guest.modules == ["vfio-pci"]


async def test_vfio_without_an_iommu_or_without_its_driver_is_refused(guest: Guest) -> None:
    guest.plug()
    with pytest.raises(RpcError, match="needs an IOMMU in the guest") as caught:
        await guest.attach("vfio-pci")
    assert caught.value.code == Code.FAILED_PRECONDITION
    (guest.directory / "iommu_group").symlink_to(guest.root / "groups/3")
    guest.takes = False
    with pytest.raises(RpcError, match=r"vfio-pci of this guest does not take 0000:01:00\.0"):
        await guest.attach("vfio-pci")


async def test_a_device_that_never_comes_and_options_that_are_none(guest: Guest) -> None:
    with pytest.raises(RpcError, match=r"no PCI device 02/00 appeared within 0\.05 s") as caught:
        await guest.attach("vfio-pci-gk")
    assert caught.value.code == Code.NOT_FOUND
    for option in ("02/00", "../x=02/00", "0000:65:00.0=../..", "0000:65:00.0=zz"):
        with pytest.raises(RpcError) as caught:
            await guest.attach("vfio-pci-gk", option)
        assert caught.value.code == Code.INVALID_ARGUMENT
    with pytest.raises(RpcError, match="has 65 functions"):
        await guest.attach("vfio-pci-gk", *[f"0000:65:00.0={DISK}"] * 65)
    assert (await guest.attach("vfio-pci-gk", "0000:65:00.0="))["addresses"] == {}  # nothing to do


def test_addresses_in_the_environment() -> None:
    addresses = {"0000:65:00.0": "0000:01:00.0", "0000:65:00.1": "0000:02:00.0"}
    assert rename(
        [
            "PCIDEVICE_INTEL=0000:65:00.0,0000:65:00.1,0000:66:00.0",
            'PCIDEVICE_INTEL_INFO={"0000:65:00.1":{"generic":{"deviceID":"0000:65:00.1"}}}',
            "PCIDEVICE_B=10000:65:00.0",
            "OTHER=0000:65:00.0",
        ],
        addresses,
    ) == [
        "PCIDEVICE_INTEL=0000:01:00.0,0000:02:00.0,0000:66:00.0",
        'PCIDEVICE_INTEL_INFO={"0000:02:00.0":{"generic":{"deviceID":"0000:02:00.0"}}}',
        "PCIDEVICE_B=10000:65:00.0",
        "OTHER=0000:65:00.0",
    ]
