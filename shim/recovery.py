"""Recovery: what a daemon writes down for the next one, and how that one begins.

What: `Keeper` stands between the containers and their events, and has `recovery.json` say how things stand
whenever something changed. `recover` makes sandbox and containers from it.
Why between the events: each change of a process that counts is told to containerd, and what the file says
must be true before containerd hears of it.
Invariants: with `on_shim_death = "end"` there is no Keeper, no file, and no cost. The file is written before
the call that changed something is answered; when it cannot be, it goes, so that nothing wrong is offered.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
import sys
from typing import TYPE_CHECKING, Any, cast

import structlog

from devices.child import Child
from devices.confine import Confinement
from devices.errors import CallerError, ConfigError, HostError, KataError
from devices.outlive import let_children_outlive
from hypervisors.base import Adopting, Hypervisor, HypervisorState
from hypervisors.registry import get_plugin
from shim.config import Config
from shim.protocols import DaemonContext
from shim.sandbox.recovered import RecoveredSandbox
from shim.state import recoveryfile
from shim.state.recoveryfile import Saved, SavedDaemon, SavedSandbox, take
from shim.state.trace import Trace
from shim.tasks.container import Container
from shim.tasks.container_manager import ContainerManager
from shim.tasks.recall import recall, snapshot, streams

if TYPE_CHECKING:
    from shim.sandbox.sandbox import VirtSandbox

__all__ = ["HOLDER", "Keeper", "check", "recover"]

HOLDER = "mounts"
"""The name, in the journal, of the process that holds the mount namespace."""

_SHIM = "containerd-shim-kata"
#: What of its environment a daemon needs: where events go, where programs and the configuration are.
_VARIABLES = ("PATH", "TTRPC_ADDRESS", "GRPC_ADDRESS", "NAMESPACE")

_log = structlog.get_logger("recovery")


class Keeper:
    """An EventSink before another one; see the module's docstring."""

    def __init__(self, context: DaemonContext, manager: ContainerManager) -> None:
        self._context = context
        self._manager = manager
        self._sandbox: VirtSandbox | RecoveredSandbox | None = None
        self._daemon: SavedDaemon | None = None
        self._saved: SavedSandbox | None = None
        self._scheduled = False
        self._holder: Child | None = None
        manager.report_to(self, self.changed)

    async def prepare(self) -> None:
        """Before the first child: they outlive us, and one holds our mount namespace for the next shim, since
        the others may have namespaces of their own. Idempotent. Raises HostError."""
        let_children_outlive()
        if self._holder is None or not self._holder.alive:
            sleep = shutil.which("sleep") or "/bin/sleep"
            self._holder = await Child.spawn(
                [sleep, "infinity"],
                name=HOLDER,
                undo=self._context.undo,
                confinement=Confinement(view=None),  # our mounts are what it is for
            )

    def publish(self, topic: str, event: Any) -> None:
        """See `EventSink`."""
        self.changed()
        self._context.events.publish(topic, event)

    def changed(self) -> None:
        """Write how things stand, as soon as what is being done now is done."""
        if self._saved is not None and not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._write)

    def keep(self, sandbox: VirtSandbox, hypervisor: Hypervisor, config: Config, section: Any) -> None:
        """From the moment that it runs it may be recovered. `section`: the hypervisor's, of this VM."""
        settings = sandbox.settings
        health, deadlines = settings.health, settings.deadlines

        async def begin() -> None:
            self._daemon = _daemon(self._context, config.runtime.log_level)
            self._saved = SavedSandbox(
                hypervisor=config.hypervisor_name,
                section=dataclasses.asdict(section),
                vm=dataclasses.asdict(await hypervisor.save_state()),
                is_pod=sandbox.is_pod,
                direct_stdio=sandbox.direct_stdio,
                agent_port=settings.agent_port,
                boot=deadlines.boot,
                request=deadlines.request,
                stop=deadlines.stop,
                kill=deadlines.kill,
                health_interval=health.interval,
                health_timeout=health.timeout,
                health_ends=health.ends,
                writing=(),
            )
            self._sandbox = sandbox

        sandbox.on_up = begin

    def go_on(self, sandbox: RecoveredSandbox, saved: Saved) -> None:
        """It was recovered: it may be once more."""
        self._daemon = _daemon(self._context, saved.daemon.log_level)
        self._saved, self._sandbox = saved.sandbox, sandbox
        self.changed()

    def _write(self) -> None:
        self._scheduled = False
        sandbox, directory = self._sandbox, self._context.state_dir
        assert sandbox is not None
        try:
            if sandbox.stopped or sandbox.died.done() or not self._manager.containers:
                recoveryfile.remove(directory)
                return
            assert self._saved is not None
            assert self._daemon is not None
            self._saved = dataclasses.replace(self._saved, writing=tuple(sorted(sandbox.writing)))
            containers = snapshot(self._manager.containers.values())
            recoveryfile.write(
                directory, Saved(daemon=self._daemon, sandbox=self._saved, containers=containers)
            )
        except OSError as error:
            _log.error("this sandbox cannot be recovered", directory=directory, error=error.strerror)
            try:
                recoveryfile.remove(directory)
            except OSError as stays:  # a read-only /run: nothing else works there either
                _log.error("what is written down is old", directory=directory, error=stays.strerror)


def _daemon(context: DaemonContext, log_level: str) -> SavedDaemon:
    environment = {
        key: value for key, value in os.environ.items() if key in _VARIABLES or key.startswith("KATA_")
    }
    words = sys.orig_argv
    end = next((at for at, word in enumerate(words) if os.path.basename(word).startswith(_SHIM)), -1)
    return SavedDaemon(
        id=context.id,
        socket=context.address.removeprefix("unix://"),
        config_path=context.config_path,
        publish_binary=context.publish_binary,
        runtime_class=context.runtime_class,
        alias=context.alias,
        debug=context.debug,
        log_level=log_level,
        mounts=os.stat("/proc/self/ns/mnt").st_ino,
        program=tuple(words[: end + 1]),
        environment=environment,
    )


def check(name: str) -> None:
    """Raise ConfigError unless VMs of this hypervisor can be recovered."""
    if not get_plugin(name).capabilities.adopt:
        raise ConfigError(
            f"[runtime] on_shim_death = keep: a VM under {name} cannot be taken over by another shim",
            phase="config",
            key="on_shim_death",
            hint='set on_shim_death = "end" in the file for this hypervisor; see `kata-ctl hypervisors`',
        )


async def recover(
    context: DaemonContext,
    manager: ContainerManager,
    keeper: Keeper,
    *,
    tasks: asyncio.TaskGroup,
    trace: Trace,
) -> RecoveredSandbox:
    """Sandbox and containers of a dead shim (`context.takeover`). Raises KataError; everything is as it was
    then, but for connections."""
    assert context.takeover is not None
    saved: Saved = context.takeover.saved
    sandbox = RecoveredSandbox(
        context.sandbox_id,
        context.takeover,
        _hypervisor(context, saved.sandbox),
        _state(saved.sandbox),
        state_dir=context.state_dir,
        share=context.share_dir,
        undo=context.undo,
        tasks=tasks,
        trace=trace,
        on_oom=manager.report_oom,
    )
    containers: list[Container] = []
    try:
        await sandbox.take_over()
        for each in saved.containers:
            if not each.processes:
                raise HostError(f"recovery.json: {each.id} has no process", phase="recover")
            container = manager.known(each.id, each.bundle, sandbox, streams(each.processes[0]))
            containers.append(container)
            try:
                await recall(container, each)
            except KataError as error:
                raise error.with_context(phase=f"recover container {each.id}") from None
            except ValueError as error:
                raise HostError(f"recovery.json: {error}", phase="recover") from None
    except BaseException:
        for container in containers:
            await container.abandon()
        await sandbox.let_go()
        raise
    manager.admit(containers)
    sandbox.watch()
    keeper.go_on(sandbox, saved)
    _log.info("recovered", sandbox=sandbox.id, containers=[container.id for container in containers])
    return sandbox


def _state(saved: SavedSandbox) -> HypervisorState:
    try:
        return take(HypervisorState, saved.vm, "sandbox.vm")
    except TypeError as error:
        raise HostError(
            f"recovery.json: {error}",
            phase="recover",
            code="FAILED_PRECONDITION",
            hint="recover it with the version of the shim that started it, or remove it",
        ) from None


def _hypervisor(context: DaemonContext, saved: SavedSandbox) -> Adopting:
    plugin = get_plugin(saved.hypervisor)
    if not plugin.capabilities.adopt:
        raise CallerError(f"a VM under {saved.hypervisor} cannot be taken over", code="UNIMPLEMENTED")
    try:
        section = plugin.section(**_as_fields(plugin.section, saved.section))
    except TypeError as error:
        raise HostError(
            f"its shim had another schema of [hypervisor.{saved.hypervisor}]: {error}",
            phase="recover",
            code="FAILED_PRECONDITION",
            hint="recover it with the version of the shim that started it, or remove it",
        ) from None
    vm = plugin.create(section, sandbox_id=context.sandbox_id, state_dir=context.state_dir, undo=context.undo)
    return cast("Adopting", vm)  # its capability says so


def _as_fields(kind: type[Any], section: Any) -> dict[str, Any]:
    """JSON has arrays where a section has tuples. What a newer schema has besides is left to its default."""
    known = {each.name for each in dataclasses.fields(kind)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in section.items()
        if name in known
    }
