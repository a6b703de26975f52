"""What has to be so before QEMU gets a device of VFIO: locked memory, and iommufd where it is asked for.

What: `admit` raises QEMU's RLIMIT_MEMLOCK, and finds out whether this host and this QEMU know iommufd.
Why: a device reads and writes the guest's memory at any time, so all of it is pinned when the first one
comes; QEMU's own error for a limit is a hexadecimal address.
Invariants: nothing is done for a process that may lock what it likes (CAP_IPC_LOCK). No limit is lowered.
Source: Documentation/driver-api/vfio.rst, Documentation/userspace-api/iommufd.rst; capabilities(7),
setrlimit(2); QEMU's docs/devel/vfio-iommufd.rst (QEMU 9; iommufd came with 8.2).
"""

from __future__ import annotations

import asyncio
import os
import resource

from devices.config import VfioConfig
from devices.errors import HostError, UnsupportedByHypervisor
from hypervisors.qemu.qmp import QmpClient

__all__ = ["admit", "locked_bytes", "may_lock", "raise_limit"]

IOMMU = "/dev/iommu"
_OBJECT = "iommufd"
_CAP_IPC_LOCK = 14
_ROOM = 1 << 30  # bytes beside the guest's memory: its devices' own
_PROBE = 10.0  # seconds
_PHASE = "devices"


async def admit(
    device: VfioConfig, *, program: str, memory: int, qmp: QmpClient | None, pid: int, iommu: str = IOMMU
) -> None:
    """Raise HostError, UnsupportedByHypervisor if QEMU could not have it.

    `memory`: the most MiB that the VM can have, as often as it is mapped; `qmp`, `pid`: of the running QEMU,
    None and 0 before.
    """
    if device.iommufd:
        if not os.path.exists(iommu):
            raise HostError(
                f"{device.address} is to be passed by iommufd, and this host has no {iommu}",
                phase=_PHASE,
                hint="Linux has it from 6.2 on (CONFIG_IOMMUFD); pass /dev/vfio/<group> instead",
            )
        if not await (_asks(qmp) if qmp is not None else _says(program)):
            raise UnsupportedByHypervisor(
                "qemu", f"{_OBJECT}, for {device.address}: {program} is older than 8.2"
            )
    if not may_lock():
        raise_limit(pid, locked_bytes(memory))


async def _asks(qmp: QmpClient) -> bool:
    """Whether the running QEMU has such an object."""
    return bool(await qmp.execute("qom-list-types", {"implements": _OBJECT}))


async def _says(program: str) -> bool:
    """Whether the program lists it among its objects."""
    process = await asyncio.create_subprocess_exec(
        program,
        *("-object", "help"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(_PROBE):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise HostError(f"{program} -object help did not end within {_PROBE:g} s", phase=_PHASE) from None
    return _OBJECT in output.decode(errors="replace").split()


def locked_bytes(memory: int) -> int:
    """What a VM with so many MiB may have to lock."""
    return (memory << 20) + _ROOM


def may_lock(status: str = "/proc/self/status") -> bool:
    """Whether we, and so QEMU, may lock any amount of memory."""
    with open(status, encoding="ascii", errors="replace") as file:
        words = next((line.split() for line in file if line.startswith("CapEff:")), ["", "0"])
    return bool(int(words[1], 16) >> _CAP_IPC_LOCK & 1)


def raise_limit(pid: int, wanted: int) -> None:
    """Let a process (0: us, and what we start) lock so many bytes. Raises HostError if it must not."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= wanted:
        return
    try:
        most = hard if hard == unlimited or hard >= wanted else wanted
        resource.prlimit(pid, resource.RLIMIT_MEMLOCK, (wanted, most))
    except (PermissionError, ValueError) as error:
        raise HostError(
            f"a device of VFIO needs all of the VM's memory locked, {wanted >> 20} MiB, and the limit is"
            f" {hard >> 20} MiB",
            phase=_PHASE,
            hint="LimitMEMLOCK=infinity in containerd's unit, or a smaller default_maxmemory",
        ) from error
