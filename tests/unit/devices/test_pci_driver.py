"""A function is taken from the host's driver only if the host does not use it, and goes back in any case."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from devices import pci_driver
from devices.errors import CallerError, HostError
from devices.pci_driver import KIND, check_unused, give_to_vfio, restore
from devices.undo import Entry, MemoryUndo
from devices.vfio import read_function
from tests.unit.devices.sysfs import Sysfs

NVME = "0000:02:00.0"


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sysfs:
    tree = Sysfs(tmp_path)
    monkeypatch.setattr(pci_driver, "_write", tree.write)
    tree.function(NVME, 9, code=0x010802, driver="nvme")
    return tree


async def test_it_goes_to_vfio_and_back_and_was_written_down_before(sysfs: Sysfs) -> None:
    class Log(MemoryUndo):
        def record(self, *args: object, **facts: object) -> Entry:
            assert sysfs.log == []  # nothing has been changed yet
            return super().record(*args, **facts)  # type: ignore[arg-type]

    undo = Log()
    entry = await give_to_vfio(read_function(NVME, str(sysfs)), undo, str(sysfs))
    assert (entry.kind, entry.facts) == (KIND, {"address": NVME, "driver": "nvme", "override": ""})
    assert (sysfs.bound(NVME), sysfs.override(NVME)) == ("vfio-pci", "vfio-pci")
    assert sysfs.log == [
        f"bus/pci/devices/{NVME}/driver_override vfio-pci",
        f"bus/pci/devices/{NVME}/driver/unbind {NVME}",
        f"bus/pci/drivers_probe {NVME}",
    ]
    await undo.release(entry)
    assert (sysfs.bound(NVME), sysfs.override(NVME)) == ("nvme", "(null)")


async def test_one_without_a_driver_gets_none_again_and_an_override_comes_back(sysfs: Sysfs) -> None:
    sysfs.function("0000:03:00.0", 10, code=0x00FF00)
    sysfs.write(f"{sysfs}/bus/pci/devices/0000:03:00.0/driver_override", "mine")
    entry = await give_to_vfio(read_function("0000:03:00.0", str(sysfs)), MemoryUndo(), str(sysfs))
    assert entry.facts == {"address": "0000:03:00.0", "driver": "", "override": "mine"}
    restore(entry.facts, str(sysfs))
    assert (sysfs.bound("0000:03:00.0"), sysfs.override("0000:03:00.0")) == ("", "mine")


@pytest.mark.parametrize("steps", range(4))
def test_restoring_works_from_wherever_a_kill_has_stopped_it_and_twice(sysfs: Sysfs, steps: int) -> None:
    facts = {"address": NVME, "driver": "nvme", "override": ""}
    base = f"{sysfs}/bus/pci"
    for path, text in [
        (f"{base}/devices/{NVME}/driver_override", "vfio-pci"),
        (f"{base}/devices/{NVME}/driver/unbind", NVME),
        (f"{base}/drivers_probe", NVME),
    ][:steps]:
        sysfs.write(path, text)
    for _ in range(2):
        restore(facts, str(sysfs))
        assert (sysfs.bound(NVME), sysfs.override(NVME)) == ("nvme", "(null)")


def test_what_is_somebody_elses_by_now_is_left(sysfs: Sysfs) -> None:
    sysfs.write(f"{sysfs}/bus/pci/devices/{NVME}/driver/unbind", NVME)
    sysfs.write(f"{sysfs}/bus/pci/drivers/other/bind", NVME)
    sysfs.log.clear()
    restore({"address": NVME, "driver": "nvme", "override": ""}, str(sysfs))
    restore({"address": "0000:77:00.0", "driver": "nvme", "override": ""}, str(sysfs))  # taken out
    assert (sysfs.bound(NVME), sysfs.log) == ("other", [])
    for facts in ({"driver": "../../x"}, {"override": "a b"}):
        with pytest.raises(ValueError, match="no names of drivers"):
            restore({"address": NVME, **facts}, str(sysfs))


async def test_a_kernel_that_refuses_leaves_the_old_driver_and_no_entry(sysfs: Sysfs) -> None:
    sysfs.refuses.add("vfio-pci")
    undo = MemoryUndo()
    with pytest.raises(OSError, match="No such device"):
        await give_to_vfio(read_function(NVME, str(sysfs)), undo, str(sysfs))
    assert (sysfs.bound(NVME), sysfs.override(NVME), undo.entries) == ("nvme", "(null)", [])


async def test_a_driver_that_does_not_come_back_is_told(sysfs: Sysfs) -> None:
    facts = (await give_to_vfio(read_function(NVME, str(sysfs)), MemoryUndo(), str(sysfs))).facts
    sysfs.refuses.add("nvme")
    with pytest.raises(HostError, match=f"{NVME} did not go back to its driver nvme: No such device"):
        restore(facts, str(sysfs))


async def test_a_driver_that_does_not_let_go_keeps_nobody(
    sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    facts = (await give_to_vfio(read_function(NVME, str(sysfs)), MemoryUndo(), str(sysfs))).facts
    monkeypatch.setattr(pci_driver, "_write", lambda path, _: "unbind" in path and go.wait(60))
    with pytest.raises(HostError, match=r"did not let go of it within 0\.05 s"):
        restore(facts, str(sysfs), 0.05)
    go.set()


class TestInUse:
    """Each way in which the host may use a device is found and named."""

    @pytest.fixture(autouse=True)
    def users(self, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
        """Who has which block device, by number (`devices.in_use`)."""
        found: dict[int, list[str]] = {}
        monkeypatch.setattr(pci_driver, "users", lambda number: found.get(number, []))
        return found

    def check(self, sysfs: Sysfs, words: str, address: str = NVME) -> None:
        function = read_function(address, str(sysfs))
        if not words:
            check_unused(function, str(sysfs), str(sysfs.root))
            return
        with pytest.raises(CallerError, match=words) as caught:
            check_unused(function, str(sysfs), str(sysfs.root))
        assert f"the PCI device {address} " in caught.value.cause
        assert caught.value.code == "FAILED_PRECONDITION"

    def device(self, sysfs: Sysfs, address: str = NVME) -> Path:
        return Path(os.path.realpath(sysfs.root / "bus/pci/devices" / address))

    def test_a_free_one(self, sysfs: Sysfs, users: dict[int, list[str]]) -> None:
        other = sysfs.function("0000:02:00.1", 9)
        sysfs.child("block", other, "nvme7n1", dev="259:1\n")
        users[os.makedev(259, 1)] = ["mounted at /data"]  # but of another device
        sysfs.child("block", self.device(sysfs), "nvme0n1", dev="259:0\n")
        self.check(sysfs, "")

    def test_a_disk_that_somebody_has(self, sysfs: Sysfs, users: dict[int, list[str]]) -> None:
        sysfs.child("block", self.device(sysfs), "nvme0n1", dev="259:0\n")
        users[os.makedev(259, 0)] = ["mounted at /data (nvme0n1p1)"]
        self.check(sysfs, r"nvme0n1 is mounted at /data \(nvme0n1p1\)")

    def test_one_that_the_kernel_has_given_to_somebody(
        self, sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sysfs.child("block", self.device(sysfs), "nvme0n1", dev="259:0\n")

        def busy(path: str, flags: int) -> int:
            assert path.endswith("/nvme0n1")
            assert flags & os.O_EXCL
            raise OSError(errno.EBUSY, "busy")

        monkeypatch.setattr(os, "open", busy)
        self.check(sysfs, "nvme0n1 is taken")

    def test_network_links(self, sysfs: Sysfs) -> None:
        card = sysfs.function("0000:03:00.0", 10, driver="ixgbe")
        self.check(sysfs, "not in this network namespace", "0000:03:00.0")
        link = sysfs.child("net", card, "eth0", flags="0x1002\n")
        self.check(sysfs, "", "0000:03:00.0")
        (link / "flags").write_text("0x1003\n")
        self.check(sysfs, "the network link eth0 is up", "0000:03:00.0")

    def test_a_console_and_a_function_with_virtual_ones(self, sysfs: Sysfs) -> None:
        (self.device(sysfs) / "sriov_numvfs").write_text("4\n")
        self.check(sysfs, "virtual functions")
        (self.device(sysfs) / "boot_vga").write_text("1\n")
        self.check(sysfs, "display")
