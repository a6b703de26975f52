"""A container gets a disk of the host by VFIO, under containerd, and the host gets its driver back."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from devices.pci_driver import give_to_vfio, restore
from devices.undo import MemoryUndo
from devices.vfio import find_group, read_function
from testing import leaks
from testing.containerd import KATA, Containerd
from testing.guest import Value
from tests.benchhost.conftest import BUSYBOX, PATIENCE
from tests.benchhost.machine import SPARE_DISK
from tests.benchhost.test_vfio import DISK, driver, find, here

pytestmark = pytest.mark.benchhost

WRITTEN = "written by a container"
READ = f"head -c {len(SPARE_DISK)} /dev/nvme0n1"


@pytest.fixture(scope="module")
def overrides() -> dict[str, dict[str, Value | None]]:
    return {
        "hypervisor.qemu": {"hot_plug_vfio": "root-port", "pcie_root_port": 1},
        "runtime": {"vfio_bind": True, "valid_cdi_devices": ["bench.local/disk=*"]},
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


def test_after_kill_9_delete_gives_the_driver_back(containerd: Containerd) -> None:
    """A device of CDI, chosen by an annotation, taken from its driver, whose shim is killed."""

    def snapshot() -> dict[str, set[str]]:
        return leaks.snapshot(root=str(containerd.root), ignore=[containerd.pid])

    before = snapshot()
    disk = find(DISK)
    here(disk)
    number = find_group(disk).number
    edits = {"deviceNodes": [{"path": f"/dev/vfio/{number}"}], "env": [f"PCIDEVICE_DISK={disk}"]}
    spec = {
        "cdiVersion": "0.6.0",
        "kind": "bench.local/disk",
        "devices": [{"name": "0", "containerEdits": edits}],
    }
    Path("/etc/cdi").mkdir(exist_ok=True)
    Path("/etc/cdi/bench.json").write_text(json.dumps(spec))
    name = containerd.new_id("cdi")
    containerd.ctr(
        *("run", "--detach", "--runtime", KATA, "--annotation", "cdi.k8s.io/vfio0=bench.local/disk=0"),
        *(BUSYBOX, name, "sh", "-c", "echo $PCIDEVICE_DISK >/address; exec sleep 100000"),
        timeout=PATIENCE,
    )
    assert driver(disk) == "vfio-pci"
    done = containerd.ctr(
        "task", "exec", "--exec-id", "e", name, "sh", "-c", f"{READ}; cat /address", timeout=60
    )
    assert done.out.startswith(SPARE_DISK)
    address = done.out[len(SPARE_DISK) :].decode().strip()
    assert address
    assert address != disk  # the guest's own
    (shim,) = [
        process.pid
        for process in leaks.own_processes(containerd.tag, str(containerd.root))
        if "containerd-shim-kata-v2" in str(process)
    ]
    os.kill(shim, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while driver(disk) != "nvme" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert driver(disk) == "nvme", containerd.log_tail()
    with here(disk).open("rb") as file:
        assert file.read(len(SPARE_DISK)) == SPARE_DISK
    containerd.remove(name, timeout=60)
    assert leaks.settle(before, snapshot, timeout=30) == {}
