"""The `recover` action: a new daemon for a sandbox whose VM runs and whose shim is dead.

What: `judge` says whether that is so, and why not; `recover` starts the daemon, and returns when it has VM
and processes, or says what prevented it.
Why it is asked for, and no daemon's own idea: a `start` for a sandbox is a new one's; whoever wants the old
one says so (`kata-ctl recover`), or must mean it (`start` for a pod's member: `recover_for_member`).
Invariants:
- Two daemons never have one sandbox: the state directory's lock, the journal's daemon and the socket are
  each looked at; who has the lock has the journal.
- The new daemon is in the mount namespace of the old one, and in the cgroups of its VM: what the old one
  mounted is there, and whoever ran `recover` may go (systemd kills what ExecStartPre= leaves in its own).
- Until it reports success nothing of the sandbox was changed; one that fails goes, and `delete` finds all.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from shim.launch.flags import Flags
from shim.launch.order import MAX_REPORT, Order, Plight
from shim.launch.remains import daemon_of
from shim.state import bundle, journalfile, recoveryfile
from shim.state.identity import Identity
from shim.state.procfs import is_running
from shim.state.recoveryfile import RecoveryError
from shim.state.statedir import is_owned

__all__ = [
    "Unrecoverable",
    "argv_of",
    "judge",
    "recover",
    "recover_for_member",
]

_REPORT_LIMIT = 60.0  # seconds for a daemon to have everything back
_CGROUPS = "/sys/fs/cgroup"


class Unrecoverable(Exception):  # noqa: N818  (a state, not a fault)
    """It cannot be recovered; the text says why. `lives`: because its shim lives, and has no need."""

    def __init__(self, why: str, *, lives: bool = False) -> None:
        super().__init__(why)
        self.lives = lives


def judge(identity: Identity) -> Plight:
    """Raises Unrecoverable. Blocks; changes nothing."""
    directory = identity.state_dir
    if not os.path.isdir(directory):
        raise Unrecoverable(f"there is no sandbox {identity}")
    try:
        history = journalfile.load(directory)
    except (journalfile.JournalError, OSError) as error:
        raise Unrecoverable(f"its journal cannot be read: {error}") from None
    if history.identity != identity:
        raise Unrecoverable(f"{directory} is that of {history.identity}")
    if (daemon := daemon_of(history)) is not None:
        raise Unrecoverable(f"its shim lives (pid {daemon.facts['pid']})", lives=True)
    if is_owned(directory):
        raise Unrecoverable(f"somebody has {directory}: a shim that starts, or a `delete`", lives=True)
    if history.damage:
        raise Unrecoverable(f"its journal is damaged: {history.damage}")
    try:
        saved = recoveryfile.read(directory)
    except FileNotFoundError:
        raise Unrecoverable(
            'its VM was not kept: on_shim_death = "keep" in [runtime] does that, for sandboxes to come'
        ) from None
    except RecoveryError as error:
        raise Unrecoverable(str(error)) from None
    pid, start = saved.sandbox.vm.get("pid"), saved.sandbox.vm.get("start")
    if not isinstance(pid, int) or not isinstance(start, int) or not is_running(pid, start):
        raise Unrecoverable("its VM is dead; `delete`, which containerd runs, cleans up")
    program = saved.daemon.program
    if not program or not all(map(os.path.isabs, (program[0], program[-1]))):
        raise Unrecoverable("the shim that started it does not say which program it was")
    if not os.access(program[-1], os.X_OK):
        raise Unrecoverable(f"its shim {program[-1]} is not there any more: install it at that place again")
    if not os.path.isdir(history.bundle):
        raise Unrecoverable(f"its bundle {history.bundle} is gone: containerd does not know it any more")
    return Plight(identity, saved, history.bundle, _holder(history, saved.daemon.mounts))


def _holder(history: journalfile.History, mounts: int) -> int:
    """A process in the mount namespace of the dead shim."""
    for record in reversed(history.records):
        pid, start = record.facts.get("pid"), record.facts.get("start")
        if record.kind == "process" and isinstance(pid, int) and isinstance(start, int):
            try:
                found = os.stat(f"/proc/{pid}/ns/mnt").st_ino
            except OSError:
                continue
            if found == mounts and is_running(pid, start):
                return pid
    raise Unrecoverable("no process holds the mounts of its shim any more")


def recover(
    flags: Flags, sandbox_id: str, bind: Callable[[str], int], leave_streams: Callable[[str], None]
) -> int:
    """Have a new daemon for the sandbox; its pid. `bind` and `leave_streams` are the launcher's. Raises
    Unrecoverable. Blocks, a minute at most."""
    plight = judge(Identity(flags.address, flags.namespace, sandbox_id))
    listener = bind(plight.saved.daemon.socket)
    if listener < 0:
        raise Unrecoverable(f"somebody listens on {plight.saved.daemon.socket}", lives=True)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if not pid:
        _daemon(flags, plight, listener, writer, leave_streams)
    os.close(listener)
    os.close(writer)
    try:
        _hear(reader, pid)
    finally:
        os.close(reader)
    bundle.write_atomically(plight.bundle, "shim.pid", str(pid))
    return pid


def recover_for_member(flags: Flags, sandbox_id: str) -> None:
    """For `start` of a pod's member. The daemon gets a command line of its own. Raises Unrecoverable."""
    plight = judge(Identity(flags.address, flags.namespace, sandbox_id))
    code = os.spawnve(  # noqa: S606  (its own program, by a path that only root writes)
        os.P_WAIT,
        plight.saved.daemon.program[0],
        argv_of(plight),
        {**plight.saved.daemon.environment, **os.environ},
    )
    if code:
        raise Unrecoverable("its shim could not be started again: see above")


def argv_of(plight: Plight) -> list[str]:
    """The command line of a shim that is to take over."""
    daemon, identity = plight.saved.daemon, plight.identity
    argv = [*daemon.program, "-namespace", identity.namespace, "-address", identity.address]
    argv += ["-publish-binary", daemon.publish_binary, "-bundle", plight.bundle, "-id", identity.sandbox_id]
    return [*argv, *(["-debug"] if daemon.debug else []), "recover"]


def _hear(reader: int, pid: int) -> None:
    """Wait for the daemon's report. Raises Unrecoverable."""
    until = time.monotonic() + _REPORT_LIMIT
    said = b""
    while len(said) < MAX_REPORT:
        ready, _, _ = select.select([reader], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise Unrecoverable(f"it did not come back within {_REPORT_LIMIT:.0f} s")
        piece = os.read(reader, 4096)
        if not piece:
            break
        said += piece
    if said.strip():
        os.waitpid(pid, 0)  # it goes by itself
        raise Unrecoverable(said.decode("utf-8", "replace").strip())
    if not said:
        os.waitpid(pid, 0)
        raise Unrecoverable("the new daemon ended without a word; see containerd's log")


def _daemon(
    flags: Flags, plight: Plight, listener: int, writer: int, leave_streams: Callable[[str], None]
) -> NoReturn:
    """In the child: become the daemon that the dead one was."""
    saved = plight.saved.daemon
    try:
        os.setsid()
        os.umask(0o077)
        for name, value in saved.environment.items():
            os.environ.setdefault(name, value)
        leave_streams(os.path.join(plight.bundle, "log"))
        first, second = sorted((listener, writer))
        os.closerange(3, first)
        os.closerange(first + 1, second)
        os.closerange(second + 1, 65536)
        _join(int(plight.saved.sandbox.vm["pid"]))
        flags.id, flags.publish_binary = saved.id, saved.publish_binary
        flags.runtime_class, flags.debug = saved.runtime_class, saved.debug or flags.debug
        from shim.launch.daemon import run

        run(
            flags,
            sandbox_id=plight.identity.sandbox_id,
            bundle=plight.bundle,
            address=bundle.address_of(saved.socket),
            listener=listener,
            config_path=saved.config_path,
            takeover=Order(plight, writer),
        )
    except BaseException as error:  # noqa: BLE001  (a forked child must never return)
        os.write(writer, f"{type(error).__name__}: {error}".encode("utf-8", "replace"))
    finally:
        os._exit(1)


def _join(vmm: int) -> None:
    """Be where the VM is: its cgroups, and its place in line when memory is short. As far as possible."""
    try:
        with open(f"/proc/{vmm}/cgroup", encoding="utf-8") as file:
            lines = file.read().splitlines()
        with open(f"/proc/{vmm}/oom_score_adj", "rb") as score, open("/proc/self/oom_score_adj", "wb") as own:
            own.write(score.read())
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if path.startswith("/.."):  # not in our cgroup namespace
            continue
        for root in (f"{_CGROUPS}/{controllers.removeprefix('name=')}", f"{_CGROUPS}/unified", _CGROUPS):
            try:
                with open(f"{root}{path}/cgroup.procs", "w", encoding="ascii") as procs:
                    procs.write(str(os.getpid()))
                break
            except OSError:
                continue


def main(flags: Flags, bind: Callable[[str], int], leave_streams: Callable[[str], None]) -> int:
    """The action `recover`: exit code 0 if the sandbox has a daemon again, else 1, why on stderr."""
    try:
        recover(flags, flags.id, bind, leave_streams)
    except Unrecoverable as why:
        sys.stderr.write(f"recover {flags.namespace}/{flags.id}: {why}\n")
        return 1
    return 0
