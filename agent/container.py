"""A container in the guest: bundle, crun, processes, cgroup.

What: the life of one container from CreateContainer to RemoveContainer, and of its exec processes.
Why some of crun's verbs are done here directly: starting is one byte into crun's fifo, killing and
freezing are one write into the cgroup; each saves a 0.1 s program start under emulation.
Invariants: `create` either leaves a created container or nothing (directory, state, cgroup); `remove`
works in every state and twice; finished execs are remembered for `FINISHED_MAX` processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from agent import log
from agent.complaints import explain
from agent.crun import DEADLINE, Crun, unique
from agent.enter import Entrance, fits, pack, read_filter
from agent.fit import NOTHING, fit_resources, merge
from agent.process import Process
from agent.reaper import Reaper
from agent.spec import process_json, resources_json
from agent.stdio.stdio import Ports, Stdio
from agent.stdio.streams import StreamListener
from agent.storage.destinations import make_destinations
from agent.storage.fresh import look_again, shared_files
from agent.storage.submounts import drop, hold
from agent.threads import in_thread
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from proto import oci_pb2

__all__ = ["Container"]

FINISHED_MAX = 256
CONSOLE_DEADLINE = 30.0  # seconds that crun may take to hand over the pty
_SIGNAL_FREEZE = 2.0  # seconds that a signal to everybody waits for the freezer
EMPTY_DEADLINE = 10.0  # seconds that a killed cgroup may take to become empty
_CGROUPS = "/sys/fs/cgroup"


class Container:
    """One container. Calls that change it are serialised by `lock`."""

    def __init__(
        self,
        container_id: str,
        config: dict[str, Any],
        *,
        bundle: str,
        crun: Crun,
        reaper: Reaper,
        listener: StreamListener | None,
        entrance: Entrance | None = None,
    ) -> None:
        self.id = container_id
        self.config = config
        self.bundle = bundle
        self.cgroup = _CGROUPS + config["linux"]["cgroupsPath"]
        self.lock = asyncio.Lock()
        self.started = False
        self.init: Process | None = None
        self.execs: dict[str, Process] = {}
        self.pci_addresses: dict[str, str] = {}  # of devices passed on: the host's -> the guest's
        self._crun = crun
        self._entrance = entrance
        self._held: list[str] = []
        self._files: list[str] = []  # of the host's, mounted one by one
        self._has_nodes = False
        self._reaper = reaper
        self._listener = listener

    # --- creating -----------------------------------------------------------------------------

    async def create(self, ports: Ports) -> None:
        """`crun create`: the init process exists afterwards and waits for `start`."""
        os.makedirs(self.bundle, mode=0o700)
        self._held, self._files = await asyncio.to_thread(_open_files, self.config)
        log.debug(f"container {self.id} uses {self._held}")
        try:
            await self._place_nodes()
            process = self.config["process"]
            process["env"] = unique(process.get("env", []))
            _write_json(f"{self.bundle}/config.json", self.config)
            arguments = ["create", "--bundle", self.bundle]
            self.init = await self._launch(f"container {self.id}", "", self.config, ports, arguments)
        except BaseException:
            await self._discard()
            raise

    async def _place_nodes(self) -> None:
        from agent.nodes import apart, place

        nodes = apart(self.config)
        if nodes:
            self._has_nodes = True
            work = functools.partial(place, self.config, nodes, self.id)
            await in_thread(f"making device nodes for {self.id}", work)

    async def _launch(
        self, what: str, exec_id: str, config: dict[str, Any], ports: Ports, arguments: list[str]
    ) -> Process:
        """Have one process made, with its streams, and adopt it: an exec by `_enter` if that can, else by a
        verb of crun's. `config`: has that process, and what words explain crun's complaints."""
        process = config["process"]
        stdio = await Stdio.open(self._listener, ports, terminal=process["terminal"])
        try:
            since = self._reaper.mark()
            entered = await self._enter(what, process, stdio) if arguments[0] == "exec" else 0
            pid = entered or await self._run_crun(what, config, stdio, arguments)
            stdio.spawned()
            born = Process(exec_id, stdio)
            born.born(pid, self._reaper.watch(pid, since))
            log.debug(f"{what}: pid {pid} {'entered' if entered else 'by crun'}")
            return born
        except BaseException:
            stdio.close()
            raise

    async def _enter(self, what: str, process: dict[str, Any], stdio: Stdio) -> int:
        """The pid of an exec that needs no crun; 0 for one that does."""
        assert self.init is not None
        if self._entrance is None or not fits(process, self.config) or self._is_frozen():
            return 0
        path = f"{self._crun.state_dir(self.id)}/seccomp.bpf"
        seccomp = read_filter(self.config["linux"].get("seccomp"), path)
        if seccomp is None:
            return 0
        stdin, stdout, stderr = stdio.child_fds
        order = pack(process, self.config["process"], seccomp)
        fds = (stdin, stdout, stderr)
        try:
            return await self._entrance.enter(order, self.init, self.cgroup, fds, DEADLINE)
        except TimeoutError:
            raise RpcError(
                Code.DEADLINE_EXCEEDED, f"{what}: the container was not entered within {DEADLINE:g} s"
            ) from None

    async def _run_crun(self, what: str, config: dict[str, Any], stdio: Stdio, arguments: list[str]) -> int:
        """Run a crun verb that leaves one process behind; its pid."""
        process = config["process"]
        pid_path, process_path = self._crun.scratch("pid"), self._crun.scratch("process")
        console: _ConsoleSocket | None = None
        task: asyncio.Future[None] | None = None
        try:
            arguments = [*arguments, "--pid-file", pid_path]
            if arguments[0] == "exec":
                _write_json(process_path, process)
                arguments += ["--detach", "--process", process_path]
            if stdio.terminal:
                console = _ConsoleSocket(self._crun.scratch("tty"))
                arguments += ["--console-socket", console.path]
            stdin, stdout, stderr = stdio.child_fds
            count = len(process.get("env", ()))
            run = self._crun.run(
                what, *arguments, container=self.id, fds=(stdin, stdout, stderr), variables=count
            )
            task = asyncio.ensure_future(_explained(run, config))
            if console is not None:
                size = process.get("consoleSize", {})
                pty = await console.receive(task)
                stdio.attach_console(pty, size.get("height", 0), size.get("width", 0))
            await task
            return int(_read(pid_path))
        except BaseException:
            if task is not None:
                task.cancel()  # a crun that sent no terminal must not go on
            raise
        finally:
            if console is not None:
                console.close()
            _unlink(pid_path)
            _unlink(process_path)

    async def _discard(self) -> None:
        """After a failed create: nothing of it may stay."""
        try:
            await self._crun.run("cleaning up", "delete", "--force", container=self.id)
        except RpcError as error:
            log.debug(error.message)
        await self._clean()

    async def _clean(self) -> None:
        """Remove its files, with no process of it left."""
        for directory in (self.bundle, self._crun.root_of(self.id)):
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        if self._has_nodes:
            from agent.nodes import remove

            await asyncio.to_thread(remove, self.id)
        await asyncio.to_thread(drop, self._held)

    async def start(self) -> None:
        """Let the created init go on into the container's program."""
        if self.started:
            raise RpcError(Code.FAILED_PRECONDITION, f"container {self.id} is already started")
        self.started = True
        if self._files:
            with contextlib.suppress(RpcError):  # it has waited for long enough
                await in_thread(f"looking at the files of {self.id}", lambda: look_again(self._files))
        # Hooks that `crun start` would have to run never reach the guest, so all that is left of it is
        # to let go of the init, which saves the time to load crun once more.
        if not self._crun.release(self.id):
            await self._crun.run(f"starting {self.id}", "start", container=self.id)

    async def exec(
        self, exec_id: str, process: oci_pb2.Process, ports: Ports, beyond: Mapping[str, Any] = NOTHING
    ) -> None:
        """One more process in the running container. `beyond`: see `agent.fit`."""
        old = self.execs.get(exec_id)
        if old is not None and old.alive:
            raise RpcError(Code.ALREADY_EXISTS, f"exec {exec_id} runs already in {self.id}")
        if self.init is None or not self.init.alive:
            raise RpcError(Code.FAILED_PRECONDITION, f"container {self.id} is not running")
        config = process_json(process)
        merge(config, beyond.get("process", {}))
        if self.pci_addresses:
            from agent.vfio import rename

            config["env"] = rename(config["env"], self.pci_addresses)
        config["env"] = unique(config["env"])
        what = f"exec {exec_id} in {self.id}"
        self.execs[exec_id] = await self._launch(what, exec_id, {"process": config}, ports, ["exec"])
        self._forget_finished()

    def _forget_finished(self) -> None:
        finished = [name for name, process in self.execs.items() if not process.alive]
        for name in finished[: max(0, len(finished) - FINISHED_MAX)]:
            self.execs.pop(name).stdio.release()

    # --- running ------------------------------------------------------------------------------

    def process(self, exec_id: str) -> Process:
        """By exec id; "" and the container's own id mean its init. Raises NOT_FOUND."""
        process = self.init if exec_id in ("", self.id) else self.execs.get(exec_id)
        if process is None:
            raise RpcError(Code.NOT_FOUND, f"container {self.id} has no process {exec_id or 'init'}")
        return process

    async def signal(self, exec_id: str, number: int) -> None:
        """To one process, or with an empty exec id to everything in the cgroup, as in Kata's agents."""
        process = self.process(exec_id)
        if number == signal.SIGKILL and exec_id in ("", self.id):
            self.kill_all()
        elif not exec_id and number:
            await self._signal_rest(process, number)
        if process.alive or number != signal.SIGKILL:
            process.signal(number)

    async def _signal_rest(self, but: Process, number: int) -> None:
        """A signal to each process in the cgroup except one. None escapes by forking: they are frozen."""
        try:
            frozen = "1" in _read(f"{self.cgroup}/cgroup.freeze")
        except OSError:  # it has ended, and its cgroup is gone
            return
        with contextlib.suppress(RpcError):  # one hangs in the kernel: the others are to hear of it
            await self.freeze(True, _SIGNAL_FREEZE)
        try:
            for pid in self.pids():
                if pid != but.pid:
                    with contextlib.suppress(OSError):  # a zombie may go at any time
                        os.kill(pid, number)
        finally:
            if not frozen:
                await self.freeze(False)

    def _is_frozen(self) -> bool:
        try:
            return "1" in _read(f"{self.cgroup}/cgroup.freeze")
        except OSError:
            return False

    def pids(self) -> list[int]:
        """The processes in the cgroup, the groups that the container made below it included."""
        found: list[int] = []
        for directory, _, _ in os.walk(self.cgroup):
            with contextlib.suppress(OSError):  # gone meanwhile, or a threaded group, which lists none
                found += map(int, _read(f"{directory}/cgroup.procs").split())
        return found

    def kill_all(self) -> None:
        """SIGKILL to everything in the container's cgroup (cgroup.kill, Linux 5.14)."""
        try:
            _write(f"{self.cgroup}/cgroup.kill", "1")
        except OSError as error:
            log.debug(f"cgroup.kill of {self.id}: {error}")

    async def freeze(self, frozen: bool, deadline: float = EMPTY_DEADLINE) -> None:
        """Pause or resume everything in the cgroup. Raises DEADLINE_EXCEEDED, with nothing frozen."""
        try:
            _write(f"{self.cgroup}/cgroup.freeze", "1" if frozen else "0")
        except OSError as error:
            raise RpcError(Code.INTERNAL, f"freezing {self.id}: {error.strerror}") from None
        if not await self._until_event("frozen", int(frozen), deadline):
            with contextlib.suppress(OSError):  # half of it frozen helps nobody
                _write(f"{self.cgroup}/cgroup.freeze", "0")
            raise RpcError(
                Code.DEADLINE_EXCEEDED,
                f"{'freezing' if frozen else 'thawing'} {self.id} took longer than {deadline:g} s",
            )

    async def _until_event(self, key: str, value: int, deadline: float = EMPTY_DEADLINE) -> bool:
        """Wait until cgroup.events says `key value`; False at the deadline."""
        from agent.inotify import Inotify

        path = f"{self.cgroup}/cgroup.events"
        wanted = f"{key} {value}"
        changed = asyncio.Event()
        inotify = Inotify(asyncio.get_running_loop())
        try:
            async with asyncio.timeout(deadline):
                inotify.watch(path, changed.set)
                while wanted not in _read(path).splitlines():
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            return False
        except OSError:  # the cgroup is gone
            return True
        finally:
            inotify.close()
        return True

    async def update(self, resources: oci_pb2.LinuxResources, beyond: Mapping[str, Any] = NOTHING) -> None:
        """New limits for the container; `beyond`: see `agent.fit`."""
        from agent.limits import apply

        wanted = resources_json(resources)
        merge(wanted, beyond.get("linux", {}).get("resources", {}))
        fit_resources(wanted)
        await in_thread(f"updating {self.id}", functools.partial(apply, self.cgroup, wanted))

    # --- removing -----------------------------------------------------------------------------

    async def remove(self) -> None:
        """Kill what still runs, let crun forget the container, remove its bundle and cgroup."""
        self.kill_all()
        if self.init is not None and self.init.alive:
            with contextlib.suppress(RpcError):
                self.init.signal(signal.SIGKILL)
        await self._until_event("populated", 0)
        await self._crun.run(f"removing {self.id}", "delete", "--force", container=self.id)
        if self.init is not None:
            self.init.stdio.release()
        for process in self.execs.values():
            process.stdio.release()
        await self._clean()
        with contextlib.suppress(OSError):  # crun removed it already, as it should
            os.rmdir(self.cgroup)


class _ConsoleSocket:
    """The unix socket over which crun sends the controlling side of a container's pty."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(1)
        self._listener.setblocking(False)

    async def receive(self, crun: asyncio.Future[None]) -> int:
        """The descriptor. Ends with crun's own error when crun fails first."""
        loop = asyncio.get_running_loop()
        accept = asyncio.ensure_future(loop.sock_accept(self._listener))
        try:
            both: set[asyncio.Future[Any]] = {accept, crun}
            await asyncio.wait(both, timeout=CONSOLE_DEADLINE, return_when=asyncio.FIRST_COMPLETED)
            if not accept.done():
                if crun.done():
                    await crun
                raise RpcError(Code.INTERNAL, "crun sent no terminal")
            connection, _ = accept.result()
        finally:
            accept.cancel()
        with connection:
            return await self._take_fd(loop, connection)

    async def _take_fd(self, loop: asyncio.AbstractEventLoop, connection: socket.socket) -> int:
        connection.setblocking(False)
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_reader(connection, lambda: None if ready.done() else ready.set_result(None))
        try:
            await asyncio.wait_for(ready, CONSOLE_DEADLINE)
        finally:
            loop.remove_reader(connection)
        _, fds, _, _ = socket.recv_fds(connection, 4096, 1)
        if not fds:
            raise RpcError(Code.INTERNAL, "crun sent no terminal")
        os.set_inheritable(fds[0], False)
        return fds[0]

    def close(self) -> None:
        """Remove the socket."""
        self._listener.close()
        _unlink(self.path)


async def _explained(crun: Coroutine[Any, Any, None], config: dict[str, Any]) -> None:
    """Wait for crun; its complaint gets the words of the config."""
    try:
        await crun
    except RpcError as error:
        explained = explain(error, config)
        if explained is not error:
            raise explained from None
        raise


def _open_files(config: dict[str, Any]) -> tuple[list[str], list[str]]:
    held = hold(config)
    make_destinations(config)
    return held, shared_files(config)


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def _write_json(path: str, value: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
