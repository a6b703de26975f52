"""What Firecracker is told: argv, kernel parameters and API bodies, byte for byte."""

from __future__ import annotations

import pytest

from hypervisors.firecracker import boot
from hypervisors.firecracker.config import FirecrackerConfig
from hypervisors.rate_limits import rate_limiter

_SECTION = FirecrackerConfig(
    path="/usr/bin/firecracker",
    jailer_path="/usr/bin/jailer",
    jailer_uid=12,
    jailer_gid=34,
    image="/img",
    default_vcpus=1.5,
    default_memory=256,
)


def test_argv() -> None:
    assert boot.arguments(_SECTION) == ["/usr/bin/firecracker", "--api-sock", "fc.sock"]
    assert boot.arguments(_SECTION, jail="abc", base="/j", owner=(12, 34)) == [
        *("/usr/bin/jailer", "--id", "abc", "--exec-file", "/usr/bin/firecracker"),
        *("--uid", "12", "--gid", "34", "--cgroup-version", "2", "--cgroup", "pids.max=64"),
        *("--chroot-base-dir", "/j", "--", "--api-sock", "fc.sock"),
    ]


def test_seccomp_is_on_unless_it_is_switched_off() -> None:
    assert boot.arguments(FirecrackerConfig(path="/fc", disable_seccomp=True))[-1] == "--no-seccomp"


def test_the_configurations_kernel_parameters_come_last() -> None:
    section = FirecrackerConfig(image="/img", kernel_params="quiet=no a.b=c")
    words = boot.kernel_command_line(section, console=True, home_port=1028).split()
    assert words[0] == "console=ttyS0"
    assert words[-3:] == ["agent.home_vport=1028", "quiet=no", "a.b=c"]
    assert "root=/dev/vda" in words


def test_the_machine() -> None:
    source, size = boot.machine(_SECTION, "kernel", "", "words")
    assert source == boot.Call("/boot-source", {"kernel_image_path": "kernel", "boot_args": "words"})
    assert size == boot.Call("/machine-config", {"vcpu_count": 2, "mem_size_mib": 256})


def test_disks_and_cards_have_the_configurations_limits() -> None:
    section = FirecrackerConfig(
        disk_rate_limiter_bw_max_rate=8000,
        disk_rate_limiter_bw_one_time_burst=80,
        disk_rate_limiter_ops_max_rate=50,
        tx_rate_limiter_max_rate=16_000,
    )
    assert boot.drive(section, "drive1", "disk", read_only=True) == boot.Call(
        "/drives/drive1",
        {
            "drive_id": "drive1",
            "path_on_host": "disk",
            "is_root_device": False,
            "is_read_only": True,
            "rate_limiter": {
                "bandwidth": {"size": 1000, "refill_time": 1000, "one_time_burst": 10},
                "ops": {"size": 50, "refill_time": 1000},
            },
        },
    )
    card = boot.network(section, "net0", "tap0", "02:00:00:00:00:01")
    assert card.body["tx_rate_limiter"] == {"bandwidth": {"size": 2000, "refill_time": 1000}}
    assert "rx_rate_limiter" not in card.body


@pytest.mark.parametrize("bits", [1, 7, 8])
def test_a_limit_is_never_rounded_to_none(bits: int) -> None:
    section = FirecrackerConfig(disk_rate_limiter_bw_max_rate=bits)
    body = boot.drive(section, "drive0", "x", read_only=True).body
    assert body["rate_limiter"] == {"bandwidth": {"size": 1, "refill_time": 1000}}
    assert rate_limiter() is None
