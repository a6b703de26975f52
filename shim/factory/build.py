"""Making a template: boot the VM of a class, wait for its agent, save it.

What: `build` fills the class's place in the store.
Why the whole boot: what the agent and the kernel have done by then is done for all VMs of the class
(agent/warm.py says what that is); what is a pod's comes after.
Invariants: no tenant's code, data or choice is in it. The VM has ended, and its user with it, before anybody
can find the template. All of it stands in the undo log, VM, processes and directory, so whoever is killed
over it leaves a directory at most, in memory, which the next build removes. Every step has a deadline.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial

import structlog

import ttrpc
from devices.errors import KataError
from devices.threads import acquire
from devices.undo import UndoLog
from hypervisors.base import Hypervisor
from hypervisors.registry import get_plugin
from shim.factory.store import MEMORY, Store
from shim.factory.template_class import TemplateClass
from shim.protocols import Deadlines
from shim.sandbox.agent_client import GuestAgent
from shim.state.trace import Trace

__all__ = ["build"]

_NAME = "template"

_log = structlog.get_logger("factory")


async def build(
    store: Store, wanted: TemplateClass, undo: UndoLog, *, deadlines: Deadlines, port: int, trace: Trace
) -> str:
    """The template's directory. `port`: of the agent. Raises KataError; BusyError if somebody else is at
    it."""
    started = time.monotonic()
    building = await acquire(store.begin, wanted.digest, lost=store.end)
    try:
        entry = undo.record("dir", path=building.path)
        try:
            await _fill(building.path, wanted, undo, deadlines=deadlines, port=port, trace=trace)
            finish = partial(store.finish, config=wanted.config, hypervisor=wanted.hypervisor)
            path = await acquire(finish, building)
        finally:
            undo.forget(entry)
    finally:
        await acquire(store.end, building)
    try:
        await acquire(store.forget_others, wanted.digest, wanted.config)
    except (KataError, OSError) as error:  # the next one does
        _log.warning("earlier templates are kept", error=str(error))
    _log.info("template made", of=wanted.digest, seconds=round(time.monotonic() - started, 2))
    return path


async def _fill(
    path: str, wanted: TemplateClass, undo: UndoLog, *, deadlines: Deadlines, port: int, trace: Trace
) -> None:
    state_dir = f"{path}/vm"
    memory = f"{path}/{MEMORY}"
    await acquire(_prepare, memory, state_dir, wanted.section.default_memory << 20)
    section = replace(wanted.section, boot_to_be_template=True, memory_path=memory)
    vm: Hypervisor = get_plugin(wanted.hypervisor).create(
        section, sandbox_id=_NAME, state_dir=state_dir, undo=undo
    )
    try:
        await vm.prepare_vm(_NAME, None)
        for device in wanted.devices:
            await vm.add_device(device)
        await vm.start_vm(deadlines.boot)
        channel = await vm.get_agent_socket()
        await channel.wait_ready(deadlines.boot)
        sock, _ = await channel.connect(port, deadlines.request)
        agent = GuestAgent(ttrpc.Client(sock), deadlines, trace)
        try:
            await agent.check(deadlines.boot + deadlines.request)  # it answers when it has warmed up
            await vm.save_vm(path)
        finally:
            await agent.close()
    except KataError as error:
        raise error.with_context(phase="template", details=vm.diagnostics()) from None
    finally:
        try:
            await vm.stop_vm()
        finally:
            await vm.cleanup()
    await acquire(os.rmdir, state_dir)


def _prepare(memory: str, state_dir: str, size: int) -> None:
    """The memory can be written by whoever the VM runs as, and reached by nobody: its directory is root's."""
    with open(memory, "xb") as file:
        file.truncate(size)
        os.fchmod(file.fileno(), 0o666)
    os.mkdir(state_dir, 0o700)
