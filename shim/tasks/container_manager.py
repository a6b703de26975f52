"""The containers of this shim: which there are, and how they share one sandbox.

What: `ContainerManager` finds, creates and deletes containers, and decides when the sandbox below
them is to end. `Runtime` is what it needs from below: the sandbox that a container belongs to.
Why: each container is simple; what is subtle is that the first one brings the VM, that the last one
takes it away, and that a creation may fail or be given up at any point in between.
Invariants:
- An id is taken from the moment Create begins until Delete, or the undoing of a failed Create, ends.
- A Create that fails, or whose caller gave up, leaves nothing behind; the VM neither, unless other
  containers are in it.
- The VM ends with the sandbox's own container, before that exit is told (containerd's clients expect the
  task's pid, the VMM, to be gone by then), or with the last Delete; other containers that still live are
  killed first, so that each has an exit of its own, or with the VM if their guest does not end them. One that
  was made by the Sandbox API (`kept`) ends by that only.
- Operations that change something run to their end even if their caller is gone; only a Create is
  undone instead.
"""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import structlog
from google.protobuf import any_pb2

from devices.errors import CallerError, KataError
from devices.undo import UndoLog
from proto import mount_pb2, oci_pb2
from shim.protocols import EventSink, Exit, RootfsMount, Sandbox
from shim.stdio.stdio import StdioSpec
from shim.tasks.container import Container
from shim.tasks.process import Call, Status
from shim.tasks.stats import host_is_unified, to_any
from shim.tasks.usage import Usage

__all__ = ["ContainerManager", "Runtime", "check_id"]

_T = TypeVar("_T")

#: containerd's identifiers; these become names of files.
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
#: Seconds for killed containers to be gone before their VM is ended under them.
_KILL_GRACE = 3.0
#: Seconds for the exits of those that went with their VM to be told.
_DEAD_GRACE = 1.0

_log = structlog.get_logger("containers")


class Runtime(Protocol):
    """The layer below: it knows how to make a sandbox for a container."""

    async def load_spec(self, bundle: str) -> dict[str, Any]:
        """The bundle's config.json, checked and in one form (`shim.spec.documents`). Raises CallerError."""
        ...

    async def sandbox_for(
        self, container_id: str, bundle: str, spec: Mapping[str, Any], options: any_pb2.Any
    ) -> Sandbox:
        """The sandbox of this container: made at the first call (not started), the same later.

        `spec` is what `load_spec` gave, `options` those of the Create request (type_url "" if unset).
        After `Sandbox.stop` the next call makes a new one or raises.
        """
        ...


def check_id(name: str, what: str) -> str:
    """`name` if it is an identifier in containerd's sense. Raises CallerError INVALID_ARGUMENT."""
    if not _ID.fullmatch(name):
        raise CallerError(f"{name[:128]!r} cannot be {what}: invalid argument", code="INVALID_ARGUMENT")
    return name


class ContainerManager:
    """All containers of this shim."""

    def __init__(self, runtime: Runtime, events: EventSink, *, namespace: str, undo: UndoLog) -> None:
        self._runtime = runtime
        self._events = events
        self._namespace = namespace
        self._undo_log = undo
        self._containers: dict[str, Container] = {}
        self._creating: set[str] = set()
        self._over: set[str] = set()  # sandboxes whose own container has ended
        self._stopped: set[str] = set()  # and those that were stopped
        self._usage = Usage()
        self._work: set[asyncio.Task[Any]] = set()
        self._when_idle: Callable[[], None] | None = None
        self._changed: Callable[[], None] | None = None
        #: The id of a sandbox that lives by the Sandbox API: no container's end is its end.
        self.kept = ""

    def report_to(self, events: EventSink, changed: Callable[[], None]) -> None:
        """From now on events go there, and `changed` hears of what has changed without one."""
        self._events, self._changed = events, changed

    @property
    def containers(self) -> Mapping[str, Container]:
        """Those that are created and not yet deleted, by id."""
        return self._containers

    @property
    def idle(self) -> bool:
        """No container exists, is being created, or is being undone; nor is there a sandbox without any."""
        return not self._containers and not self._creating and not self.kept

    def get(self, container_id: str) -> Container:
        """Raises CallerError NOT_FOUND."""
        container = self._containers.get(container_id)
        if container is None:
            raise CallerError(f"container {container_id[:128]}: not found", code="NOT_FOUND")
        return container

    # -- Create ------------------------------------------------------------------------------------

    async def create(
        self,
        container_id: str,
        bundle: str,
        rootfs: Sequence[mount_pb2.Mount],
        stdio: StdioSpec,
        options: any_pb2.Any,
    ) -> int:
        """Create a container, and its sandbox if it is the first; the pid of its VMM.

        A caller that is cancelled gets away at once; what was done is undone behind its back.
        """
        check_id(container_id, "a container's id")
        if container_id in self._containers or container_id in self._creating:
            raise CallerError(f"container {container_id}: already exists", code="ALREADY_EXISTS")
        self._creating.add(container_id)
        work = self._spawn(self._create(container_id, bundle, rootfs, stdio, options))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.cancel()
            raise

    async def _create(
        self,
        container_id: str,
        bundle: str,
        rootfs: Sequence[mount_pb2.Mount],
        stdio: StdioSpec,
        options: any_pb2.Any,
    ) -> int:
        sandbox: Sandbox | None = None
        container: Container | None = None
        try:
            spec = await self._runtime.load_spec(bundle)
            self._check_not_over()
            sandbox = await self._runtime.sandbox_for(container_id, bundle, spec, options)
            await sandbox.start()
            self._stopped.discard(sandbox.id)
            mounts = [RootfsMount(m.type, m.source, m.target, tuple(m.options)) for m in rootfs]
            guest = await sandbox.prepare_container(container_id, bundle, spec, mounts)
            container = self._make(container_id, bundle, sandbox, stdio)
            await container.create(guest, rootfs)
        except BaseException:
            # In a task of its own: this one may have been cancelled, and must not be again.
            await asyncio.shield(self._spawn(self._undo(container_id, sandbox, container)))
            self._check_not_over()
            raise
        self._containers[container_id] = container
        self._creating.discard(container_id)
        return container.pid

    def _make(self, container_id: str, bundle: str, sandbox: Sandbox, stdio: StdioSpec) -> Container:
        container = Container(
            container_id,
            bundle,
            sandbox,
            stdio,
            self._events,
            self._quieted,
            lambda: self._usage.last(sandbox, container_id),
            namespace=self._namespace,
            undo=self._undo_log,
        )
        if self._changed is not None:
            container.changed = self._changed
        return container

    def known(self, container_id: str, bundle: str, sandbox: Sandbox, stdio: StdioSpec) -> Container:
        """One that an earlier shim created in this sandbox; `admit` makes it one of ours."""
        return self._make(check_id(container_id, "a container's id"), bundle, sandbox, stdio)

    def admit(self, containers: Sequence[Container]) -> None:
        """They are here now."""
        self._containers.update({container.id: container for container in containers})

    def _check_not_over(self) -> None:
        for sandbox_id in self._over:
            raise CallerError(f"the sandbox {sandbox_id} has ended", phase="create")

    async def _undo(self, container_id: str, sandbox: Sandbox | None, container: Container | None) -> None:
        try:
            if container is not None:
                await container.abandon()
            if sandbox is not None:
                alone = not self._containers and self._creating == {container_id} and not self.kept
                if container is not None and not alone:
                    await container.remove_from_guest()
                await self._release(sandbox, container_id)
                if alone:
                    await self.stop_sandbox(sandbox)
        finally:
            self._creating.discard(container_id)
            self._tell_idle()

    # -- the other operations ----------------------------------------------------------------------

    async def start(self, container_id: str, exec_id: str) -> int:
        """See `Container.start`. Runs to its end even if the caller is gone, like all below."""
        return await self._to_its_end(self.get(container_id).start(exec_id))

    async def delete(self, container_id: str, exec_id: str) -> Exit:
        """Forget a process that has ended; with a container go its resources, with the last one the VM."""
        container = self.get(container_id)
        if exec_id:
            return await self._to_its_end(container.delete_exec(exec_id))
        return await self._to_its_end(self._delete(container))

    async def _delete(self, container: Container) -> Exit:
        async def remove() -> None:
            if container.sandbox.id not in self._stopped:
                await container.remove_from_guest()
            await self._release(container.sandbox, container.id)
            last = len(self._containers) == 1 and not self._creating and not self.kept
            if last:
                await self.stop_sandbox(container.sandbox)
            del self._containers[container.id]
            if last:
                self._over.discard(container.sandbox.id)

        return await container.delete(remove)

    async def add_exec(
        self,
        container_id: str,
        exec_id: str,
        process: oci_pb2.Process,
        stdio: StdioSpec,
        *,
        beyond: Mapping[str, Any],
    ) -> None:
        """See `Container.add_exec`."""
        check_id(exec_id, "an exec's id")
        await self._to_its_end(self.get(container_id).add_exec(exec_id, process, stdio, beyond=beyond))

    async def pause(self, container_id: str) -> None:
        """See `Container.pause`."""
        await self._to_its_end(self.get(container_id).pause())

    async def resume(self, container_id: str) -> None:
        """See `Container.resume`."""
        await self._to_its_end(self.get(container_id).resume())

    async def update(
        self, container_id: str, resources: oci_pb2.LinuxResources, *, beyond: Mapping[str, Any]
    ) -> None:
        """See `Container.update`."""
        await self._to_its_end(self.get(container_id).update(resources, beyond=beyond))

    async def stats(self, container_id: str) -> any_pb2.Any:
        """What it uses (`shim.tasks.usage`), or had used when it ended, packed as containerd expects it on
        this host."""
        container = self.get(container_id)
        container.init.check(Call.STATS)
        unified = host_is_unified()
        if container.init.status is Status.STOPPED:
            return to_any(await container.last_usage.settled(), unified=unified)
        others = [
            other.id
            for other in self._containers.values()
            if other.sandbox is container.sandbox and other is not container
        ]
        response = await self._usage.stats(container.sandbox, container_id, others)
        container.last_usage.told(response)
        return to_any(response, unified=unified)

    async def processes(self, container_id: str) -> list[str]:
        """Of each process of the container its exec id, "" for the init, which is the first, and for
        those that containerd does not know. Waits for the guest a second at most."""
        container = self.get(container_id)
        known = [p.exec_id for p in container.processes() if not p.exec_id or p.status is Status.RUNNING]
        if container.init.status not in {Status.RUNNING, Status.PAUSED}:
            return known
        in_guest = await self._usage.processes(container.sandbox, container_id)
        return known + [""] * sum(process.exec_id is None for process in in_guest)

    def report_oom(self, container_id: str) -> None:
        """The guest's kernel killed something in this container for want of memory.

        Our agent tells it before the exit. From one that does not it may come late: then it is not told,
        for containerd's clients take an exit for the last word.
        """
        container = self._containers.get(container_id)
        if container is not None and container.init.exit is None:
            container.events.killed_for_memory()

    def when_idle(self, container_id: str, action: Callable[[], None]) -> None:
        """Shutdown: call `action` now if no container is left, soon if only undoing goes on, else never.

        A sandbox of the Sandbox API keeps the shim, unless it is itself named: containerd, after a restart,
        does so with one that it does not know.

        A container that comes into being meanwhile takes the request back.
        """
        if container_id == self.kept and not self._containers:
            self.kept = ""
        self._when_idle = None if self._containers or self.kept else action
        self._tell_idle()

    def _tell_idle(self) -> None:
        if self.idle and self._when_idle is not None:
            action, self._when_idle = self._when_idle, None
            action()

    async def close(self) -> None:
        """The daemon ends: stop watching and copying, give all descriptors back. The VM is not touched."""
        work = list(self._work)
        for task in work:
            task.cancel()
        if work:
            await asyncio.wait(work)
        for container in self._containers.values():
            await container.abandon()

    # -- the sandbox -------------------------------------------------------------------------------

    async def _quieted(self, container: Container) -> None:
        """A container's init process has ended, its output is drained: with the sandbox's own all ends."""
        if container.id != container.sandbox.id:
            return
        self._over.add(container.id)
        if container.init.overdue:  # so would the others be
            for other in self._living(container):
                other.condemn()
        elif not container.sandbox.died.done():
            await self.end_all(0, but=container)
        await asyncio.shield(self._spawn(self.stop_sandbox(container.sandbox)))
        await self.all_quiet(_DEAD_GRACE, but=container)

    async def end_all(self, grace: float, *, but: Container | None = None) -> None:
        """SIGTERM to all containers, SIGKILL after `grace` seconds (0: at once), and their exits; bounded."""
        if grace > 0:
            await self._signal_all(signal.SIGTERM, but)
            await self.all_quiet(grace, but=but)
        await self._signal_all(signal.SIGKILL, but)
        await self.all_quiet(_KILL_GRACE, but=but)

    async def _signal_all(self, number: int, but: Container | None) -> None:
        # One that is gone, or a guest that does not answer: its end is told when the VM's is.
        signals = [container.kill("", number) for container in self._living(but)]
        await asyncio.gather(*signals, return_exceptions=True)

    def _living(self, but: Container | None) -> list[Container]:
        return [each for each in self._containers.values() if each is not but and each.init.exit is None]

    async def all_quiet(self, limit: float, *, but: Container | None = None) -> None:
        """Until the exits of all containers are told, `limit` seconds at most."""
        exits = [each.init.exited for each in self._containers.values() if each is not but]
        if exits:
            await asyncio.wait(exits, timeout=limit)

    async def stop_sandbox(self, sandbox: Sandbox) -> None:
        """End the VM; whatever goes wrong is logged."""
        self._stopped.add(sandbox.id)
        self._usage = Usage()
        try:
            await sandbox.stop()
        except (KataError, OSError) as error:  # `delete` does it again, from the journal
            _log.error("the sandbox did not stop cleanly", sandbox=sandbox.id, error=str(error))

    async def _release(self, sandbox: Sandbox, container_id: str) -> None:
        try:
            await sandbox.release_container(container_id)
        except (KataError, OSError) as error:
            _log.error("not all of the container was released", container=container_id, error=str(error))

    # -- tasks -------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._work.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has it; if nobody does, nobody is left to tell

    async def _to_its_end(self, work: Coroutine[Any, Any, _T]) -> _T:
        return await asyncio.shield(self._spawn(work))
