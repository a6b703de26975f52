"""What a device needs before QEMU gets it: a daemon, a descriptor; and what is logged of everybody's words.

What: `prepare` makes a `Placed` of a device, for the start and for hot-plug alike. QEMU opens nothing of the
host itself: disks are opened here.
Invariants: a daemon gets ready while the rest is prepared; QEMU inherits its connected socket
(`hypervisors.qemu.launch`), or gets it by QMP. What was started is in `parts`, whatever fails afterwards.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

import structlog

from devices.config import (
    BlockConfig,
    BlockFormat,
    ConsoleConfig,
    DeviceConfig,
    PortConfig,
    ShareFsConfig,
    VhostUserBlkConfig,
    VhostUserNetConfig,
    VsockConfig,
)
from devices.console import Console
from devices.errors import CallerError, HostError
from devices.kinds import Kind
from devices.lines import LineLog
from devices.outlive import children_outlive
from devices.port import PortChannel
from devices.share_fs import Virtiofsd, is_noise
from devices.threads import acquire, look
from devices.undo import UndoLog
from devices.vsock import HybridVsock, KernelVsock, reserve_cid
from devices.vsock_daemon import VsockDaemon
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.confinement import meeting_place
from hypervisors.qemu.parts import Parts
from hypervisors.qemu.recipes import Placed

__all__ = ["CONSOLE", "VHOST_VSOCK", "close_memory", "log_output", "open_memory", "prepare"]

VHOST_VSOCK = "/dev/vhost-vsock"
CONSOLE = "console.sock"
"""In the state directory, where QEMU may outlive its shim."""

_log = structlog.get_logger("qemu")


async def prepare(
    parts: Parts, device: DeviceConfig, *, state_dir: str, undo: UndoLog, user: int, debug: bool, tcg: bool
) -> Placed:
    """Where it will sit is still open. `user`: whom QEMU runs as; `debug`: what the guest's console says is
    logged; `tcg`: there is no KVM. Raises HostError for what the host lacks."""
    match device:
        case ShareFsConfig():
            daemon = await Virtiofsd.start(device, state_dir, undo, log_output("virtiofsd"))
            parts.helpers.add(device, daemon)
            return Placed(device=device, fd=daemon.connection.fileno(), give_up=daemon.abort)
        case VhostUserBlkConfig():
            from devices.vhost_user import BackEnd  # these two are not on the usual start path

            back_end = BackEnd.connect(device.path)
            parts.helpers.add(device, back_end)
            return Placed(device=device, fd=back_end.connection.fileno(), give_up=back_end.abort)
        case VhostUserNetConfig():
            from devices.vhost_relay import Relay

            relay = Relay.start(device.path, f"{meeting_place(state_dir)}/{device.id}.sock", user=user)
            parts.helpers.add(device, relay)
            # QEMU 7.2 under TCG dies when the guest sets up this card's message interrupts.
            return Placed(device=device, path=relay.path, msi=not tcg, give_up=relay.abort)
        case PortConfig():
            channel, guest_end = PortChannel.pair()
            parts.channel = channel
            parts.keep(device.id, guest_end)
            return Placed(device=device, fd=guest_end)
        case VsockConfig():
            return await _vsock(parts, device, state_dir, undo, user)
        case BlockConfig():
            size = await look(memory_size, device, user) if device.kind is Kind.PMEM else 0
            file = await acquire(open_disk, device, lost=os.close)
            fdset = parts.keep(device.id, file)
            return Placed(device=device, file=file, fdset=fdset, host_device=is_block(file), bytes=size)
        case ConsoleConfig():
            path = f"{state_dir}/{CONSOLE}" if children_outlive() else ""
            parts.console = Console(log_console() if debug else None, path=path)
            return Placed(device=device, fd=parts.console.guest_end, path=path)
        case _:
            return Placed(device=device)


async def _vsock(parts: Parts, device: VsockConfig, state_dir: str, undo: UndoLog, user: int) -> Placed:
    if os.path.exists(VHOST_VSOCK):
        parts.vhost_fd, cid = reserve_cid(VHOST_VSOCK)
        parts.channel = KernelVsock(cid, home_call=device.home_call, diagnostics=parts.diagnostics)
        return Placed(device=device, fd=parts.vhost_fd, cid=cid)
    _log.info("no kernel vsock", device=VHOST_VSOCK, instead="vhost-device-vsock")
    log = log_output("vhost-device-vsock")
    parts.vsock = await VsockDaemon.start(device, state_dir, undo, log, user=user)
    parts.daemons.append(parts.vsock.child)
    parts.channel = HybridVsock(
        parts.vsock.path, home_call=device.home_call, user=user, diagnostics=parts.diagnostics
    )
    return Placed(device=device)  # its descriptor comes in `launch`


def open_disk(device: BlockConfig) -> int:
    """A descriptor of the file or block device, for QEMU, which could not open it. Raises HostError.

    Since 9.1 QEMU takes a descriptor of a set only if it was opened for direct access as the node wants it.
    """
    flags = (os.O_RDONLY if device.read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    direct = device.options.direct and device.kind is not Kind.PMEM
    try:
        file = os.open(device.path, flags | (os.O_DIRECT if direct else 0))
    except OSError as error:
        hint = ""
        if direct and error.errno == errno.EINVAL:
            hint = "its file system may have no direct access: leave out block_device_cache_direct"
        raise HostError(
            f"the disk {device.path} cannot be opened: {error.strerror}", phase="devices", hint=hint
        ) from error
    kind = os.fstat(file).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
        os.close(file)
        raise HostError(f"{device.path} is neither a file nor a block device", phase="devices")
    os.set_blocking(file, True)
    return file


def open_memory(section: HypervisorConfig) -> int:
    """The file that the guest's memory is, for QEMU: -1 if there is none. Raises HostError. Blocks."""
    if not (section.boot_to_be_template or section.boot_from_template):
        return -1
    path = section.memory_path
    try:
        file = os.open(path, (os.O_RDONLY if section.boot_from_template else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"the memory {path} cannot be opened: {error.strerror}", phase="vmm") from error
    size, wanted = os.fstat(file).st_size, section.default_memory << 20
    if size != wanted:
        os.close(file)
        raise HostError(f"the memory {path} has {size} bytes, and the VM {wanted}", phase="vmm")
    return file


def close_memory(file: int) -> None:
    """QEMU has it, or will not get it."""
    if file >= 0:
        os.close(file)


def is_block(file: int) -> bool:
    """Whether QEMU must open it as `host_device`."""
    return stat.S_ISBLK(os.fstat(file).st_mode)


def memory_size(device: BlockConfig, user: int) -> int:
    """Bytes of an image that becomes memory. Raises CallerError for one that cannot."""
    try:
        info = os.stat(device.path)
    except OSError as error:
        raise HostError(f"{device.path} cannot be used: {error.strerror}", phase="devices") from error
    page = os.sysconf("SC_PAGE_SIZE")
    why = ""
    if not device.read_only:
        why = "an nvdimm is read-only"
    elif not stat.S_ISREG(info.st_mode) or device.format is not BlockFormat.RAW:
        why = "an nvdimm is a raw image in a file"
    elif info.st_size == 0 or info.st_size % page:
        why = f"its size is {info.st_size} bytes, an nvdimm's a multiple of {page}"
    elif user and not info.st_mode & stat.S_IROTH:  # QEMU wants to open an nvdimm itself
        why = "others may not read it, and QEMU is not root (rootless = true)"
    if why:
        raise CallerError(
            f"{device.path} cannot be an nvdimm: {why}",
            phase="devices",
            hint="choose another block_device_driver",
        )
    return info.st_size


def log_output(name: str) -> Callable[[bytes], None]:
    """What a process says on stderr: a warning, unless it is known as noise. Call it on the loop."""

    def say(line: str) -> None:
        level = _log.debug if is_noise(line) else _log.warning
        level("stderr", source=name, line=line)

    return LineLog(name, say).write


def log_console() -> Callable[[bytes], None]:
    """What the guest says on its console."""
    return LineLog("console", lambda line: _log.debug("console", line=line)).write
