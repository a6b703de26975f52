"""What has to be so before QEMU gets a device of VFIO: locked memory, and iommufd where it is asked for.

What: `let_in` makes all of it so: `admit` finds out whether this host and this QEMU know iommufd,
`locked_bytes` is what QEMU must be able to lock, and `raise_limit` lets a running one.
Why: a device reads and writes the guest's memory at any time, so all of it is pinned when the first one
comes; QEMU's own error for a limit is a hexadecimal address.
Invariants: QEMU has no capability to lock what it likes, so the limit counts. No limit is lowered.
Source: Documentation/driver-api/vfio.rst, Documentation/userspace-api/iommufd.rst; capabilities(7),
setrlimit(2); QEMU's docs/devel/vfio-iommufd.rst (QEMU 9; iommufd came with 8.2).
"""

from __future__ import annotations

import os
import resource

import structlog

from devices.child import Child
from devices.config import BalloonConfig, VfioConfig
from devices.confine import Confinement
from devices.errors import HostError, UnsupportedByHypervisor
from devices.threads import acquire
from devices.undo import UndoLog
from hypervisors.qemu.cmdline import Plan
from hypervisors.qemu.confinement import lend_nodes
from hypervisors.qemu.parts import Parts
from hypervisors.qemu.qmp import QmpClient

__all__ = ["admit", "let_in", "locked_bytes", "raise_limit"]

_log = structlog.get_logger("qemu")

IOMMU = "/dev/iommu"
_OBJECT = "iommufd"
_ROOM = 1 << 30  # bytes beside the guest's memory: its devices' own
_PROBE = 10.0  # seconds
_PHASE = "devices"


async def let_in(
    device: VfioConfig, parts: Parts, plan: Plan, count: int, *, undo: UndoLog, user: int
) -> None:
    """The VM is about to get this device, its `count`th; `user`: QEMU's. Raises HostError,
    UnsupportedByHypervisor."""
    if count == 1 and any(isinstance(one.device, BalloonConfig) for one in parts.placed):
        _log.warning("the VM gives no free memory back from now on: a device of VFIO pins all of it")
    await admit(device, program=plan.section.path, qmp=parts.qmp, undo=undo)
    # Behind an IOMMU in the guest each device has mappings of its own.
    parts.locked = locked_bytes(plan.max_memory * (count if plan.section.enable_iommu else 1))
    if parts.process is not None:
        raise_limit(parts.process.pid, parts.locked)
        await acquire(lend_nodes, parts.process.pid, device, user)


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
