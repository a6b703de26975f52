"""The daemon: one process, one sandbox, from the fork to the last event.

What: prepares the process, then serves containerd's Task service (v2 and v3) on the socket that the
launcher bound, until somebody asks for shutdown.
Why the order in `_serve`: what is undone last was made first, so that each failure finds the means
to undo it still there.
Invariants:
- The process has a mount namespace of its own: what it mounts dies with the last process of the pod.
- SIGTERM and SIGINT end an idle daemon only: service managers send them to whole cgroups, and a pod
  ends when containerd says so. SIGPIPE and SIGHUP are ignored.
- The state directory is locked from before the journal to the exit; socket and link are removed only while
  they are this daemon's: the next one of the same sandbox may be there before this one is gone.
- Shutdown, in this order: the socket's path goes (the sign for `delete` that we are on our way),
  containers and VM end, events are flushed (5 s), connections close, the journal is undone, exit 0.
- A daemon that has no container for two minutes ends by itself: containerd died before Create.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
from typing import TYPE_CHECKING, Any, NoReturn

import structlog
from google.protobuf.empty_pb2 import Empty

from devices import syscalls
from devices.errors import CallerError, HostError, KataError
from devices.mark import mark_children
from devices.mounts import make_private
from devices.threads import acquire
from proto import task_v2_pb2, task_v3_pb2
from shim.launch.flags import Flags
from shim.launch.reaper import Reaper
from shim.protocols import DaemonContext, ShimService, Takeover
from shim.state import logs
from shim.state.identity import Identity
from shim.state.journal import Journal
from shim.state.names import make_link, remove_link, socket_facts, unlink_socket
from shim.state.procfs import start_time
from shim.state.statedir import Owned, StateDir
from shim.tasks.events import EventPublisher
from ttrpc import CallContext, Server

if TYPE_CHECKING:
    from shim.launch.order import Order

__all__ = ["run"]

IDLE_LIMIT = 120.0
"""Seconds without a container after which the daemon ends."""
_FLUSH_LIMIT = 5.0  # seconds for the last events
_CLOSE_LIMIT = 30.0  # seconds for containers and VM; they have deadlines of their own underneath
_REPLY_GRACE = 1.0  # seconds for replies in flight
_REFUSAL_LIMIT = 60.0  # seconds that a daemon which cannot work stays to say so
_OWNER_LIMIT = 10.0  # seconds for an earlier daemon of the same sandbox, or a `delete`, to finish

_log = structlog.get_logger("daemon")


def run(
    flags: Flags,
    *,
    sandbox_id: str,
    bundle: str,
    address: str,
    listener: int,
    config_path: str = "",
    foreground: bool = False,
    takeover: Order | None = None,
) -> NoReturn:
    """Serve on the listening socket `listener` until shutdown, then exit the process.

    `config_path` is that of the options which came with `start`, if they had one. `takeover`: the sandbox is
    there, and its daemon is dead.
    """
    logs.configure(
        bundle, debug=flags.debug, foreground=foreground, sandbox=sandbox_id, namespace=flags.namespace
    )
    code = 1
    place = _Place(address.removeprefix("unix://"))
    try:
        host_mounts, problem = _prepare_process(takeover)
        # Never closed: that would wait for threads which look at file systems that do not answer.
        runner = asyncio.Runner()
        code = runner.run(
            _serve(flags, sandbox_id, bundle, place, listener, config_path, host_mounts, takeover, problem)
        )
    except BaseException as error:  # noqa: BLE001  (the last line of defence: say why, then go)
        _log.exception("the daemon failed")
        if takeover is not None:
            takeover.report(f"{type(error).__name__}: {error}")
        place.leave()
    finally:
        os._exit(code)


class _Place:
    """Where the daemon listens. `leave` removes the socket, unless it is somebody else's by now."""

    def __init__(self, path: str) -> None:
        self.address = f"unix://{path}"
        self.facts = socket_facts(path)

    def leave(self) -> None:
        """Be found by nobody any more. Idempotent."""
        facts = self.facts
        with contextlib.suppress(OSError):
            unlink_socket(str(facts["path"]), int(facts["inode"]), int(facts["made"]))


def _prepare_process(takeover: Order | None) -> tuple[int | None, KataError | None]:
    """A descriptor of the mount namespace that was left, if it was; why nothing can be served, if so."""
    os.umask(0o077)
    with contextlib.suppress(OSError), open("/proc/self/comm", "wb", 0) as name:
        name.write(b"containerd-shim")  # what ps shows; executed by the client, it would be "python3"
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    syscalls.set_child_subreaper()
    if takeover is not None:
        return takeover.enter_mounts(), None
    try:
        return make_private(), None
    except PermissionError:
        # Not root: no mounts either, so nothing can leak.
        _log.warning("no mount namespace of our own: not permitted")
        return None, None
    except KataError as error:
        return None, error


async def _serve(
    flags: Flags,
    sandbox_id: str,
    bundle: str,
    place: _Place,
    listener: int,
    config_path: str,
    host_mounts: int | None,
    takeover: Order | None,
    problem: KataError | None = None,
) -> int:
    """Set up, serve, take down; returns the exit code. `problem`: all that is left is to tell it."""
    sock = socket.socket(fileno=listener)
    sock.setblocking(False)
    server = Server(allowed_uids={0, os.geteuid()})
    stop = asyncio.Event()
    try:
        if problem is not None:
            raise problem
        return await _serve_tasks(
            flags, sandbox_id, bundle, place, config_path, server, sock, stop, host_mounts, takeover
        )
    except KataError as error:
        if takeover is not None:  # nothing was changed but the journal's word for who we are
            _log.error("not recovered", error=str(error))
            takeover.report(str(error))
            place.leave()
            return 1
        # Only setting up raises. Gone without a word, the shim would be "ttrpc: closed" to the user;
        # so it stays for the Create that will come and answers that.
        _log.error("cannot serve", error=str(error))
        await _serve_refusal(error, server, sock, stop)
        place.leave()
        return 1


def _log_stray(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What asyncio would print to stderr, which is /dev/null here: a failure that nobody waited for."""
    error = context.get("exception")
    _log.error("unhandled", what=str(context.get("message"))[:200], exc_info=error or None)


async def _serve_refusal(error: KataError, server: Server, sock: socket.socket, stop: asyncio.Event) -> None:
    """Answer every Create with `error` until Shutdown, for a minute at most."""
    from proto import sandbox_v1_pb2

    for package in (task_v2_pb2, task_v3_pb2):
        server.register(package.DESCRIPTOR.services_by_name["Task"], _Refusal(error, stop))
    server.register(sandbox_v1_pb2.DESCRIPTOR.services_by_name["Sandbox"], _SandboxRefusal(error, stop))
    serving = asyncio.create_task(server.serve(sock), name="ttrpc server")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_REFUSAL_LIMIT):
            await stop.wait()
    await server.close(_REPLY_GRACE)
    await serving


class _SandboxRefusal:
    """Its Sandbox service."""

    def __init__(self, error: KataError, stop: asyncio.Event) -> None:
        self._error = error
        self._stop = stop

    async def create_sandbox(self, _context: CallContext, _request: object) -> NoReturn:
        raise self._error

    async def shutdown_sandbox(self, _context: CallContext, _request: object) -> Any:
        from proto import sandbox_v1_pb2

        self._stop.set()
        return sandbox_v1_pb2.ShutdownSandboxResponse()


class _Refusal:
    """The Task service of a daemon that cannot work."""

    def __init__(self, error: KataError, stop: asyncio.Event) -> None:
        self._error = error
        self._stop = stop

    async def create(self, _context: CallContext, _request: object) -> NoReturn:
        raise self._error

    async def state(self, _context: CallContext, _request: object) -> NoReturn:
        raise CallerError("no container was created", code="NOT_FOUND")

    delete = state

    async def shutdown(self, _context: CallContext, _request: object) -> Empty:
        self._stop.set()
        return Empty()


async def _serve_tasks(
    flags: Flags,
    sandbox_id: str,
    bundle: str,
    place: _Place,
    config_path: str,
    server: Server,
    sock: socket.socket,
    stop: asyncio.Event,
    host_mounts: int | None,
    takeover: Order | None,
) -> int:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_stray)
    identity = Identity(flags.address, flags.namespace, sandbox_id)
    own = {"pid": os.getpid(), "start": start_time(os.getpid())}
    mark_children(identity.key, own["start"])
    home = await _own(identity)
    made: Journal | None = None
    try:
        if takeover is not None:
            journal = await takeover.adopt(identity, home.path)
        elif os.listdir(home.path) or (os.path.isdir(identity.link) and not os.path.islink(identity.link)):
            await acquire(_clear, identity, home, own["start"])
        if takeover is None:
            journal = made = Journal.create(home.path, identity, bundle)
        # Recorded first, so released last, which here means nothing: until then `delete` sees us alive.
        journal.record("process", lambda: None, name="shim", **own)
        listening = journal.record("socket", place.leave, **place.facts)
        linked = takeover.linked(sandbox_id) if takeover is not None else await _link(identity, journal)
    except BaseException as error:
        if made is not None and not isinstance(
            error, KataError
        ):  # nobody calls `delete` for who never served
            await made.release_all()
            made.close()
            with contextlib.suppress(OSError):
                await acquire(home.remove)
        else:
            with contextlib.suppress(OSError):
                os.rmdir(home.path)  # if nothing is in it
        home.close()
        raise

    def ask() -> None:
        # Before the answer: `delete` comes right after it, and waits for whoever has no socket any more.
        place.leave()
        stop.set()

    events = EventPublisher(flags.namespace, os.environ.get("TTRPC_ADDRESS", ""))
    context = DaemonContext(
        namespace=flags.namespace,
        id=flags.id,
        sandbox_id=sandbox_id,
        containerd=flags.address,
        key=identity.key,
        alias=sandbox_id if linked else identity.key,
        bundle=bundle,
        address=place.address,
        config_path=config_path,
        publish_binary=flags.publish_binary,
        state_dir=home.path,
        share_dir=identity.share_dir,
        debug=flags.debug,
        events=events,
        undo=journal,
        shutdown=ask,
        runtime_class=flags.runtime_class,
        host_mounts=host_mounts,
        placed=flags.placed,
        takeover=Takeover(takeover.saved, lambda: journal.entries) if takeover is not None else None,
    )
    from shim.runtime import build_service

    service: ShimService = build_service(context)
    if takeover is not None:
        await service.take_over()
        takeover.report("")
    service.register(server)
    reaper = Reaper(loop)
    _handle_signals(loop, service, stop)
    serving = asyncio.create_task(server.serve(sock), name="ttrpc server")
    idle = asyncio.create_task(_end_when_idle(service, stop), name="idle timer")
    gc.freeze()  # what is loaded now stays; the collector need not walk it again
    gc.enable()
    _log.info("serving", address=place.address, pid=os.getpid(), container=flags.id)

    stopping = asyncio.create_task(stop.wait(), name="stop")
    await asyncio.wait([stopping, serving], return_when=asyncio.FIRST_COMPLETED)
    failed = serving.done() and not stop.is_set()
    if failed:
        _log.error("the server ended by itself", error=str(serving.exception() or ""))
    idle.cancel()
    stopping.cancel()

    _log.info("shutting down")
    await journal.release(listening)
    await _bounded("containers", service.close(), _CLOSE_LIMIT)
    if not await events.flush(_FLUSH_LIMIT):
        _log.warning("not all events were taken", pending=events.pending)
    await _bounded("server", server.close(_REPLY_GRACE), _REPLY_GRACE * 2)
    with contextlib.suppress(Exception):
        await serving
    await events.close()
    reaper.close()
    errors = await journal.release_all()
    journal.close()
    if not errors:
        try:
            await acquire(home.remove)
        except (OSError, KataError) as error:
            errors.append(error)
    for left in errors:
        _log.error("not undone", error=str(left))
    _log.info("done", leftovers=len(errors))
    return 1 if failed or errors else 0


async def _own(identity: Identity) -> StateDir:
    """The sandbox's state directory, which is this daemon's from now on. Raises HostError."""
    try:
        try:
            return StateDir.make(identity.state_dir, 0)
        except Owned:
            _log.warning("an earlier shim of this sandbox is still there: waiting for its end")
        return await acquire(StateDir.make, identity.state_dir, _OWNER_LIMIT, lost=StateDir.close)
    except OSError as error:
        raise HostError(
            f"cannot make {identity.state_dir}: {error.strerror}",
            phase="journal",
            hint="the shim needs root's rights and a writable /run",
        ) from error
    except Owned:
        raise HostError(
            f"another shim of {identity} still has {identity.state_dir} after {_OWNER_LIMIT:.0f} s",
            phase="journal",
            hint="see `kata-ctl list`; end it, then try again",
            code="ALREADY_EXISTS",
        ) from None


def _clear(identity: Identity, home: StateDir, start: int) -> None:
    """Clean up after an earlier shim of this sandbox that was killed, if `delete` never came. Blocks.

    What cannot be cleaned up stays in the journal, and `Journal.create` refuses.
    """
    from shim.launch.remains import clear

    problems = clear(identity, home, start)
    if problems is not None:
        _log.warning("remains of an earlier shim", problems=problems)


async def _link(identity: Identity, journal: Journal) -> bool:
    """Let Kata's tools find us by the id, if nobody else has that name here; whether they do."""
    link, target = identity.link, identity.state_dir

    async def remove() -> None:
        await acquire(remove_link, link, target)

    entry = journal.record("link", remove, path=link, target=target)
    try:
        made = await acquire(make_link, link, target)
    except OSError as error:
        _log.warning("no link for Kata's tools", link=link, error=error.strerror)
        made = False
    if not made:
        journal.forget(entry)
        _log.info("another sandbox of this host has that id, and the link", link=link)
    return made


def _handle_signals(loop: asyncio.AbstractEventLoop, service: ShimService, stop: asyncio.Event) -> None:
    def asked(number: signal.Signals) -> None:
        if service.idle:
            stop.set()
        else:
            _log.warning("signal ignored: containers live, containerd decides", signal=number.name)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked, number)


async def _end_when_idle(service: ShimService, stop: asyncio.Event) -> None:
    """Ask for shutdown when no container existed at two checks in a row, IDLE_LIMIT apart."""
    idle_before = True
    while True:
        await asyncio.sleep(IDLE_LIMIT)
        if service.idle and idle_before:
            _log.warning("no container: giving up", seconds=IDLE_LIMIT)
            stop.set()
            return
        idle_before = service.idle


async def _bounded(what: str, work: object, limit: float) -> None:
    """Await `work`, log what it raises, and give up on it after `limit` seconds."""
    try:
        async with asyncio.timeout(limit):
            await work  # type: ignore[misc]
    except Exception as error:  # noqa: BLE001  (shutdown goes on past every error)
        _log.error("shutdown step failed", step=what, error=str(error) or type(error).__name__)
