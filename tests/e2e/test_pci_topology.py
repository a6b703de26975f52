"""A device is where the guest was told to look for it: the guest path agrees with what `lspci` reads in the
guest, in slots beyond ten too, whose number is hexadecimal."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from devices.config import BlockConfig
from devices.errors import HypervisorError
from tests.e2e.vms import Boot

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="virtiofsd needs root"), pytest.mark.kata_only]

DISKS = 19  # a root port, two ports of a switch, and sixteen slots of the bridge: 01 to 10, hexadecimal


async def test_lspci_shows_what_the_guest_paths_say(boot: Boot, tmp_path: Path) -> None:
    vm, guest, manager = await boot(pcie_root_port=1, pcie_switch_port=2, default_bridges=1)
    paths = {}
    for number in range(DISKS):
        path = tmp_path / f"disk{number}"
        path.write_bytes(bytes(4096 * (number + 1)))  # its size says which it is
        name = await manager.try_add_device(BlockConfig(id=f"disk{number}", path=str(path)), vm)
        paths[(number + 1) * 8] = (await manager.generate_agent_device(name)).id
    assert sorted(paths.values())[-3:] == ["07/0e", "07/0f", "07/10"]

    # The guest has no lspci, but the list that lspci reads: bus, slot and function as one number.
    script = (
        "cut -f 1 /proc/bus/pci/devices;"
        "for d in /sys/block/vd*; do echo $(cat $d/size) $(readlink -f $d/device); done"
    )
    code, out, _ = await guest.run("sh", "-c", script)
    assert code == 0
    numbers = [int(word, 16) for word in re.findall(r"^[0-9a-f]{4}$", out.decode(), re.MULTILINE)]
    listed = {f"{number >> 8:02x}:{number >> 3 & 0x1F:02x}.{number & 7}" for number in numbers}
    found = {}
    for size, where in re.findall(r"^(\d+) (/sys/devices/\S+)$", out.decode(), re.MULTILINE):
        functions = re.findall(r"0000:([0-9a-f]{2}):([0-9a-f]{2})\.0/", where)
        bus, slot = functions[-1]
        assert f"{bus}:{slot}.0" in listed
        found[int(size)] = "/".join(slot for _, slot in functions)
    assert {size: found[size] for size in paths} == paths

    shared = tmp_path / "shared"
    shared.write_bytes(bytes(4096))
    free = vm._places.topology.free()
    for number in range(free):
        await vm.add_device(BlockConfig(id=f"more{number}", path=str(shared), read_only=True))
    with pytest.raises(HypervisorError, match="no free PCI slot") as caught:
        await vm.add_device(BlockConfig(id="one-too-many", path=str(shared), read_only=True))
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    assert "default_bridges" in str(caught.value)
