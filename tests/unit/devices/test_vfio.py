"""What is behind a node of VFIO is found by sysfs alone, whole groups at a time, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from devices.errors import CallerError, HostError
from devices.vfio import find_group, is_vfio_node, read_function
from tests.unit.devices.sysfs import Sysfs


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    return Sysfs(tmp_path)


def test_a_group_is_found_by_its_node_by_a_member_and_by_the_members_own_node(sysfs: Sysfs) -> None:
    gpu = sysfs.function("0000:65:00.0", 7, ids=(0x10DE, 0x2330), code=0x030200, driver="vfio-pci")
    sysfs.function("0000:65:00.1", 7, ids=(0x10DE, 0x22BE), code=0x040300, driver="vfio-pci", express=False)
    (sysfs.root / "class/vfio-dev/vfio3").mkdir()
    (sysfs.root / "class/vfio-dev/vfio3/device").symlink_to(gpu)

    groups = [
        find_group(node, str(sysfs)) for node in ("/dev/vfio/7", "/dev/vfio/devices/vfio3", "0000:65:00.1")
    ]

    assert groups == [groups[0]] * 3
    group = groups[0]
    assert (group.number, group.bridges, group.unbound) == (7, (), ())
    first, second = group.functions
    assert (first.address, first.vendor, first.device, first.class_code) == (
        "0000:65:00.0", 0x10DE, 0x2330, 0x030200,
    )  # fmt: skip
    assert (first.express, second.express) == (True, False)
    assert str(second) == "0000:65:00.1 (10de:22be, class 0403, driver vfio-pci)"
    group.check_bound()


def test_bridges_stay_and_the_kernels_exception_for_them_is_ours(sysfs: Sysfs) -> None:
    """A PCI-to-PCI bridge may have any driver; others of the class count as functions for the kernel."""
    sysfs.function("0000:00:1c.0", 2, code=0x060400, driver="pcieport")
    sysfs.function("0000:00:1f.0", 2, code=0x060100)
    sysfs.function("0000:01:00.0", 2, driver="mlx5_vfio_pci")
    group = find_group("/dev/vfio/2", str(sysfs))
    assert [one.address for one in group.functions] == ["0000:01:00.0"]
    assert [one.address for one in group.bridges] == ["0000:00:1c.0", "0000:00:1f.0"]
    group.check_bound()

    sysfs.function("0000:00:1f.4", 2, code=0x068000, driver="lpc_ich")
    with pytest.raises(HostError, match=r"0000:00:1f\.4 is bound to the host's driver lpc_ich"):
        find_group("/dev/vfio/2", str(sysfs)).check_bound()
    sysfs.function("0000:00:1c.1", 3, code=0x060400, driver="pcieport")
    with pytest.raises(HostError, match="group 3 has nothing but bridges"):
        find_group("/dev/vfio/3", str(sysfs))


@pytest.mark.parametrize(("driver", "said"), [("ixgbe", "the host's driver ixgbe"), ("", "no driver")])
def test_a_group_that_the_host_has_a_part_of_is_refused_with_the_commands(
    sysfs: Sysfs, driver: str, said: str
) -> None:
    sysfs.function("0000:02:00.0", 5, driver="vfio-pci")
    sysfs.function("0000:02:00.1", 5, driver=driver)
    with pytest.raises(HostError) as caught:
        find_group("/dev/vfio/5", str(sysfs)).check_bound()
    text = str(caught.value)
    assert f"0000:02:00.1 is bound to {said}, not to vfio-pci (one of 2 functions of IOMMU group 5)" in text
    assert "echo vfio-pci > /sys/bus/pci/devices/0000:02:00.1/driver_override" in text
    assert ("driver/unbind" in text) is bool(driver)
    assert "vfio_bind = true" in text


def test_mediated_and_ap_devices_are_named_and_refused(sysfs: Sysfs) -> None:
    uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"
    for number, kind, parent in ((1, "nvidia-63", "0000:65:00.0"), (2, "vfio_ap-passthrough", "matrix")):
        device = sysfs.function(uuid, number, bus="mdev", below=f"pci0000:00/{parent}")
        (sysfs.root / "types" / kind).mkdir(parents=True)
        (device / "mdev_type").symlink_to(sysfs.root / "types" / kind)
        (device / "matrix").write_text("05.0004\n05.0047\n")
    sysfs.function("05.0004", 3, bus="ap")
    sysfs.function("fe200000.ethernet", 4, bus="platform")
    for number, words in (
        (1, rf"mediated device {uuid} \(type nvidia-63 of 0000:65:00\.0\)"),
        (2, rf"AP matrix device {uuid} \(cryptographic adapters of s390x: 05\.0004 05\.0047\)"),
        (3, r"AP queue 05\.0004 \(s390x\)"),
        (4, r"device fe200000\.ethernet of the bus platform"),
    ):
        with pytest.raises(CallerError, match=words) as caught:
            find_group(f"/dev/vfio/{number}", str(sysfs))
        assert caught.value.code == "UNIMPLEMENTED"


@pytest.mark.parametrize(
    "node",
    ["/dev/vfio/vfio", "/dev/vfio/../7", "/dev/vfio/7/", "/dev/vfio/devices/../7", "/dev/sda", "65:00.0", "",
     "/dev/vfio/7\n", "0000:65:00.0/../x", "/dev/vfio/1234567890"],
)  # fmt: skip
def test_no_other_text_becomes_a_path(sysfs: Sysfs, node: str) -> None:
    assert not is_vfio_node(node)
    with pytest.raises(CallerError, match="is no VFIO device") as caught:
        find_group(node, str(sysfs))
    assert caught.value.code == "INVALID_ARGUMENT"


def test_what_is_not_there_is_told(sysfs: Sysfs) -> None:
    for node in ("/dev/vfio/9", "/dev/vfio/devices/vfio9", "0000:09:00.0"):
        assert is_vfio_node(node) is node.startswith("/dev")
        with pytest.raises(HostError, match=r"no IOMMU group 9|does not exist"):
            find_group(node, str(sysfs))
    assert is_vfio_node("/dev/vfio/noiommu-7")
    with pytest.raises(HostError, match="noiommu mode"):
        find_group("/dev/vfio/noiommu-7", str(sysfs))
    sysfs.function("0000:03:00.0", None)
    with pytest.raises(HostError, match="in no IOMMU group"):
        find_group("0000:03:00.0", str(sysfs))
    with pytest.raises(HostError, match=r"no PCI device '\.\./\.\./x'"):
        read_function("../../x", str(sysfs))
    (sysfs.function("0000:04:00.0", 4) / "vendor").write_text("what\n")
    with pytest.raises(HostError, match=r"does not tell what 0000:04:00\.0 is"):
        find_group("/dev/vfio/4", str(sysfs))
