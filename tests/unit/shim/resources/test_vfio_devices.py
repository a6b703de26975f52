"""A container gets the devices of VFIO that it was given, whole groups; the host gets its drivers back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from devices import pci_driver
from devices.config import DeviceConfig, VfioConfig
from devices.errors import CallerError, HostError, UnsupportedByHypervisor
from devices.holdings import Holdings
from devices.manager import DeviceManager
from devices.undo import MemoryUndo
from shim.launch.undo_kinds import release
from shim.resources import vfio_devices
from shim.resources.vfio_devices import VfioDevices, Wanted, find, rewrite
from shim.resources.vfio_settings import VfioSettings, wants
from shim.spec import guest_devices
from shim.spec.guest_devices import check_devices, vfio_nodes
from shim.state.journalfile import Record
from shim.state.releases import ReleaseError
from tests.unit.devices.sysfs import Sysfs

HOT = VfioSettings(hot="root-port")
BIND = VfioSettings(hot="root-port", bind=True, cdi=("vendor.com/*",))
GROUP = {"path": "/dev/vfio/7", "type": "c", "major": 244, "minor": 0}


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sysfs:
    """Group 7 with two functions, 244:0 its node."""
    tree = Sysfs(tmp_path)
    tree.function("0000:65:00.0", 7, ids=(0x10DE, 0x2330), code=0x030200, driver="vfio-pci")
    tree.function("0000:65:00.1", 7, ids=(0x10DE, 0x22BE), code=0x040300, driver="vfio-pci")
    for number, name in (("244:0", "vfio/7"), ("244:1", "vfio/9"), ("250:0", "random0")):
        node = tmp_path / "dev/char" / number
        node.mkdir(parents=True)
        (node / "uevent").write_text(f"MAJOR=1\nDEVNAME={name}\n")
    monkeypatch.setattr(pci_driver, "_write", tree.write)
    return tree


def spec(
    *devices: dict[str, Any],
    rules: list[dict[str, Any]] | None = None,
    annotations: dict[str, str] | None = None,
) -> Any:
    return {
        "annotations": dict(annotations or {}),
        "process": {"env": ["PATH=/bin", "A=0"]},
        "linux": {"devices": list(devices), "resources": {"devices": rules or []}},
    }


def look(sysfs: Sysfs, document: Any, settings: VfioSettings = HOT) -> Wanted:
    return find(document, settings, sysfs=str(sysfs), directories=(str(sysfs.root / "cdi"),))


def test_the_number_says_what_it_is_whatever_the_path(sysfs: Sysfs) -> None:
    """A name in the container is free: /dev/null called /dev/vfio/7 stays /dev/null."""
    document = spec(
        {"path": "/dev/my-gpu", "type": "c", "major": 244, "minor": 0},
        {"path": "/dev/vfio/9", "type": "c", "major": 1, "minor": 3},
        {"path": "/dev/vfio/8", "type": "c", "major": 250, "minor": 0},
        {"path": "/dev/vfio/vfio", "type": "c", "major": 10, "minor": 196},
    )
    assert vfio_nodes(document, str(sysfs)) == [("/dev/my-gpu", "/dev/vfio/7")]
    (passed,) = look(sysfs, document).groups
    assert (passed.path, passed.group.number, passed.iommufd) == ("/dev/my-gpu", 7, False)


def test_other_character_devices_are_still_refused(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_devices, "SYSFS", str(sysfs))
    check_devices(spec(GROUP))
    with pytest.raises(CallerError, match=r"/dev/vfio/8 is a character device of the host \(250:0\)"):
        check_devices(spec({"path": "/dev/vfio/8", "type": "c", "major": 250, "minor": 0}))


def test_a_privileged_container_gets_none_of_what_is_merely_there(
    sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_devices, "_is_elsewhere", lambda device: device.path != "/dev/vfio/7")
    everything = {"allow": True, "access": "rwm"}
    own = {"allow": True, "type": "c", "major": 244, "minor": 0, "access": "rw"}
    assert vfio_nodes(spec(GROUP, rules=[everything]), str(sysfs)) == []
    assert vfio_nodes(spec(GROUP, rules=[everything, own]), str(sysfs)) == [("/dev/vfio/7", "/dev/vfio/7")]
    renamed = {**GROUP, "path": "/dev/gpu"}
    assert vfio_nodes(spec(renamed, rules=[everything]), str(sysfs)) == [("/dev/gpu", "/dev/vfio/7")]


def test_nothing_is_passed_where_the_configuration_does_not_say_where(sysfs: Sysfs) -> None:
    with pytest.raises(CallerError, match=r"/dev/vfio/7 is a device of VFIO, and these are not passed") as e:
        look(sysfs, spec(GROUP), VfioSettings())
    assert "hot_plug_vfio" in e.value.hint


def test_a_group_that_the_host_drives_is_refused_unless_it_may_be_taken(
    sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    sysfs.function("0000:02:00.0", 9, code=0x010802, driver="nvme")
    document = spec({"path": "/dev/vfio/9", "type": "c", "major": 244, "minor": 1})
    with pytest.raises(HostError, match="0000:02:00.0 is bound to the host's driver nvme"):  # noqa: RUF043
        look(sysfs, document)
    assert len(look(sysfs, document, BIND).groups) == 1
    disk = sysfs.root / "devices/pci0000:00/0000:02:00.0"
    sysfs.child("block", disk, "nvme0n1", dev="259:0\n")
    monkeypatch.setattr(pci_driver, "users", lambda _: ["a part of dm-0"])
    with pytest.raises(CallerError, match="in use by the host: nvme0n1 is a part of dm-0"):
        look(sysfs, document, BIND)
    assert sysfs.log == []  # it was only looked at


def cdi(sysfs: Sysfs, *nodes: str) -> None:
    (sysfs.root / "cdi").mkdir()
    edits = {"deviceNodes": [{"path": node} for node in nodes], "env": ["A=1"], "hooks": [{}]}
    device = {"name": "0", "containerEdits": edits}
    document = {"cdiVersion": "0.6.0", "kind": "vendor.com/gpu", "devices": [device]}
    (sysfs.root / "cdi/a.json").write_text(json.dumps(document))


async def test_an_annotation_selects_what_the_administrator_lists(sysfs: Sysfs) -> None:
    cdi(sysfs, "/dev/vfio/vfio", "/dev/vfio/7", "/dev/nvidia0")
    asked = spec(annotations={"cdi.k8s.io/vfio0": "vendor.com/gpu=0,other.com/gpu=0"})
    assert not await wants(asked, HOT)
    assert look(sysfs, asked) == Wanted()
    assert await wants(asked, BIND)
    wanted = look(sysfs, asked, BIND)
    assert [passed.path for passed in wanted.groups] == ["/dev/vfio/7"]
    assert wanted.env == ("A=1",)
    assert wanted.left_out == (
        "vendor.com/gpu=0: hooks",
        "CDI device vendor.com/gpu=0: /dev/nvidia0 (no device of VFIO)",
        "CDI device other.com/gpu=0 (valid_cdi_devices does not list it)",
    )
    # containerd has put the node into the spec as well: it is one group
    both = {**asked, "linux": spec(GROUP)["linux"]}
    assert len(look(sysfs, both, BIND).groups) == 1


def test_the_guests_spec(sysfs: Sysfs) -> None:
    cdi(sysfs, "/dev/vfio/7")
    null = {"path": "/dev/null", "type": "c", "major": 1, "minor": 3}
    control = {"path": "/dev/vfio/vfio", "type": "c", "major": 10, "minor": 196}
    document = spec(GROUP, null, control, annotations={"cdi.k8s.io/x": "vendor.com/gpu=0", "keep": "1"})
    wanted = look(sysfs, document, BIND)
    rewrite(document, wanted, BIND)
    assert document["linux"]["devices"] == [null]
    assert document["annotations"] == {"keep": "1"}
    assert document["process"]["env"] == ["PATH=/bin", "A=1"]

    document = spec(null, GROUP)
    rewrite(document, wanted, VfioSettings(mode="vfio", own_agent=False))
    assert document["linux"]["devices"] == [null, {**GROUP, "major": 0, "minor": 0}]
    assert document["annotations"] == {"cdi.k8s.io/vfio7": "nvidia.com/gpu=0"}


class Vm:
    """Takes what it is given; `refuses` are ids that it does not plug, `keeps` those that do not go."""

    def __init__(self) -> None:
        self.plugged: dict[str, VfioConfig] = {}
        self.refuses: set[str] = set()
        self.keeps: set[str] = set()

    async def add_device(self, device: DeviceConfig) -> str:
        assert isinstance(device, VfioConfig)
        if device.id in self.refuses:
            raise UnsupportedByHypervisor("vm", "this")
        self.plugged[device.id] = device
        return f"{len(self.plugged):02x}/00"

    async def remove_device(self, device_id: str) -> None:
        if device_id in self.keeps:
            raise HostError("the guest keeps it")
        del self.plugged[device_id]


class World:
    """One sandbox's VM, its devices and undo log."""

    def __init__(self, sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch, settings: VfioSettings) -> None:
        self.vm, self.undo, self.sysfs, self.settings = Vm(), MemoryUndo(), sysfs, settings
        manager = DeviceManager()
        self.holdings = Holdings(manager, self.vm)
        self.vfio = VfioDevices(settings, manager, self.holdings, self.vm, self.undo)  # type: ignore[arg-type]

        async def give(function: Any, undo: Any) -> Any:
            return await pci_driver.give_to_vfio(function, undo, str(sysfs))

        monkeypatch.setattr(vfio_devices, "give_to_vfio", give)

    async def add(self, container: str, document: Any) -> Any:
        return await self.vfio.add(container, look(self.sysfs, document, self.settings))

    async def release(self, container: str) -> list[Exception]:
        return [*await self.holdings.release(container), *await self.vfio.release(container)]


async def test_a_whole_group_is_plugged_once_and_goes_with_its_last_user(
    sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(sysfs, monkeypatch, HOT)
    (told,) = await world.add("c1", spec(GROUP))
    assert (told.id, told.type, told.container_path) == ("7", "vfio-pci-gk", "/dev/vfio/7")
    assert list(told.options) == ["0000:65:00.0=01/00", "0000:65:00.1=02/00"]
    assert {device.port for device in world.vm.plugged.values()} == {"root-port"}
    assert await world.add("c2", spec(GROUP)) == [told]
    assert await world.release("c1") == []
    assert len(world.vm.plugged) == 2
    assert await world.release("c2") == await world.release("c2") == []
    assert world.vm.plugged == {}
    await world.add("c3", spec(GROUP))
    assert len(world.vm.plugged) == 2


async def test_what_was_taken_comes_back_when_it_is_unplugged(
    sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    sysfs.function("0000:02:00.0", 9, code=0x010802, driver="nvme")
    document = spec({"path": "/dev/vfio/9", "type": "c", "major": 244, "minor": 1})
    world = World(sysfs, monkeypatch, BIND)
    await world.add("c1", document)
    assert sysfs.bound("0000:02:00.0") == "vfio-pci"
    world.vm.keeps.add("vfio-0000-02-00-0")
    assert len(await world.release("c1")) == 1
    assert sysfs.bound("0000:02:00.0") == "vfio-pci"  # a guest has it still
    assert await world.vfio.close() == []  # the VM has ended
    assert (sysfs.bound("0000:02:00.0"), world.undo.entries) == ("nvme", [])


async def test_a_group_half_plugged_goes_as_a_whole(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> None:
    sysfs.write(f"{sysfs}/bus/pci/devices/0000:65:00.1/driver/unbind", "0000:65:00.1")
    world = World(sysfs, monkeypatch, BIND)
    world.vm.refuses.add("vfio-0000-65-00-1")
    with pytest.raises(UnsupportedByHypervisor):
        await world.add("c1", spec(GROUP))
    assert sysfs.bound("0000:65:00.1") == "vfio-pci"
    assert await world.release("c1") == []
    assert (world.vm.plugged, world.undo.entries, sysfs.bound("0000:65:00.1")) == ({}, [], "")
    world.vm.refuses.clear()
    assert len(await world.add("c1", spec(GROUP))) == 1


async def test_what_the_vm_started_with_stays_and_is_the_same(
    sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = VfioSettings(cold="switch-port", bind=True)
    world = World(sysfs, monkeypatch, settings)
    await world.vfio.add_cold(look(sysfs, spec(GROUP), settings))
    assert {device.port for device in world.vm.plugged.values()} == {"switch-port"}
    (told,) = await world.add("c1", spec(GROUP))
    assert list(told.options) == ["0000:65:00.0=01/00", "0000:65:00.1=02/00"]
    assert await world.release("c1") == []
    assert len(world.vm.plugged) == 2
    assert await world.vfio.close() == []


def test_delete_gives_drivers_back_by_what_the_journal_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def restore(facts: Any, timeout: float) -> None:
        seen.append((facts, timeout))
        if facts["driver"] == "bad name":
            raise ValueError("no names of drivers")

    monkeypatch.setattr(pci_driver, "restore", restore)
    facts: dict[str, str | int] = {"address": "0000:02:00.0", "driver": "nvme", "override": ""}
    release(Record(1, "pci-driver", facts), 1.5)
    assert seen == [(facts, 1.5)]
    with pytest.raises(ReleaseError, match="no names of drivers"):
        release(Record(1, "pci-driver", {**facts, "driver": "bad name"}))
