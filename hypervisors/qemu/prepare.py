"""The devices that a VM under QEMU starts with: their daemons, and what is logged of everybody's words.

What: `add_cold` prepares one device and puts it among the VM's parts.
Invariants: a daemon gets ready while the rest is prepared; QEMU inherits its connected socket
(`hypervisors.qemu.launch`). What was started is in `parts`, whatever fails afterwards.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import structlog

from devices.config import BlockConfig, DeviceConfig, ShareFsConfig, VsockConfig
from devices.share_fs import Virtiofsd, is_noise
from devices.undo import UndoLog
from devices.vsock import HybridVsock, KernelVsock, reserve_cid
from devices.vsock_daemon import VsockDaemon
from hypervisors.qemu.cmdline import Placed
from hypervisors.qemu.hotplug import is_block_device
from hypervisors.qemu.parts import Parts

__all__ = ["VHOST_VSOCK", "add_cold", "log_console", "log_output"]

VHOST_VSOCK = "/dev/vhost-vsock"

_log = structlog.get_logger("qemu")


async def add_cold(parts: Parts, device: DeviceConfig, slot: int, *, state_dir: str, undo: UndoLog) -> None:
    """Raises HostError for what the host lacks."""
    match device:
        case ShareFsConfig():
            daemon = await Virtiofsd.start(device, state_dir, undo, log_output("virtiofsd"))
            parts.share_fs = daemon
            parts.daemons.append(daemon.child)
            parts.placed.append(Placed(device=device, slot=slot, fd=daemon.connection.fileno()))
        case VsockConfig():
            await _add_vsock(parts, device, slot, state_dir, undo)
        case BlockConfig():
            host_device = await asyncio.to_thread(is_block_device, device.path)
            parts.placed.append(Placed(device=device, slot=slot, host_device=host_device))
        case _:
            parts.placed.append(Placed(device=device, slot=slot))


async def _add_vsock(parts: Parts, device: VsockConfig, slot: int, state_dir: str, undo: UndoLog) -> None:
    if os.path.exists(VHOST_VSOCK):
        parts.vhost_fd, cid = reserve_cid(VHOST_VSOCK)
        parts.channel = KernelVsock(cid, home_call=device.home_call, diagnostics=parts.diagnostics)
        parts.placed.append(Placed(device=device, slot=slot, fd=parts.vhost_fd, cid=cid))
        return
    _log.info("no kernel vsock", device=VHOST_VSOCK, instead="vhost-device-vsock")
    parts.vsock = await VsockDaemon.start(device, state_dir, undo, log_output("vhost-device-vsock"))
    parts.daemons.append(parts.vsock.child)
    parts.channel = HybridVsock(parts.vsock.path, home_call=device.home_call, diagnostics=parts.diagnostics)
    parts.placed.append(Placed(device=device, slot=slot))  # its descriptor comes in `launch`


def log_output(name: str) -> Callable[[bytes], None]:
    """What a process says on stderr: a warning, unless it is known as noise."""

    def log(data: bytes) -> None:
        for line in data.decode("utf-8", "replace").splitlines():
            if line.strip():
                level = _log.debug if is_noise(line) else _log.warning
                level("stderr", source=name, line=line[:500])

    return log


def log_console(data: bytes) -> None:
    """What the guest says on its console."""
    for line in data.decode("utf-8", "replace").splitlines():
        if line.strip():
            _log.debug("console", line=line[:500])
