"""Taking over a VM whose shim is dead: from what was saved to parts that are supervised again.

What: `saved` completes what `Qemu.save_state` says for it, `take_over` fills in `Parts` from that.
Why it can be done: QEMU listens on its control socket and, where it may outlive its shim (`devices.outlive`),
on its console's; vsock is dialled by path or number; the daemons need nobody but QEMU.
Invariants: nothing is changed before all of it was found alive; what fails leaves the VM as it was.
"""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable, Mapping

from devices.adopted import adopt
from devices.child import Child
from devices.config import DeviceConfig, ShareFsConfig
from devices.console import Console
from devices.errors import HypervisorError
from devices.rendezvous import connect_now
from devices.share_fs import Virtiofsd
from devices.undo import Entry, UndoLog
from devices.vsock import HybridVsock, KernelVsock
from devices.vsock_daemon import VsockDaemon
from hypervisors.base import HypervisorState
from hypervisors.qemu.parts import Parts
from hypervisors.qemu.prepare import CONSOLE, log_console, log_output
from hypervisors.qemu.qmp import QmpClient, QmpEvent

__all__ = ["saved", "take_over"]

_QMP, _VSOCK, _CONSOLE = "qmp", "vsock", "console"
_VSOCK_DAEMON = "vhost-device-vsock"
_CONNECT = 5.0  # seconds for QEMU to greet


def saved(state: HypervisorState, parts: Parts, state_dir: str) -> HypervisorState:
    """`state`, which says which process it is, with what is needed besides."""
    sockets = {_QMP: f"{state_dir}/qmp.sock"}
    processes = parts.helpers.processes()
    cid, unfit = 0, ""
    if parts.vsock is not None:
        sockets[_VSOCK] = parts.vsock.path
        processes[_VSOCK_DAEMON] = parts.vsock.child.pid
    elif isinstance(parts.channel, KernelVsock):
        cid = parts.channel.cid
    else:
        unfit = "it has no vsock device"
    if any(placed.path and placed.path.endswith(CONSOLE) for placed in parts.placed):
        sockets[_CONSOLE] = f"{state_dir}/{CONSOLE}"
    if (served := parts.helpers.served_inside()) and not unfit:
        unfit = f"its device {served} was served by the shim that died"
    return dataclasses.replace(state, sockets=sockets, processes=processes, cid=cid, unfit=unfit)


async def take_over(
    state: HypervisorState,
    parts: Parts,
    processes: Mapping[int, Entry],
    *,
    undo: UndoLog,
    debug: bool,
    on_event: Callable[[QmpEvent], None],
) -> None:
    """Fill in `parts`. Raises KataError; what was taken until then is in `parts`, and nothing of it ended."""
    if state.unfit:
        raise HypervisorError(
            f"this VM cannot be taken over: {state.unfit}", phase="adopt", code="FAILED_PRECONDITION"
        )

    def supervise(name: str, pid: int) -> Child:
        entry = processes.get(pid)
        if entry is None:
            raise HypervisorError(f"the journal does not know {name} (pid {pid})", phase="adopt")
        start = int(entry.facts.get("start", 0))
        return adopt(name, pid, start, undo=undo, entry=entry, on_output=log_output(name))

    parts.process = supervise("qemu", state.pid)
    for name, pid in state.processes.items():
        if name == _VSOCK_DAEMON:
            parts.vsock = VsockDaemon.adopt(supervise(name, pid), state.sockets[_VSOCK], undo)
            parts.daemons.append(parts.vsock.child)
        else:
            parts.helpers.add(_share(name), Virtiofsd.adopt(supervise("virtiofsd", pid)))
    if state.cid:
        parts.channel = KernelVsock(state.cid, home_call=False, diagnostics=parts.diagnostics)
    else:
        parts.channel = HybridVsock(state.sockets[_VSOCK], home_call=False, diagnostics=parts.diagnostics)
    if _CONSOLE in state.sockets:
        parts.console = Console.reading(state.sockets[_CONSOLE], log_console() if debug else None)
    parts.qmp = await QmpClient.connect(_dial(state.sockets[_QMP]), timeout=_CONNECT, on_event=on_event)
    parts.answers = True


def _dial(path: str) -> socket.socket:
    try:
        sock = connect_now(path)
    except OSError as error:
        raise HypervisorError(f"QEMU does not listen on {path}: {error.strerror}", phase="adopt") from None
    sock.setblocking(False)
    return sock


def _share(device_id: str) -> DeviceConfig:
    """Who serves it is watched by this; nothing else of it is used any more."""
    return ShareFsConfig(id=device_id, source="/")
