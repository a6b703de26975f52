"""What a disk's options become for QEMU: each in its place, none unless it was asked for."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from devices.config import BlockConfig, BlockFormat, BlockOptions, IoLimits
from devices.errors import BugError, HostError
from devices.kinds import Kind
from hypervisors.qemu.prepare import open_disk
from hypervisors.qemu.recipes import Placed, Recipe, argv, recipe, throttle


def made(placed: dict[str, Any] | None = None, **fields: Any) -> Recipe:
    disk = BlockConfig(id="d", path="/d.img", **fields)
    return recipe(Placed(device=disk, at={"bus": "b", "addr": "0x1"}, **(placed or {})))


def test_a_plain_disk_has_nothing_else() -> None:
    disk = made(read_only=True)
    assert disk.front == {"driver": "virtio-blk-pci", "drive": "node-d", "id": "d", "bus": "b", "addr": "0x1"}
    (node,) = [back_end.properties for back_end in disk.back_ends]
    assert node == {
        "driver": "raw",
        "node-name": "node-d",
        "read-only": True,
        "file": {"driver": "file", "filename": "/d.img", "read-only": True},
    }


def test_every_option_has_its_place() -> None:
    options = BlockOptions(
        direct=True,
        no_flush=True,
        aio="native",
        queues=4,
        queue_size=256,
        logical_sector=4096,
        physical_sector=8192,
        io_thread=True,
    )
    disk = made({"host_device": True}, options=options, serial="s")
    assert disk.front == {
        "driver": "virtio-blk-pci",
        "drive": "node-d",
        "serial": "s",
        "num-queues": 4,
        "queue-size": 256,
        "iothread": "disks",
        "werror": "report",
        "logical_block_size": 4096,
        "physical_block_size": 8192,
        "id": "d",
        "bus": "b",
        "addr": "0x1",
    }
    (node,) = [back_end.properties for back_end in disk.back_ends]
    cache = {"direct": True, "no-flush": True}
    assert (node["cache"], node["discard"]) == (cache, "unmap")
    assert node["file"] == {
        "driver": "host_device",
        "filename": "/d.img",
        "read-only": False,
        "aio": "native",
        "discard": "unmap",
        "cache": cache,
    }


def test_limits_lie_above_the_image_and_go_before_it() -> None:
    disk = made(options=BlockOptions(limits=IoLimits(bytes=10, bytes_burst=50)), format=BlockFormat.QCOW2)
    group, node, above = disk.back_ends
    assert [back_end.name for back_end in disk.back_ends] == ["limits-d", "image-d", "node-d"]
    assert (group.option, node.option, above.option) == ("object", "blockdev", "blockdev")
    assert group.properties["limits"]["bps-total"] == 10
    assert node.properties["backing"] is None
    assert (above.properties["throttle-group"], above.properties["file"]) == ("limits-d", "image-d")


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (IoLimits(), {}),
        (IoLimits(bytes=8, bytes_burst=4), {"bps-total": 8}),  # QEMU refuses a burst below its rate
        (IoLimits(ops=8, ops_burst=9), {"iops-total": 8, "iops-total-max": 9}),
        (IoLimits(bytes_burst=9), {}),
        (IoLimits(bytes=8, read_bytes=3, ops=5), {"bps-read": 3, "iops-total": 5}),
    ],
)
def test_limits_that_qemu_takes(limits: IoLimits, words: dict[str, int]) -> None:
    assert {key: value for key, value in throttle(limits).items() if value} == words


def test_scsi_and_memory() -> None:
    disk = made(driver=Kind.SCSI, options=BlockOptions(queues=4, logical_sector=4096))
    assert disk.front["driver"] == "scsi-hd"
    assert "num-queues" not in disk.front  # the controller's
    assert disk.front["logical_block_size"] == 4096
    memory = made({"bytes": 8192}, driver=Kind.PMEM, read_only=True)
    assert (memory.front["driver"], memory.front["unarmed"]) == ("nvdimm", True)
    (backend,) = [back_end.properties for back_end in memory.back_ends]
    assert (backend["readonly"], backend["share"], backend["size"]) == (True, True, 8192)


def test_an_open_disk_is_given_as_a_descriptor_of_a_set() -> None:
    """QEMU opens no path of the host: it has the file before the disk, and by QMP both go in reverse."""
    disk = made({"file": 9, "fdset": 3}, read_only=True)
    given, node = disk.back_ends
    assert (given.option, given.name, given.fds) == ("add-fd", "3", {"fd": (9,)})
    assert node.properties["file"]["filename"] == "/dev/fdset/3"
    assert argv(disk)[:2] == ["-add-fd", "set=3,fd=9"]
    assert "/d.img" not in str(argv(disk))


@pytest.mark.parametrize("direct", [False, True])
def test_a_disk_is_open_as_its_node_wants_it(tmp_path: Path, direct: bool) -> None:
    """QEMU 9.1 and later take no other descriptor of a set."""
    path = tmp_path / "d.img"
    path.write_bytes(bytes(4096))
    file = open_disk(BlockConfig(id="d", path=str(path), options=BlockOptions(direct=direct)))
    try:
        assert bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT) is direct
    finally:
        os.close(file)


def test_a_file_system_without_direct_access_is_named() -> None:
    with pytest.raises(HostError, match="leave out block_device_cache_direct"):
        open_disk(
            BlockConfig(id="d", path="/proc/version", read_only=True, options=BlockOptions(direct=True))
        )


def test_a_disk_that_becomes_memory_is_opened_again() -> None:
    """QEMU takes no descriptor for it: it gets the path of its own one."""
    memory = made({"file": 9, "fdset": 3, "bytes": 8192}, driver=Kind.PMEM, read_only=True)
    (backend,) = memory.back_ends
    assert (backend.fds, backend.reopens) == ({"mem-path": (9,)}, 3)
    assert json.loads(argv(memory)[1])["mem-path"] == "/proc/self/fd/9"


def test_other_words_are_none() -> None:
    with pytest.raises(BugError):
        BlockOptions(aio="posix")
    with pytest.raises(BugError):
        BlockConfig(id="d", path="/d", driver=Kind.NET)
