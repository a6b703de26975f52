"""What Dragonball is told of each device: all fields, as its library wants them."""

from __future__ import annotations

import pytest

from devices.config import (
    BlockConfig,
    BlockFormat,
    BlockOptions,
    ConsoleConfig,
    IoLimits,
    NetworkConfig,
    VhostUserBlkConfig,
    VsockConfig,
)
from devices.errors import UnsupportedByHypervisor
from hypervisors.dragonball.config import DragonballConfig
from hypervisors.dragonball.recipes import arguments, command_line, machine, plug

SECTION = DragonballConfig(path="/bin/process", default_memory=257)
CARD = NetworkConfig(id="card", mac="02:00:00:00:00:01", tap="tap0")


def test_its_log_is_louder_when_somebody_looks() -> None:
    assert arguments(SECTION, api=7) == ["/bin/process", "--api", "fd=7", "--log", "warn"]
    assert arguments(DragonballConfig(enable_debug=True), api=7)[-1] == "info"


def test_without_a_console_the_guest_has_no_serial_port() -> None:
    words = command_line(DragonballConfig(default_vcpus=2.5), console=False, home_port=0).split()
    assert words[0] == "8250.nr_uarts=0"
    assert "nr_cpus=3" in words
    assert not any(word.startswith(("root=", "agent.")) for word in words)


def test_memory_is_even() -> None:
    name, fields = machine(SECTION)
    assert (name, fields["mem_size_mib"], fields["max_vcpu_count"]) == ("SetVmConfiguration", 258, 1)


def test_a_disk_has_all_fields() -> None:
    options = BlockOptions(direct=True, queues=4, queue_size=64, limits=IoLimits(bytes=1000, bytes_burst=7))
    made = plug(BlockConfig(id="disk", path="/disk", options=options), SECTION)
    assert made is not None
    name, fields = made
    assert name == "InsertBlockDevice"
    assert fields == {
        "drive_id": "disk",
        "device_type": "RawBlock",
        "path_on_host": "/disk",
        "is_root_device": False,
        "part_uuid": None,
        "is_read_only": False,
        "is_direct": True,
        "no_drop": False,
        "sparse": True,
        "num_queues": 1,  # no more than vCPUs
        "queue_size": 64,
        "rate_limiter": {
            "bandwidth": {"size": 1000, "one_time_burst": 7, "refill_time": 1000},
            "ops": {"size": 0, "one_time_burst": 0, "refill_time": 0},
        },
        "use_shared_irq": None,
        "use_generic_irq": None,
        "use_pci_bus": None,
    }


def test_a_served_disk_is_named_by_its_socket() -> None:
    made = plug(VhostUserBlkConfig(id="disk", path="/theirs", queues=2), SECTION, "/ours")
    assert made is not None
    assert (made[1]["path_on_host"], made[1]["device_type"]) == ("spdk:///ours", "Spdk")
    assert made[1]["num_queues"] == 2


def test_a_card_is_vhosts_or_has_limits() -> None:
    made = plug(CARD, SECTION)
    assert made is not None
    assert made[1]["backend"]["type"] == "vhost"
    assert (made[1]["guest_mac"], made[1]["backend"]["host_dev_name"]) == (CARD.mac, "tap0")
    made = plug(CARD, DragonballConfig(disable_vhost_net=True, rx_rate_limiter_max_rate=80_001))
    assert made is not None
    backend = made[1]["backend"]
    assert (backend["type"], backend["tx_rate_limiter"]) == ("virtio", None)
    assert backend["rx_rate_limiter"]["bandwidth"]["size"] == 10_001


def test_the_vsock_is_a_socket_and_a_console_is_there_anyway() -> None:
    made = plug(VsockConfig(), SECTION, "/vsock")
    assert made is not None
    assert (made[1]["guest_cid"], made[1]["uds_path"], made[1]["tcp_addr"]) == (3, "/vsock", None)
    assert plug(ConsoleConfig(), SECTION) is None


@pytest.mark.parametrize(
    "device",
    [
        BlockConfig(id="disk", path="/disk", format=BlockFormat.QCOW2),
        BlockConfig(id="disk", path="/disk", options=BlockOptions(limits=IoLimits(read_ops=1))),
        NetworkConfig(id="card", mac=CARD.mac, tap_fds=(9,)),
    ],
)
def test_what_it_cannot_is_refused(device: BlockConfig | NetworkConfig) -> None:
    with pytest.raises(UnsupportedByHypervisor):
        plug(device, SECTION)
