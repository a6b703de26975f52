"""The configuration's choices are those of every disk of the sandbox."""

from __future__ import annotations

from pathlib import Path

import pytest

from devices.config import BlockOptions, IoLimits
from devices.kinds import Kind
from hypervisors.config import HypervisorConfig, SandboxSection
from shim.resources.disks import disk_style


async def test_kata_s_keys_are_the_disks_options() -> None:
    style = disk_style(
        HypervisorConfig(
            block_device_driver="virtio-scsi",
            block_device_aio="native",
            block_device_cache_set=True,
            block_device_cache_direct=True,
            num_queues=2,
            queue_size=64,
            enable_iothreads=True,
            disk_rate_limiter_bw_max_rate=81,
            disk_rate_limiter_ops_max_rate=7,
            disk_rate_limiter_ops_one_time_burst=70,
        )
    )
    disk = await style.disk("d", "/nope", read_only=False)

    assert disk.kind is Kind.SCSI
    limits = IoLimits(bytes=11, ops=7, ops_burst=70)  # bits, and never less than asked for
    assert disk.options == BlockOptions(
        direct=True, aio="native", queues=2, queue_size=64, io_thread=True, limits=limits
    )
    assert style.modules() == []
    own = await style.disk("d", "/nope", read_only=False, limits=IoLimits(read_ops=1))
    assert own.options.limits == IoLimits(read_ops=1)


def test_cache_keys_count_only_if_they_are_said_to() -> None:
    options = disk_style(
        HypervisorConfig(block_device_cache_direct=True, block_device_cache_noflush=True)
    ).options
    assert (options.direct, options.no_flush) == (False, False)


def test_a_vmm_without_such_keys_serves_disks_its_own_way() -> None:
    assert disk_style(SandboxSection()).options == BlockOptions()


@pytest.mark.parametrize(
    ("size", "read_only", "kind"),
    [(8192, True, Kind.PMEM), (8192, False, Kind.BLK), (8193, True, Kind.BLK), (0, True, Kind.BLK)],
)
async def test_only_what_can_be_memory_is(tmp_path: Path, size: int, read_only: bool, kind: Kind) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(size))
    style = disk_style(HypervisorConfig(block_device_driver="virtio-pmem"))

    assert (await style.disk("d", str(path), read_only=read_only)).kind is kind
    assert [module.name for module in style.modules()] == ["nfit", "nd_pmem"]
