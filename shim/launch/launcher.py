"""The program `containerd-shim-kata-v2`: what containerd executes for `start` and `delete`.

What: `start` binds the shim's socket, forks the daemon and prints the address; `delete` hands over
to `delete`; the forked child *is* the daemon and imports what it needs only after that.
Why: containerd waits for `start` and for `delete` once per container, so these paths load nothing
that the interpreter has not loaded anyway: no asyncio, no protobuf, no re, not even `__future__` or `socket`
(`_socket` is the C module underneath; tests/unit/shim/launch/test_launcher.py holds the list).
Invariants:
- stdout carries the answer (the address) and nothing else, stderr stays empty when `start` succeeds: both are
  one pipe to containerd, which reads it until every holder has closed it. The child therefore gives
  up fds 0, 1 and 2 before anything else.
- The socket listens before it has its name, and before the address is printed: containerd dials once and at
  once, and of two `start`s at the same time one is the other's.
- A failed `start` removes what it made and exits 1 with one paragraph on stderr.

    start: flags -> sandbox of ./config.json -> bind -> address -> fork -> shim.pid -> print
"""

import os
import sys

from shim.launch.bootstrap import Options, answer, decode, join_cgroup
from shim.launch.flags import USAGE, FlagError, Flags, check_id, parse, runtime_class_of
from shim.state import bundle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    Forked = tuple[int, Callable[[bytes], None]]

__all__ = ["VERSION", "bind", "leave_out_openssl", "leave_standard_streams", "main"]

VERSION = "0.1.0"
NAME = "containerd-shim-kata-v2"
BACKLOG = 128
"""Connections that may wait: containerd opens one per container, while the daemon still imports."""
_ALIVE_TIMEOUT = 0.1  # seconds; what containerd's own shims grant a socket that already exists
_CGROUP_ROOT = "/sys/fs/cgroup"
_ATTEMPTS = 8  # at a name that others take and leave at the same time
_ENOENT, _EADDRINUSE, _ECONNREFUSED = 2, 98, 111  # the module errno costs a tenth of a millisecond


_HINTS = {  # EPERM, EACCES, EAGAIN, ENOSPC: `start` loads no module for their names
    1: "run it as root",
    13: "run it as root",
    11: "raise the limit of processes (ulimit -u, the unit's TasksMax, pids.max of the cgroup)",
    28: "make room in /run",
}


class StartError(Exception):
    """`start` cannot go on; the text is for people."""


def main(argv: list[str] | None = None, *, zygote: str = "", forked: "Forked | None" = None) -> int:
    """Entry point of the program. Returns the exit code; never returns in the daemon.

    `zygote`: where the zygote of this installation listens, if it has one. `forked`: this process is the
    zygote's child and becomes the daemon itself; the pid of containerd, and what takes the answer.
    """
    try:
        flags = parse(sys.argv[1:] if argv is None else argv)
        flags.runtime_class = runtime_class_of(sys.argv[0])
        return _dispatch(flags, zygote, forked)
    except (FlagError, StartError, bundle.BundleError) as error:
        sys.stderr.write(f"{NAME}: {error}\n")
        return 1
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        hint = _HINTS.get(error.errno or 0, "")
        sys.stderr.write(f"{NAME}: {error.strerror or error}{where}{hint and '; try: '}{hint}\n")
        return 1


def _dispatch(flags: Flags, zygote: str, forked: "Forked | None") -> int:
    if flags.help:
        sys.stdout.write(USAGE + "\n")
        return 0
    if flags.version:
        sys.stdout.write(f"{NAME} (kata-shim) version {VERSION}\n")
        return 0
    if flags.info:
        from shim.launch.info import print_info

        return print_info(VERSION, flags.runtime_class)
    if flags.action == "start":
        flags.check()
        _start(flags, zygote, forked)
    if flags.action == "delete":
        flags.check()
        from shim.launch.delete import delete

        return delete(flags.namespace, flags.id, flags.address, flags.bundle or os.getcwd())
    if flags.action == "recover":
        flags.check()
        from shim.launch.takeover import main as recover

        return recover(flags, bind, leave_standard_streams)
    if flags.action in ("", "daemon"):
        flags.check()
        return _foreground(flags)
    if flags.action == "zygote" and (flags.socket or zygote):
        from shim.launch.zygote import main as serve

        leave_out_openssl()
        return serve(flags.socket or zygote, sys.argv[0], main, bind)
    raise FlagError(f"unknown action {flags.action[:80]!a}; start, delete, recover and daemon exist")


def _start(flags: Flags, zygote: str, forked: "Forked | None") -> "NoReturn":
    os.umask(0o077)
    here = os.getcwd()
    options = _read_options()
    flags.debug = flags.debug or options.debug
    flags.placed = bool(options.shim_cgroup)
    group = bundle.find_group(here, flags.id, bare=True)
    check_id("sandbox-id", group.sandbox_id)
    path = bundle.socket_path(flags.address, flags.namespace, group.sandbox_id, options.socket_dir)
    address = bundle.address_of(path)
    listener = -1
    if group.is_member:
        _require_alive(path, group.sandbox_id, flags)
    else:
        listener = bind(path)
    pid = 0
    try:
        bundle.write_atomically(here, "address", address)
        if listener >= 0:
            if forked is not None and os.environ.get("SCHED_CORE"):
                os.setsid()  # the cookie is for a whole process group, which is the zygote's still
            _share_core_scheduling()
            if forked is None:
                pid = _fork_daemon(flags, group.sandbox_id, here, address, listener, options.config_path)
            bundle.write_atomically(here, "shim.pid", str(pid or os.getpid()))
            _adjust_daemon(pid or os.getpid(), forked[0] if forked else os.getppid(), options.shim_cgroup)
        if forked is not None:
            forked[1](answer(address, options))
    except BaseException:
        if pid:
            os.kill(pid, 9)
        elif listener >= 0:
            os.close(listener)
        if listener >= 0:
            from shim.state.names import unlink_dead

            unlink_dead(path)
        raise
    if forked is not None:
        if listener >= 0:
            _be_daemon(flags, group.sandbox_id, here, address, listener, options.config_path)
        os._exit(0)
    os.write(1, answer(address, options))
    if zygote and os.environ.get("KATA_SHIM_ZYGOTE") == "on":
        _start_zygote(zygote)
    os._exit(0)  # nothing is left to do, and to take the interpreter down costs 2 ms


def _start_zygote(place: str) -> None:
    """Have one for the next `start`, unless it is there. The caller has its answer already."""
    if not _connect(place):
        return
    if os.fork():
        return
    try:
        os.setsid()
        leave_standard_streams("/dev/null")
        os.closerange(3, 65536)
        os.chdir("/")
        # Interpreter, options, code, program: as shim/launch/client.c executed us. What it gets to know of
        # containerd's environment is what must be the same in those whom it serves.
        kept = (b"PATH", b"LANG", b"LC_ALL", b"LC_CTYPE", b"KATA_SHIM_PREFIX")
        with open(
            "/proc/self/environ", "rb"
        ) as file:  # os.environ has what the interpreter made of the locale
            pairs = [word.partition(b"=") for word in file.read().split(b"\0")]
        environment = {name: value for name, _, value in pairs if name in kept}
        os.execve(sys.orig_argv[0], [*sys.orig_argv[:4], "zygote"], environment)  # noqa: S606
    finally:
        os._exit(1)


def _read_options() -> Options:
    """Options from a pipe on stdin; containerd gives /dev/null when there are none."""
    try:
        is_pipe = os.fstat(0).st_mode & 0o170000 == 0o010000  # S_ISFIFO
    except OSError:
        is_pipe = False
    data = b""
    while is_pipe and len(data) < 1 << 20 and (more := os.read(0, 1 << 16)):
        data += more
    return decode(data)


def _connect(path: str) -> int:
    """Errno of connecting to the socket at `path`: 0 means that somebody listens there."""
    import _socket

    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        probe.settimeout(_ALIVE_TIMEOUT)
        probe.connect(path)
    except TimeoutError:
        return 0  # its backlog is full: busy, not dead
    except BlockingIOError:
        return 0
    except OSError as error:
        return error.errno or 5  # EIO
    finally:
        probe.close()
    return 0


def _require_alive(path: str, sandbox_id: str, flags: Flags) -> None:
    """The pod's daemon answers, or comes again for the VM that outlived it."""
    number = _connect(path)
    if not number:
        return
    why = os.strerror(number)
    if number in (_ENOENT, _ECONNREFUSED):
        from shim.launch.takeover import Unrecoverable, recover_for_member

        try:
            recover_for_member(flags, sandbox_id)
            return
        except Unrecoverable as reason:
            if reason.lives and not _connect(path):  # somebody else was faster
                return
            why = f"{why}; {reason}"
    raise StartError(
        f"start: the shim of sandbox {sandbox_id} does not answer on {path}: {why};"
        " try: remove the pod and create it again"
    )


def bind(path: str) -> int:
    """A listening socket at `path`, mode 0600; -1 when a live shim listens there already.

    It is bound and listens under a name of this process's, and then gets its own: nobody ever finds it deaf.
    """
    import _socket

    directory = os.path.dirname(path)
    temporary = os.path.join(directory, f".{os.path.basename(path)[:16]}-{os.getpid()}")
    if len(path) > 106 or len(temporary) > 106:
        raise StartError(f"start: socket path {path} has {len(path)} characters; the kernel allows 106")
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        os.umask(0o177)  # the mode that a socket is bound with: 0600
        try:
            listener.bind(temporary)
        except OSError as error:
            os.umask(0o077)
            if error.errno == _ENOENT:
                os.makedirs(directory, 0o700, exist_ok=True)
            elif error.errno == _EADDRINUSE:
                os.unlink(temporary)  # of one with our pid, which was killed
            else:
                raise
            os.umask(0o177)
            listener.bind(temporary)
    except OSError as error:
        raise StartError(f"start: cannot bind {path}: {error.strerror}") from None
    finally:
        os.umask(0o077)
    try:
        listener.listen(BACKLOG)
        for _ in range(_ATTEMPTS):
            try:
                os.link(temporary, path)
                return listener.detach()
            except FileExistsError:
                number = _connect(path)
            if number == 0:
                listener.close()
                return -1
            from shim.state.names import unlink_dead

            unlink_dead(path)  # left by a shim that was killed; or by now it is another start's, and lives
        raise StartError(f"start: cannot bind {path}: what is there answers {os.strerror(number)!r}")
    finally:
        _unlink(temporary)


def _unlink(path: str) -> None:
    try:  # noqa: SIM105  (contextlib is not loaded on this path)
        os.unlink(path)
    except FileNotFoundError:
        pass


def _share_core_scheduling() -> None:
    """A core-scheduling cookie of its own for the pod: SMT siblings never run somebody else's code."""
    if not os.environ.get("SCHED_CORE"):
        return
    from devices.syscalls import create_core_scheduling_cookie

    try:
        create_core_scheduling_cookie()
    except OSError as error:
        raise StartError(
            f"start: core scheduling (sched_core=true) is not available: {error.strerror};"
            " try: set sched_core=false in containerd's configuration"
        ) from None


def _fork_daemon(
    flags: Flags, sandbox_id: str, here: str, address: str, listener: int, config_path: str
) -> int:
    """Fork the daemon; returns its pid in the parent only.

    One fork and setsid: `start` exits right after, which orphans the daemon as a second fork would.
    It leads a session without a terminal and opens none.
    """
    pid = os.fork()
    if not pid:
        _be_daemon(flags, sandbox_id, here, address, listener, config_path)
    os.close(listener)
    return pid


def _be_daemon(
    flags: Flags, sandbox_id: str, here: str, address: str, listener: int, config_path: str
) -> "NoReturn":
    """From now on this process is the daemon."""
    try:
        if os.getsid(0) != os.getpid():
            os.setsid()
        leave_standard_streams(os.path.join(here, "log"))
        _close_leaked(listener)
        import gc

        gc.disable()  # importing makes objects that stay; the daemon turns it on again. Saves 10 ms
        leave_out_openssl()
        from shim.launch.daemon import run

        run(
            flags,
            sandbox_id=sandbox_id,
            bundle=here,
            address=address,
            listener=listener,
            config_path=config_path,
        )
    except BaseException:  # noqa: BLE001  (a forked child must never return)
        import traceback

        traceback.print_exc()  # to the log FIFO
    finally:
        os._exit(1)


def leave_standard_streams(log: str) -> None:
    """0 and 1 to /dev/null; 2, for what the interpreter itself says, to containerd's log FIFO."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)
    try:
        # Reading too, so that it opens without a reader; not blocking, so that nobody waits for one.
        fd = os.open(log, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return
    os.dup2(fd, 2)
    os.close(fd)


def _close_leaked(keep: int) -> None:
    """Descriptors from 3 on that containerd or its starter left open, but for `keep`."""
    os.closerange(3, keep)
    os.closerange(keep + 1, 65536)


def leave_out_openssl() -> None:
    """asyncio and hashlib do without it where a Python has none, as this one has none from now on. The daemon
    speaks no TLS; loading it takes milliseconds and megabytes in each shim."""
    sys.modules["ssl"] = sys.modules["_hashlib"] = None  # type: ignore[assignment]


def _adjust_daemon(pid: int, containerd: int, shim_cgroup: str) -> None:
    """oom_score_adj one above containerd's, so that the kernel takes a pod first; then the cgroup."""
    try:
        with open(f"/proc/{containerd}/oom_score_adj", "rb") as score:
            value = min(1000, int(score.read()) + 1)
        with open(f"/proc/{pid}/oom_score_adj", "wb") as score:
            score.write(b"%d" % value)
    except (OSError, ValueError):
        pass  # not root, or containerd just went away: a preference, not a need
    if shim_cgroup:
        join_cgroup(_CGROUP_ROOT, shim_cgroup, pid)


def _foreground(flags: Flags) -> int:
    """`daemon`, or no action: serve in the foreground, for debugging by hand. Logs go to stderr."""
    os.umask(0o077)
    here = flags.bundle or os.getcwd()
    group = bundle.find_group(here, flags.id)
    check_id("sandbox-id", group.sandbox_id)
    path = flags.socket or bundle.socket_path(flags.address, flags.namespace, group.sandbox_id)
    listener = bind(path)
    if listener < 0:
        raise StartError(f"daemon: another shim listens on {path}")
    bundle.write_atomically(here, "address", bundle.address_of(path))
    sys.stderr.write(f"{bundle.address_of(path)}\n")
    leave_out_openssl()
    from shim.launch.daemon import run

    run(
        flags,
        sandbox_id=group.sandbox_id,
        bundle=here,
        address=bundle.address_of(path),
        listener=listener,
        foreground=True,
    )


if __name__ == "__main__":
    sys.exit(main())
