"""How the disks of one sandbox are served: the configuration's choices, made into `BlockConfig`s.

What: `disk_style` reads them from the hypervisor's section, `DiskStyle.disk` describes one disk.
Why one place: root file systems, volumes and devices of containers are disks alike, whoever asks for them.
Invariants: the guest's own image is not one of them. With `block_device_driver = "virtio-pmem"` what is
read-only and can be memory is memory; all else is a disk, because memory could not refuse a write.
Source: Kata's keys (facts/kata.md 5.2).
"""

from __future__ import annotations

import dataclasses
import os
import stat
from typing import Any

from devices.config import BlockConfig, BlockOptions, IoLimits, VhostUserBlkConfig
from devices.kinds import Kind
from devices.threads import look
from hypervisors.config import DiskSection, HypervisorConfig
from proto import agent_pb2

__all__ = ["PMEM_MODULES", "DiskStyle", "disk_style"]

PMEM_MODULES = ("nfit", "nd_pmem")
"""What the guest must have loaded before a disk comes as memory: it does not look for it afterwards."""
_KINDS = {"virtio-scsi": Kind.SCSI, "virtio-pmem": Kind.PMEM}
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclasses.dataclass(frozen=True, slots=True)
class DiskStyle:
    """What all disks of a sandbox have in common. `store`: where vhost-user back ends are listed, "" for
    nowhere (`shim.resources.vhost_user_store`)."""

    driver: Kind = Kind.BLK
    options: BlockOptions = dataclasses.field(default_factory=BlockOptions)
    store: str = ""

    async def disk(
        self, name: str, path: str, *, read_only: bool, ours: bool = False, limits: IoLimits | None = None
    ) -> BlockConfig:
        """One disk; `limits` instead of the configuration's. Its file is looked at, nothing refused yet."""
        driver = self.driver
        if driver is Kind.PMEM and not (read_only and await look(_can_be_memory, path)):
            driver = Kind.BLK
        options = self.options if limits is None else dataclasses.replace(self.options, limits=limits)
        return BlockConfig(id=name, path=path, read_only=read_only, driver=driver, options=options, ours=ours)

    def served(self, name: str, socket: str) -> VhostUserBlkConfig:
        """A disk of the vhost-user back end that listens there. Who serves it decides whether it can be
        written."""
        queues, size = self.options.queues or 1, self.options.queue_size or 128
        return VhostUserBlkConfig(id=name, path=socket, queues=queues, queue_size=size)

    def modules(self) -> list[agent_pb2.KernelModule]:
        """What the guest's kernel has to load when the sandbox is made."""
        return [agent_pb2.KernelModule(name=name) for name in PMEM_MODULES if self.driver is Kind.PMEM]


def _can_be_memory(path: str) -> bool:
    try:
        info = os.stat(path)
    except OSError:
        return False
    return stat.S_ISREG(info.st_mode) and info.st_size > 0 and info.st_size % _PAGE == 0


def disk_style(section: Any) -> DiskStyle:
    """From [hypervisor.NAME]. A VMM whose section mixes in no DiskSection serves disks in its own way."""
    if not isinstance(section, DiskSection):
        return DiskStyle()
    limits = IoLimits(
        bytes=-(-section.disk_rate_limiter_bw_max_rate // 8),
        bytes_burst=section.disk_rate_limiter_bw_one_time_burst // 8,
        ops=section.disk_rate_limiter_ops_max_rate,
        ops_burst=section.disk_rate_limiter_ops_one_time_burst,
    )
    options = BlockOptions(
        direct=section.block_device_cache_set and section.block_device_cache_direct,
        queues=section.num_queues,
        queue_size=section.queue_size,
        limits=limits,
    )
    if isinstance(section, HypervisorConfig):
        options = dataclasses.replace(
            options,
            no_flush=section.block_device_cache_set and section.block_device_cache_noflush,
            aio=section.block_device_aio,
            logical_sector=section.block_device_logical_sector_size,
            physical_sector=section.block_device_physical_sector_size,
            io_thread=section.enable_iothreads,
        )
    store = section.vhost_user_store_path if section.enable_vhost_user_store else ""
    return DiskStyle(_KINDS.get(section.block_device_driver, Kind.BLK), options, store)
