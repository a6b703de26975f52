"""Each device's body says what Cloud Hypervisor would guess, and no more than it takes."""

from __future__ import annotations

import pytest

from devices.config import (
    BlockConfig,
    BlockFormat,
    BlockOptions,
    IoLimits,
    NetworkConfig,
    ProtectionConfig,
    ShareFsConfig,
    VfioConfig,
    VhostUserBlkConfig,
    VhostUserNetConfig,
)
from devices.errors import BugError, UnsupportedByHypervisor
from hypervisors.cloud_hypervisor.config import ClhConfig
from hypervisors.cloud_hypervisor.recipes import arguments, command_line, machine, plug

SECTION = ClhConfig(path="/clh", kernel="/kernel", default_vcpus=2, default_memory=256)


def test_its_sockets_are_inherited_and_its_filter_is_on() -> None:
    assert arguments(SECTION, api=5, events=6) == [
        *("/clh", "--api-socket", "fd=5", "--event-monitor", "fd=6", "--seccomp", "true")
    ]
    assert arguments(ClhConfig(disable_seccomp=True), api=5, events=6)[-1] == "false"


def test_a_disk_says_its_format_and_has_no_more_queues_than_vcpus() -> None:
    options = BlockOptions(
        queues=8, queue_size=256, direct=True, limits=IoLimits(bytes=1000, ops=50, ops_burst=7)
    )
    call, key, body = plug(BlockConfig(id="disk", path="/disk", serial="s", options=options), SECTION)
    assert (call, key) == ("vm.add-disk", "disks")
    assert body == {
        "id": "disk",
        "path": "/disk",
        "readonly": False,
        "direct": True,
        "image_type": "Raw",
        "num_queues": 2,
        "queue_size": 256,
        "sparse": True,
        "serial": "s",
        "rate_limiter_config": {
            "bandwidth": {"size": 1000, "refill_time": 1000},
            "ops": {"size": 50, "refill_time": 1000, "one_time_burst": 7},
        },
    }
    assert plug(BlockConfig(id="disk", path="/disk", read_only=True), SECTION)[2]["sparse"] is False


@pytest.mark.parametrize(
    ("device", "words"),
    [
        (BlockConfig(id="disk", path="/disk", format=BlockFormat.QCOW2), "of format qcow2"),
        (
            BlockConfig(id="disk", path="/disk", options=BlockOptions(limits=IoLimits(read_ops=1))),
            "one direction only",
        ),
        (NetworkConfig(id="net", mac="02:00:00:00:00:01", tap="tap0"), "without descriptors of its tap"),
    ],
)
def test_what_it_has_not_is_refused(device: BlockConfig | NetworkConfig, words: str) -> None:
    with pytest.raises(UnsupportedByHypervisor, match=words):
        plug(device, SECTION)


def test_what_is_served_from_outside_is_met_at_its_socket() -> None:
    share = plug(ShareFsConfig(source="/share"), SECTION, "/sock")
    assert share == (
        "vm.add-fs",
        "fs",
        {"id": "share-fs", "tag": "kataShared", "socket": "/sock", "num_queues": 1, "queue_size": 1024},
    )
    _, key, disk = plug(VhostUserBlkConfig(id="spdk", path="/theirs", queues=8), SECTION, "/ours")
    assert (key, disk["vhost_user"], disk["vhost_socket"], disk["num_queues"]) == ("disks", True, "/ours", 2)
    card = VhostUserNetConfig(id="dpdk", path="/theirs", mac="02:00:00:00:00:01", queues=2)
    _, key, body = plug(card, SECTION, "/ours")
    assert (key, body["vhost_socket"], body["num_queues"]) == ("net", "/ours", 4)
    passed = plug(VfioConfig(id="gpu", address="0000:01:00.0"), SECTION)
    assert passed == ("vm.add-device", "devices", {"id": "gpu", "path": "/sys/bus/pci/devices/0000:01:00.0/"})
    with pytest.raises(BugError):
        plug(ProtectionConfig(technology="sev"), SECTION)


def test_landlock_leaves_it_the_sandboxs_sockets() -> None:
    locked = machine(ClhConfig(landlock=True), "", console=False, folder="/state")
    assert locked["landlock_enable"] is True
    assert locked["landlock_rules"] == [{"path": "/state", "access": "rw"}]
    assert "landlock_enable" not in machine(SECTION, "", console=False, folder="/state")


def test_memory_that_comes_later_is_used_at_once() -> None:
    grows = ClhConfig(default_memory=256, default_maxmemory=600, enable_virtio_mem=True)
    memory = machine(grows, "", console=True, folder="/")["memory"]
    assert (memory["hotplug_method"], memory["hotplug_size"]) == ("VirtioMem", 256 << 20)
    assert "memhp_default_state=online" in command_line(grows, console=True, home_port=0)
    quiet = command_line(SECTION, console=False, home_port=0)
    assert quiet.startswith("8250.nr_uarts=0 reboot=k")
    assert "memhp" not in quiet
