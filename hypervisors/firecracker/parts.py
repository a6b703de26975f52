"""What one VM under Firecracker is made of, and how its API is told of it before the start.

What: `Parts`, filled as far as the VM got; `configure` tells machine and devices and starts it, `load` has it
come out of a snapshot instead.
Why apart from `Firecracker`: that class is the trait, these are the two ways to begin.
Invariants: a part is here from the moment it exists; `Firecracker.cleanup` releases every part that is here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from devices.config import BlockConfig, ConsoleConfig, DeviceConfig, NetworkConfig, RngConfig, VsockConfig
from devices.threads import acquire
from devices.undo import Entry
from hypervisors.firecracker import boot
from hypervisors.firecracker.config import FirecrackerConfig
from hypervisors.firecracker.drives import Drives
from hypervisors.firecracker.jail import Den
from hypervisors.firecracker.report import Report
from hypervisors.parts import VmParts

__all__ = ["CALL", "SNAPSHOT", "Parts", "configure", "load"]

CALL = 10.0
"""Seconds for one call of the API."""
SNAPSHOT = 120.0
"""Seconds for one that takes as long as the VM's memory takes to be written."""
_START = 120.0  # InstanceStart loads the kernel; the deadline of `start_vm` comes first


@dataclass(slots=True)
class Parts(VmParts):
    """See the module's docstring. `cold`: the devices that were added before the start."""

    orderly: str = "the guest ended the VM"
    den: Den | None = None
    cold: list[DeviceConfig] = field(default_factory=list)
    drives: Drives | None = None
    report: Report = field(default_factory=Report)
    cgroups: list[Entry] = field(default_factory=list)

    def last_words(self) -> str:
        """Of its log, or what stopped it before it had one."""
        return self.report.log_tail or VmParts.last_words(self)

    def words(self) -> dict[str, str]:
        """Of its log."""
        return {"firecracker log": self.report.log_tail}


async def configure(parts: Parts, section: FirecrackerConfig) -> None:
    """Everything up to InstanceStart. Raises HypervisorError, OSError."""
    den, api = parts.den, parts.api
    assert den is not None
    assert api is not None
    kernel = await acquire(den.lend, section.kernel, "kernel")
    initrd = await acquire(den.lend, section.initrd, "initrd") if section.initrd else ""
    words = boot.kernel_command_line(
        section,
        console=any(isinstance(device, ConsoleConfig) for device in parts.cold),
        home_port=parts.channel.home_port if parts.channel else 0,
    )
    calls = list(boot.machine(section, kernel, initrd, words))
    calls += await _drives(parts, section)
    cards = 0
    for device in parts.cold:
        match device:
            case NetworkConfig():
                cards += 1  # Firecracker's names may have no dash, ours may
                calls.append(boot.network(section, f"card{cards}", device.tap, device.mac))
            case VsockConfig():
                vsock = {"guest_cid": boot.GUEST_CID, "uds_path": boot.VSOCK}
                calls.append(boot.Call("/vsock", vsock))
            case RngConfig():
                calls.append(boot.Call("/entropy", {}))
            case _:
                pass
    for call in calls:
        await api.put(call.path, call.body, timeout=CALL)
    await api.put("/actions", {"action_type": "InstanceStart"}, timeout=_START)


async def load(parts: Parts, section: FirecrackerConfig, state_file: str, memory_file: str) -> None:
    """The VM of a snapshot instead. Its disks are those it was saved with, by the same names."""
    den, api = parts.den, parts.api
    assert den is not None
    assert api is not None
    await _drives(parts, section)  # the saved state knows them by these names
    state = await acquire(den.lend, state_file, "device-state")
    memory = await acquire(den.lend, memory_file, "memory")
    body = {
        "snapshot_path": state,
        "mem_backend": {"backend_type": "File", "backend_path": memory},
        "resume_vm": True,
    }
    await api.put("/snapshot/load", body, timeout=SNAPSHOT)


async def _drives(parts: Parts, section: FirecrackerConfig) -> list[boot.Call]:
    assert parts.den is not None
    parts.drives = Drives(section, parts.den)
    disks = [device for device in parts.cold if isinstance(device, BlockConfig)]
    return await parts.drives.boot_with(disks)
