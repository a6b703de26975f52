"""One container: its init process, its execs, and what the guest is asked to do with them.

What: `Container` carries the calls of the task service that concern one container, from the guest's
creation of it to its removal.
Why: the order of guest calls, state changes and events is the contract with containerd; it stands
here, apart from the service's messages above and the VM below.
Invariants:
- Events of a process come in containerd's order: create < start < exit < delete, exec-added <
  exec-started < exit; exit exactly once, and only for a process that was created in the guest.
- A state change and its event are one step: no await lies between them.
- State, Kill, Wait and CloseIO never wait for another call.
- When the guest dies, each process in it exits with `VM_DEATH` within a second.
- After SIGKILL the exit is told within `Sandbox.kill_limit` of the call, whatever guest, agent and VMM do
  (`shim.tasks.signals`): of the sandbox's own container by the end of the VM, of a pod's member without it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any

import structlog

from devices.errors import CallerError, KataError
from devices.undo import UndoLog
from proto import agent_pb2, mount_pb2, oci_pb2
from shim.protocols import VM_DEATH, EventSink, Exit, GuestContainer, Sandbox
from shim.stdio.stdio import Stdio, StdioSpec
from shim.tasks.exit_status import KILLED
from shim.tasks.exits import EXEC_GRACE, Exits
from shim.tasks.last_usage import LastUsage
from shim.tasks.process import Call, Kind, Process, Status
from shim.tasks.signals import Signals
from shim.tasks.task_events import TaskEvents

__all__ = ["Container"]

_SIGKILL = 9
_MAX_SIGNAL = 64
#: Seconds for the guest to forget a container, and for one that is known not to answer.
_REMOVE_DEADLINE, _REMOVE_TRY = 5.0, 0.5

_log = structlog.get_logger("container")


class Container:
    """One container. `quieted` is awaited after its output is drained, before its exit is told; `usage` asks
    the guest what it has used, once it has ended."""

    def __init__(
        self,
        container_id: str,
        bundle: str,
        sandbox: Sandbox,
        spec: StdioSpec,
        events: EventSink,
        quieted: Callable[[Container], Awaitable[None]],
        usage: Callable[[], Coroutine[Any, Any, agent_pb2.StatsContainerResponse]],
        *,
        namespace: str,
        undo: UndoLog,
    ) -> None:
        self.id = container_id
        self.bundle = bundle
        self.sandbox = sandbox
        self.pid = sandbox.vmm_pid
        self.init = Process(container_id, "", spec)
        self.execs: dict[str, Process] = {}
        self._exec_specs: dict[str, tuple[oci_pb2.Process, Mapping[str, Any]]] = {}
        self.events = TaskEvents(events, container_id, self.pid)
        self._signals = Signals(sandbox, container_id)
        self.last_usage = LastUsage(usage)
        self._exits = Exits(
            sandbox,
            self.execs,
            self._signals,
            self.events,
            ending=self.last_usage.ask,
            quieted=lambda: quieted(self),
        )
        self._open = partial(Stdio.open, container_id=container_id, namespace=namespace, undo=undo)
        self._again = partial(Stdio.again, container_id=container_id, namespace=namespace, undo=undo)
        #: Told of what has changed without an event (`shim.recovery`).
        self.changed: Callable[[], None] = _nothing

    def __repr__(self) -> str:
        return f"<Container {self.id} {self.init.status.value}>"

    # -- finding -----------------------------------------------------------------------------------

    def process(self, exec_id: str) -> Process:
        """The init process for an empty id. Raises CallerError NOT_FOUND."""
        process = self.execs.get(exec_id) if exec_id else self.init
        if process is None:
            raise CallerError(f"exec {exec_id} of {self.id}: not found", code="NOT_FOUND")
        return process

    def processes(self) -> Iterator[Process]:
        """The init process first, then the execs in the order in which they were added."""
        yield self.init
        yield from self.execs.values()

    # -- creation ----------------------------------------------------------------------------------

    async def create(self, guest: GuestContainer, rootfs: Sequence[mount_pb2.Mount]) -> None:
        """Make it in the guest, its process stopped. After an error `abandon` undoes what was done."""
        spec = self.init.stdio_spec
        stdio = await self._open(spec)
        self.init.stdio = stdio
        agent = self.sandbox.agent
        ports = await stdio.connect(self.sandbox) if self.sandbox.direct_stdio else (0, 0, 0)
        await agent.create_container(self.id, guest, ports=ports)
        if not self.sandbox.direct_stdio:
            stdio.run(agent, self.id, "")
        self.events.created(self.bundle, rootfs, spec)
        self._exits.watch(self.init)

    async def recall(
        self, process: Process, spec: tuple[oci_pb2.Process, Mapping[str, Any]] | None, *, input_over: bool
    ) -> None:
        """Have a process back that an earlier shim had, its status and exit set: its streams flow again, and
        its end is seen. `spec`: that of an exec which has not been started. Raises KataError."""
        stdio = process.stdio = Stdio(process.stdio_spec)
        if process.kind is Kind.EXEC:
            self.execs[process.exec_id] = process
            self._exec_specs[process.exec_id] = spec or (oci_pb2.Process(), {})
        if process.exited.done():
            return
        if process.kind is Kind.EXEC and process.status is Status.CREATED:
            process.stdio = await self._open(process.stdio_spec)
            return
        runs = process.status is not Status.CREATED
        stdio = process.stdio = await self._again(process.stdio_spec, runs=runs)
        if input_over:
            stdio.end_input()
        agent = self.sandbox.agent
        if self.sandbox.direct_stdio:
            await agent.reattach(self.id, process.exec_id, await stdio.connect(self.sandbox))
        else:
            stdio.run(agent, self.id, process.exec_id)
        if runs:
            stdio.begin_input_again()
        self._exits.watch(process)

    def tell_exit(self, process: Process, ended: Exit) -> None:
        """Publish the exit of a process whose end nobody waits for, unless that was done."""
        self._exits.tell(process, ended)

    def exec_spec(self, exec_id: str) -> tuple[oci_pb2.Process, Mapping[str, Any]]:
        """What an exec that has not been started is to run."""
        return self._exec_specs[exec_id]

    async def abandon(self) -> None:
        """Give the host's side back, without a word to containerd. Idempotent."""
        await self._exits.close()
        await self._signals.close()
        await self.last_usage.close()
        for process in self.processes():
            if process.stdio is not None:
                await process.stdio.close()

    async def remove_from_guest(self) -> None:
        """Have the agent forget it. Bounded; a guest that cannot is left to its end."""
        if self.sandbox.died.done():
            return
        seconds = _REMOVE_TRY if self.sandbox.unresponsive else _REMOVE_DEADLINE
        try:
            async with asyncio.timeout(seconds):
                await self.sandbox.agent.remove_container(self.id)
        except (KataError, TimeoutError) as error:
            _log.warning("the guest did not remove the container", container=self.id, error=str(error))
            if isinstance(error, TimeoutError) or error.code == "DEADLINE_EXCEEDED":
                self.sandbox.doubt(f"it did not remove {self.id} within {seconds:g} s")

    # -- start -------------------------------------------------------------------------------------

    async def start(self, exec_id: str) -> int:
        """Run a created process; its pid on the host, which is the VMM's."""
        process = self.process(exec_id)
        async with process.locked():
            process.check(Call.START)
            process.begin_start()
            try:
                if process.kind is Kind.INIT:
                    await self._start_init(process)
                else:
                    await self._start_exec(process)
            finally:
                process.end_start()
        return self.pid

    async def _start_init(self, process: Process) -> None:
        shown = None
        if process.window.size is not None:
            # The terminal exists since Create: with luck the program never sees another size.
            shown = await self._try_resize(process)
        await self.sandbox.container_starting(self.id)
        assert process.stdio is not None  # made by `create`
        process.stdio.begin_input()
        await self.sandbox.agent.start_container(self.id)
        process.apply(Call.START)
        self.events.started()
        await self.sandbox.container_started(self.id)
        if process.window.size != shown:
            await self._try_resize(process)

    async def _start_exec(self, process: Process) -> None:
        self._check_takes_execs()
        agent, stdio = self.sandbox.agent, process.stdio
        assert stdio is not None  # made by `add_exec`
        spec, beyond = self._exec_specs[process.exec_id]
        if process.window.size is not None:
            spec.ConsoleSize.Height, spec.ConsoleSize.Width = process.window.size
        try:
            began = monotonic()
            ports = await stdio.connect(self.sandbox) if self.sandbox.direct_stdio else (0, 0, 0)
            self.sandbox.mark("exec.streams", f"{self.id}/{process.exec_id}", began, monotonic())
            stdio.begin_input()
            await agent.exec_process(self.id, process.exec_id, spec, ports=ports, beyond=beyond)
            if not self.sandbox.direct_stdio:
                stdio.run(agent, self.id, process.exec_id)
                stdio.begin_input()
        except BaseException:
            # It never ran, so there is no exit event; but who waits for it must not wait for ever.
            process.finish(Exit.now(VM_DEATH))
            await stdio.close()
            raise
        process.apply(Call.START)
        self.events.exec_started(process.exec_id)
        self._exits.watch(process)
        if process.window.size is not None:
            await self._try_resize(process)

    async def add_exec(
        self, exec_id: str, spec: oci_pb2.Process, stdio: StdioSpec, *, beyond: Mapping[str, Any]
    ) -> None:
        """Remember a process to be run by Start. Its output FIFOs are taken now, stdin at Start.

        `beyond`: what of the process is not in `spec` (`shim.spec.oci.Rest`).
        """
        self._check_takes_execs()
        if exec_id in self._exec_specs:
            raise CallerError(f"exec {exec_id} of {self.id}: already exists", code="ALREADY_EXISTS")
        process = Process(self.id, exec_id, stdio)
        spec.Terminal = stdio.terminal
        self._exec_specs[exec_id] = (spec, beyond)
        try:
            process.stdio = await self._open(stdio)
            try:
                self._check_takes_execs()
            except CallerError:
                await process.stdio.close()
                raise
        except BaseException:
            self._forget_exec(exec_id)
            raise
        self.execs[exec_id] = process
        self.events.exec_added(exec_id)

    def _check_takes_execs(self) -> None:
        self.init.check(Call.EXEC)
        if self.init.ended is not None:
            raise CallerError(f"cannot exec in {self.id}: it has ended: failed precondition")

    def _forget_exec(self, exec_id: str) -> None:
        self.execs.pop(exec_id, None)
        self._exec_specs.pop(exec_id, None)

    # -- while it lives ----------------------------------------------------------------------------

    async def kill(self, exec_id: str, signal: int, *, everyone: bool = False) -> None:
        """Send a signal. NOT_FOUND if the process has ended, here or, unknown to us yet, in the guest.

        `everyone` means each process of the container; if it has ended there is nobody to signal, which
        is no error. An exec has no such thing: `everyone` makes no difference.
        """
        if not 0 <= signal <= _MAX_SIGNAL:
            raise CallerError(f"signal {signal} does not exist", code="INVALID_ARGUMENT")
        process = self.process(exec_id)
        everyone = everyone and process.kind is Kind.INIT
        if everyone and process.exit is not None:
            return
        process.check(Call.KILL)
        # To the agent an empty exec id is the whole container; the init process alone has its name.
        whole = everyone or signal == _SIGKILL
        if signal == _SIGKILL:
            self.condemn(process)
        await self._signals.send(process, exec_id if exec_id or whole else self.id, signal)

    def condemn(self, process: Process | None = None) -> None:
        """This process is to be killed, or its VM ended: from here on its exit comes by itself. The init
        process, which is the default, takes the execs along."""
        process = process or self.init
        execs = [one for one in self.execs.values() if one.status is Status.RUNNING]
        self._signals.condemn([process, *execs] if process is self.init else [process])

    async def pause(self) -> None:
        """Freeze all its processes."""
        async with self.init.locked():
            self.init.check(Call.PAUSE)
            await self.sandbox.agent.pause_container(self.id)
            self.init.apply(Call.PAUSE)
            self.events.paused()

    async def resume(self) -> None:
        """Let them run on."""
        async with self.init.locked():
            self.init.check(Call.RESUME)
            await self.sandbox.agent.resume_container(self.id)
            self.init.apply(Call.RESUME)
            self.events.resumed()

    async def update(self, resources: oci_pb2.LinuxResources, *, beyond: Mapping[str, Any]) -> None:
        """Change its limits: the VM grows first where it must, then the guest is told.

        `beyond` as for `add_exec`.
        """
        self.init.check(Call.UPDATE)
        if not self.sandbox.direct_stdio:
            # Our agent knows the host's CPU numbers from the guest's; a stock one would fail.
            resources.CPU.ClearField("Cpus")
            resources.CPU.ClearField("Mems")
        await self.sandbox.resize(self.id, resources)
        await self.sandbox.agent.update_container(self.id, resources, beyond=beyond)

    async def resize(self, exec_id: str, rows: int, columns: int) -> None:
        """Set the terminal's size, now or as soon as there is a terminal; without one it is a no-op."""
        process = self.process(exec_id)
        if process.stdio_spec.terminal:
            await process.window.resize(
                (rows, columns),
                lambda: process.status in {Status.RUNNING, Status.PAUSED} and process.ended is None,
                partial(self.sandbox.agent.tty_win_resize, self.id, exec_id),
            )

    async def _try_resize(self, process: Process) -> tuple[int, int] | None:
        window = process.window.size
        assert window is not None
        try:
            await self.sandbox.agent.tty_win_resize(self.id, process.exec_id, *window)
        except KataError as error:
            _log.info("the guest did not resize the terminal", process=process.name, error=str(error))
            return None
        return window

    def end_input(self, exec_id: str) -> None:
        """CloseIO of stdin."""
        stdio = self.process(exec_id).stdio
        if stdio is not None:
            stdio.end_input()
            self.changed()

    async def wait(self, exec_id: str) -> Exit:
        """How the process ended, as soon as it has."""
        return await asyncio.shield(self.process(exec_id).exited)

    # -- removal -----------------------------------------------------------------------------------

    async def delete_exec(self, exec_id: str) -> Exit:
        """Forget an exec that has ended or never ran (then its status is 0)."""
        process = self.process(exec_id)
        await self._until_exit_is_told(process)
        async with process.lock:
            if process.status is Status.DELETED:
                raise CallerError(f"exec {exec_id} of {self.id}: not found", code="NOT_FOUND")
            process.apply(Call.DELETE)
            process.finish(Exit.now(0))
            self._forget_exec(exec_id)
            self.changed()
            assert process.stdio is not None
            await process.stdio.close()
        return process.exited.result()

    async def delete(self, remove: Callable[[], Coroutine[Any, Any, None]]) -> Exit:
        """Remove a container that has ended or was never started; `remove` releases its resources.

        A created one is killed first, so that its exit is told before its deletion.
        """
        process = self.init
        await self._until_exit_is_told(process)
        async with process.lock:
            if process.status is Status.DELETED:
                raise CallerError(f"container {self.id}: not found", code="NOT_FOUND")
            process.check(Call.DELETE)
            if process.status is Status.CREATED:
                await self._kill_created(process)
            for exec_ in list(self.execs.values()):
                exec_.hurry(EXEC_GRACE)
                async with exec_.lock:  # a start under way comes to its end first
                    if exec_.status is Status.RUNNING:
                        self._exits.tell(exec_, exec_.ended or Exit.now(KILLED))
                    exec_.finish(Exit.now(KILLED))
            process.apply(Call.DELETE)
            await self.abandon()
            await remove()
            ended = process.exited.result()
            self.events.deleted(ended)
        return ended

    async def _kill_created(self, process: Process) -> None:
        self.condemn()
        with contextlib.suppress(KataError):
            await self._signals.send(process, "", _SIGKILL)
        await asyncio.wait([process.exited], timeout=process.seconds_left())
        self._exits.tell(process, process.ended or Exit.now(KILLED))

    @staticmethod
    async def _until_exit_is_told(process: Process) -> None:
        if process.ended is not None:
            await asyncio.shield(process.exited)


def _nothing() -> None:
    """Nobody wants to know."""
