"""QEMU from a plan to an answering control connection.

What: `launch` hands QEMU its sockets and disks, starts it in its confinement, has its death watched and
negotiates QMP.
Invariants: daemons' sockets are connected before QEMU starts and are inherited by it: QEMU finds
nothing to wait for. Our copies of what QEMU inherits are closed, whatever happens. Whoever dies first
ends the wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
from collections.abc import Callable
from typing import Any

from devices.child import Child
from devices.config import NetworkConfig, VsockConfig
from devices.errors import HypervisorError
from devices.rendezvous import connect_now, listen
from devices.undo import UndoLog
from hypervisors.death import GATHER, Death
from hypervisors.qemu.cmdline import Plan, arguments
from hypervisors.qemu.confinement import READ_ONLY, confinement
from hypervisors.qemu.parts import Parts
from hypervisors.qemu.qmp import QmpClient, QmpEvent
from hypervisors.qemu.recipes import reopened

__all__ = ["launch"]


async def launch(
    plan: Plan,
    parts: Parts,
    death: Death,
    *,
    undo: UndoLog,
    netns: str | None,
    user: int,
    state_dir: str,
    qmp_path: str,
    timeout: float,
    on_event: Callable[[QmpEvent], None],
    on_output: Callable[[bytes], None],
) -> None:
    """Fill in `parts.process` and `parts.qmp`. Of `plan` the descriptors and the devices are completed here.

    Raises KataError, TimeoutError; what was started until then is in `parts`.
    """
    inherited: list[socket.socket] = []
    control: socket.socket | None = None
    try:
        listener = listen(qmp_path)
        inherited.append(listener)
        # Its backlog takes us before QEMU exists: one that dies at once cannot refuse us any more.
        control = connect_now(qmp_path)
        control.setblocking(False)
        placed = parts.placed
        if parts.vsock is not None:
            vsock = await parts.vsock.connect()
            inherited.append(vsock)
            placed = [
                dataclasses.replace(one, fd=vsock.fileno()) if isinstance(one.device, VsockConfig) else one
                for one in placed
            ]
        home_port = parts.channel.home_port if parts.channel else 0
        plan = dataclasses.replace(plan, qmp_fd=listener.fileno(), devices=placed, home_port=home_port)
        fds = [listener.fileno(), *(fd for one in placed for fd in (one.fd, one.file) if fd >= 0)]
        env = {}
        if plan.memory >= 0:
            fds.append(plan.memory)
        if plan.section.boot_from_template:
            env = {"LD_PRELOAD": READ_ONLY, "KATA_READ_ONLY": reopened(plan.memory)}
        for one in placed:
            if isinstance(one.device, NetworkConfig):
                fds += [*one.device.tap_fds, *one.device.vhost_fds]
        if death.stopping:
            raise HypervisorError("the VM was stopped before QEMU ran", code="ABORTED")
        parts.process = await Child.spawn(
            [plan.section.path, *arguments(plan)],
            name="qemu",
            undo=undo,
            confinement=confinement(
                plan, placed, user=user, netns=netns, state_dir=state_dir, locked=parts.locked
            ),
            env=env,
            pass_fds=fds,
            on_output=on_output,
        )
    except BaseException:
        if control is not None:
            control.close()
        raise
    finally:
        for sock in inherited:
            sock.close()
        parts.helpers.handed_over()
        parts.let_all_go()
    if parts.console is not None:
        parts.console.handed_over()
    death.begin(f"watch {plan.sandbox_id}")
    await _open_control(control, parts, death, timeout, on_event)


async def _open_control(
    control: socket.socket, parts: Parts, death: Death, timeout: float, on_event: Callable[[QmpEvent], None]
) -> None:
    """QMP, or the reason why not: whoever dies first ends the wait."""
    connecting = asyncio.create_task(QmpClient.connect(control, timeout=timeout, on_event=on_event))
    waits: set[asyncio.Future[Any]] = {connecting, death.ended}
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not connecting.done():
            connecting.cancel()
            await asyncio.wait({connecting})
    if connecting.cancelled() or connecting.exception() is not None:
        # The control socket usually breaks a moment before the death is noticed: prefer the cause.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GATHER):
                await asyncio.shield(death.ended)
    if death.ended.done():
        if not connecting.cancelled() and connecting.exception() is None:
            await connecting.result().close()
        raise death.error(death.ended.result())
    parts.qmp = connecting.result()
    parts.answers = True
