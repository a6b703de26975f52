"""A container gets a disk of the host by VFIO, under containerd, and the host gets its driver back."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.pci_driver import give_to_vfio, restore
from devices.undo import MemoryUndo
from devices.vfio import find_group, read_function
from testing import leaks
from testing.containerd import KATA, Containerd
from testing.guest import Value, write_configuration
from tests.benchhost.conftest import BUSYBOX, KERNEL_PARAMS, PATIENCE
from tests.benchhost.machine import SPARE_DISK
from tests.benchhost.test_vfio import DISK, driver, find, here

pytestmark = pytest.mark.benchhost

WRITTEN = "written by a container"
READ = f"head -c {len(SPARE_DISK)} /dev/nvme0n1"
ASK = ("--annotation", "cdi.k8s.io/vfio0=bench.local/disk=0")
PAIR = (0x1B36, 0x0011)  # two functions of one group


@pytest.fixture(scope="module")
def overrides() -> dict[str, dict[str, Value | None]]:
    return {
        "hypervisor.qemu": {"hot_plug_vfio": "root-port", "pcie_root_port": 3},
        "runtime": {"vfio_bind": True, "valid_cdi_devices": ["bench.local/disk=*", "bench.local/pair=*"]},
    }


async def test_a_container_uses_a_disk_that_it_was_given(containerd: Containerd) -> None:
    """`--device /dev/vfio/<group>` of a disk that is with vfio-pci already."""
    disk = find(DISK)
    undo = MemoryUndo()
    taken = await give_to_vfio(read_function(disk), undo)
    node = f"/dev/vfio/{find_group(disk).number}"
    script = (
        f"{READ}; echo {WRITTEN} | dd of=/dev/nvme0n1 bs=512 seek=16 conv=sync,fsync 2>/dev/null; ls /dev"
    )
    try:
        done = containerd.ctr(
            *("run", "--rm", "--runtime", KATA, "--device", node, BUSYBOX, containerd.new_id("disk")),
            *("sh", "-c", script),
            timeout=PATIENCE,
        )
        assert driver(disk) == "vfio-pci"  # it was so before
    finally:
        restore(taken.facts)
    assert done.out.startswith(SPARE_DISK)
    assert "vfio" not in done.text[len(SPARE_DISK) :].split()
    with here(disk).open("rb") as file:
        file.seek(16 * 512)
        assert file.read(len(WRITTEN)) == WRITTEN.encode()


@pytest.fixture
def named() -> Iterator[str]:
    """The disk, with its own driver, as the CDI device bench.local/disk=0; its address. In the end it has its
    driver again."""
    disk = find(DISK)
    here(disk)
    name_in_cdi("disk", disk)
    yield disk
    with here(disk).open("rb") as file:
        assert file.read(len(SPARE_DISK)) == SPARE_DISK
    assert driver(disk) == "nvme"


def pair() -> list[str]:
    """The addresses of the two."""
    found = [read_function(address) for address in sorted(os.listdir("/sys/bus/pci/devices"))]
    return [one.address for one in found if (one.vendor, one.device) == PAIR]


def name_in_cdi(kind: str, address: str) -> None:
    """The device's group as the CDI device <kind>=0."""
    edits = {
        "deviceNodes": [{"path": f"/dev/vfio/{find_group(address).number}"}],
        "env": [f"PCIDEVICE_{kind.upper()}={address}"],
    }
    device = {"name": "0", "containerEdits": edits}
    document = {"cdiVersion": "0.6.0", "kind": f"bench.local/{kind}", "devices": [device]}
    Path("/etc/cdi").mkdir(exist_ok=True)
    Path(f"/etc/cdi/{kind}.json").write_text(json.dumps(document))


@pytest.mark.parametrize("victim", ["containerd-shim-kata-v2", "qemu-system-x86_64"])
def test_after_kill_9_the_driver_comes_back(containerd: Containerd, named: str, victim: str) -> None:
    """Devices of CDI, chosen by annotations, a disk taken from its driver and both functions of a group
    without one; then shim or VMM is killed."""

    def snapshot() -> dict[str, set[str]]:
        return leaks.snapshot(root=str(containerd.root), ignore=[containerd.pid])

    before = snapshot()
    name = containerd.new_id("cdi")
    two = pair()
    name_in_cdi("pair", two[1])
    assert [driver(address) for address in two] == ["", ""]
    also = ("--annotation", "cdi.k8s.io/vfio1=bench.local/pair=0")
    containerd.ctr(
        *("run", "--detach", "--runtime", KATA, *ASK, *also, BUSYBOX, name),
        *("sh", "-c", "echo $PCIDEVICE_DISK >/address; exec sleep 100000"),
        timeout=PATIENCE,
    )
    assert [driver(address) for address in (named, *two)] == ["vfio-pci"] * 3
    done = containerd.ctr(
        *("task", "exec", "--exec-id", "e", name, "sh", "-c"),
        f"{READ}; cat /address; grep -l 0x0011 /sys/bus/pci/devices/*/device | wc -l",
        timeout=60,
    )
    assert done.out.startswith(SPARE_DISK)
    address, functions = done.out[len(SPARE_DISK) :].decode().split()
    assert address != named  # the guest's own
    assert functions == "2"
    (pid,) = [
        process.pid
        for process in containerd.processes()
        if any(os.path.basename(word) == victim for word in process.argv[:4])
    ]
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while driver(named) != "nvme" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert driver(named) == "nvme", containerd.log_tail()
    deadline = time.monotonic() + 60
    while any(driver(address) for address in two) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [driver(address) for address in two] == ["", ""]
    containerd.remove(name, timeout=60)
    assert leaks.settle(before, snapshot, timeout=30) == {}


def test_vfio_mode_from_the_start_and_without_an_iommu(
    containerd: Containerd, named: str, tmp_path: Path
) -> None:
    """The VM starts with the device, and the container opens its group; a guest without an IOMMU is refused,
    and what was taken for it comes back."""
    sections: dict[str, dict[str, Value | None]] = {
        "hypervisor.qemu": {
            "cold_plug_vfio": "root-port",
            "enable_iommu": True,
            "kernel_params": KERNEL_PARAMS,
        },
        "runtime": {"vfio_mode": "vfio", "vfio_bind": True, "valid_cdi_devices": ["bench.local/*"]},
        "agent.kata": {"reconnect_timeout_ms": int(PATIENCE * 1000)},
    }
    script = "for g in /dev/vfio/[0-9]*; do exec 3<>$g && ls /dev/vfio; done; echo $PCIDEVICE_DISK"
    path = write_configuration(tmp_path / "vfio.toml", sections)
    run = ("run", "--rm", "--runtime", KATA, "--runtime-config-path", str(path), *ASK, BUSYBOX)
    done = containerd.ctr(*run, containerd.new_id("vfio"), "sh", "-c", script, timeout=PATIENCE)
    group, control, address = done.text.split()
    assert group.isdigit()
    assert (control, address != named) == ("vfio", True)

    sections["hypervisor.qemu"]["enable_iommu"] = False
    write_configuration(path, sections)
    done = containerd.ctr(*run, containerd.new_id("none"), "true", timeout=PATIENCE, check=False)
    assert done.code != 0
    assert 'vfio_mode = "vfio" needs an IOMMU in the guest' in done.error
    assert "enable_iommu = true" in done.error
