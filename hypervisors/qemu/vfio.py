"""What has to be so before QEMU gets a device of VFIO: locked memory, and iommufd where it is asked for.

What: `admit` finds out whether this host and this QEMU know iommufd; `locked_bytes` is what QEMU must be able
to lock, and `raise_limit` lets a running one.
Why: a device reads and writes the guest's memory at any time, so all of it is pinned when the first one
comes; QEMU's own error for a limit is a hexadecimal address.
Invariants: QEMU has no capability to lock what it likes, so the limit counts. No limit is lowered.
Source: Documentation/driver-api/vfio.rst, Documentation/userspace-api/iommufd.rst; capabilities(7),
setrlimit(2); QEMU's docs/devel/vfio-iommufd.rst (QEMU 9; iommufd came with 8.2).
"""

from __future__ import annotations

import os
import resource

from devices.child import Child
from devices.config import VfioConfig
from devices.confine import Confinement
from devices.errors import HostError, UnsupportedByHypervisor
from devices.undo import UndoLog
from hypervisors.qemu.qmp import QmpClient

__all__ = ["admit", "locked_bytes", "raise_limit"]

IOMMU = "/dev/iommu"
_OBJECT = "iommufd"
_ROOM = 1 << 30  # bytes beside the guest's memory: its devices' own
_PROBE = 10.0  # seconds
_PHASE = "devices"


async def admit(
    device: VfioConfig, *, program: str, qmp: QmpClient | None, undo: UndoLog, iommu: str = IOMMU
) -> None:
    """Raise HostError, UnsupportedByHypervisor if QEMU could not have it. `qmp`: of the running QEMU."""
    if device.iommufd:
        if not os.path.exists(iommu):
            raise HostError(
                f"{device.address} is to be passed by iommufd, and this host has no {iommu}",
                phase=_PHASE,
                hint="Linux has it from 6.2 on (CONFIG_IOMMUFD); pass /dev/vfio/<group> instead",
            )
        if not await (_asks(qmp) if qmp is not None else _says(program, undo)):
            raise UnsupportedByHypervisor(
                "qemu", f"{_OBJECT}, for {device.address}: {program} is older than 8.2"
            )


async def _asks(qmp: QmpClient) -> bool:
    """Whether the running QEMU has such an object."""
    return bool(await qmp.execute("qom-list-types", {"implements": _OBJECT}))


async def _says(program: str, undo: UndoLog) -> bool:
    """Whether the program lists it among its objects."""
    child = await Child.spawn([program, "-object", "help"], name="qemu", undo=undo, confinement=Confinement())
    try:
        await child.wait(_PROBE)
    except TimeoutError:
        raise HostError(f"{program} -object help did not end within {_PROBE:g} s", phase=_PHASE) from None
    finally:
        await child.kill()
    return _OBJECT in child.stderr_tail(1000).split()


def locked_bytes(memory: int) -> int:
    """What a VM with so many MiB, as often as they are mapped, may have to lock."""
    return (memory << 20) + _ROOM


def raise_limit(pid: int, wanted: int) -> None:
    """Let a process lock so many bytes. Raises HostError if it must not."""
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
