"""One bench host: started for one job, watched, ended; its output, its words and its exit code come back.

What: `BenchHost` runs a shell command in a nested machine under TCG with emulated SVM, whose kernel has a
real /dev/kvm, /dev/vhost-vsock, /dev/vhost-net and VFIO; `run` does that with the one retry that is allowed.
Why: development machines and CI have no usable KVM. docs/bench-host.md says how to use it.
Invariants:
- The machine's root is this machine's root, by virtio-fs from a read-only bind mount in a mount namespace of
  its own: root in there cannot write here, whatever it mounts. All that it writes is in its memory.
- It ends: with its job, with a kernel panic (a soft lockup is made one), or at `limit` seconds; and it never
  outlives this process.
- One at a time on a machine (a lock): two would only make each other slow.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from devices.mounts import mount_table
from devices.plain import plain
from devices.share_fs import find_virtiofsd
from testing.guest import PROJECT

from .image import initramfs, prepare

__all__ = [
    "MODULES",
    "SPARE_DISK",
    "BenchHost",
    "Event",
    "Result",
    "Settings",
    "events",
    "run",
    "soft_lockup",
    "take_turn",
]

MODULES = ("kvm_amd", "vhost_vsock", "vhost_net", "tun", "loop")
_LOCK = "/tmp/kata-bench-host.lock"  # shared by all clones on this machine
_PREFIX = "kata-bench-host-"
_BOOT_LIMIT = 180.0  # seconds from QEMU's start to the job's; 5 s on a quiet machine
SPARE_DISK = b"the bench host's spare disk\n"
"""What the NVMe disk begins with; then zeros, 16 MiB in all."""
_SPARE_DEVICES = (  # each behind a port of its own, the last two behind one
    ("edu",),
    ("nvme,serial=spare,drive=spare",),
    ("virtio-net-pci,netdev=net,iommu_platform=on,disable-legacy=on",),
    ("pvpanic-pci,addr=0.0,multifunction=on", "pvpanic-pci,addr=0.1"),
)
_CONSOLE_LIMIT = 1 << 20
_OUTPUT_LIMIT = 4 << 20
_KERNEL_WORDS = (
    "console=ttyS0 quiet reboot=t panic=-1 softlockup_panic=1 tsc=reliable no_timer_check mitigations=off"
    " cryptomgr.notests intel_iommu=on"
)
# `mount -o ro` in the guest would be the guest's own promise; this one is the kernel's.
_SHARE = """
set -e
ro=$1; shift
mount --bind / "$ro"
while [ "$1" != -- ]; do mount --bind "$1" "$ro$1"; mount -o remount,bind,ro "$ro$1"; shift; done
shift
mount -o remount,bind,ro "$ro"
exec "$@"
"""


@dataclass(frozen=True, slots=True)
class Event:
    """`kind`: "output" (the job's stdout and stderr), "control" (a line the job wrote to fd 9), "retry"
    (a second machine begins, because of what `data` says of the first)."""

    kind: Literal["output", "control", "retry"]
    data: bytes


@dataclass(frozen=True, slots=True)
class Result:
    """How a job ended. `code`: its exit status, None if the machine ended before it; `reason`: why then."""

    code: int | None
    reason: str
    output: bytes
    console: str
    seconds: float  # of the machine's life
    boot_seconds: float  # until the job began; 0 if it never did

    @property
    def text(self) -> str:
        """The output as text, without the white space at its ends."""
        return self.output.decode(errors="replace").strip()

    def explain(self) -> str:
        """For a failed test: everything there is to know."""
        end = f"exit {self.code}" if self.code is not None else self.reason
        return (
            f"bench host: {end} after {self.seconds:.1f} s (boot {self.boot_seconds:.1f} s)\n"
            f"--- output\n{self.text[-8000:]}\n--- console\n{self.console[-4000:]}"
        )


def soft_lockup(console: str) -> bool:
    """Whether the kernel panicked because a CPU was stuck: seen once in 46 boots of a machine inside the
    bench host (emulated SVM), never by anything that we run. Nothing else is ever tried again."""
    stuck = re.search(r"watchdog: BUG: soft lockup - CPU#\d+ stuck for \d+s!", console)
    panic = re.search(r"Kernel panic - not syncing: softlockup: hung tasks", console)
    return bool(stuck and panic and stuck.start() < panic.start())


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of one machine. `limit`: the seconds that the job has; `memory` in MiB; `disk_gib`: a sparse ext4 disk
    at /var/lib/containerd, instead of a tmpfs; `modules` are loaded before the job; `interactive`: a shell on
    this process's terminal instead of the job; `extra`: more arguments for QEMU; `append`: more words for
    the kernel; `shares`: directories that are seen in there besides, by their own names: below /tmp, perhaps,
    or on a file system of their own. `waits` is told for whom this one waits."""

    directory: Path = PROJECT
    limit: float = 300.0
    memory: int = 4096
    cpus: int = 2
    disk_gib: int = 0
    modules: Sequence[str] = MODULES
    interactive: bool = False
    extra: Sequence[str] = ()
    append: str = ""
    shares: Sequence[Path] = ()
    waits: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)


_DEFAULT = Settings()


class BenchHost:
    """One machine for one job, which is given to `bash -c` in `settings.directory`. A context manager;
    `events` yields what the job says until the machine ends, and then `result` is there."""

    def __init__(self, job: str, settings: Settings = _DEFAULT) -> None:
        self.result: Result | None = None
        self._settings = settings
        self._files = prepare()
        columns, rows = shutil.get_terminal_size()
        variables = {
            "MODULES": " ".join(settings.modules),
            "RELEASE": self._files.release,
            "MODULE_TREE": str(self._files.tree),
            "DIRECTORY": str(settings.directory),
            "INTERACTIVE": "1" if settings.interactive else "0",
            "ROWS": str(rows),
            "COLUMNS": str(columns),
            "SHARES": "\n".join(str(path.resolve()) for path in settings.shares),
            "JOB": job,
        }
        self._job = "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items())
        self._stack = contextlib.ExitStack()
        self._directory = Path()
        self._qemu: subprocess.Popen[bytes] | None = None
        self._sockets: dict[str, socket.socket] = {}

    # ---- life --------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, stack: contextlib.ExitStack) -> None:
        take_turn(stack, self._settings.waits)
        for stale in Path("/tmp").glob(f"{_PREFIX}*/"):  # of one that was killed: the lock is ours
            _remove(stale)
        self._directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
        stack.callback(_remove, self._directory)
        (self._directory / "initrd").write_bytes(initramfs(self._files, self._job))
        share = self._start_share(stack)
        argv = [*_DIES_WITH_US, *self._argv(share)]
        passed = [share.fileno()]
        for name in ("console", "output", "control"):
            ours, theirs = socket.socketpair()
            stack.enter_context(ours)
            stack.enter_context(theirs)
            ours.setblocking(False)
            self._sockets[name] = ours
            argv += ["-chardev", f"socket,id={name},fd={theirs.fileno()}"]
            passed.append(theirs.fileno())
        argv += ["-serial", "chardev:console", "-device", "virtio-serial-pci"]
        for name in ("output", "control"):
            argv += ["-device", f"virtserialport,chardev={name},name={name}"]
        if self._settings.interactive:
            argv += ["-chardev", "stdio,id=terminal,signal=off", "-device", "virtconsole,chardev=terminal"]
        errors = stack.enter_context((self._directory / "qemu.log").open("w+b"))
        self._qemu = subprocess.Popen(
            argv,
            stdin=None if self._settings.interactive else subprocess.DEVNULL,
            stdout=None if self._settings.interactive else errors,
            stderr=errors,
            pass_fds=passed,
        )
        stack.callback(_end, self._qemu)

    def _start_share(self, stack: contextlib.ExitStack) -> socket.socket:
        """virtiofsd on a read-only bind mount of /; answers the connection for QEMU."""
        root, path = self._directory / "root", str(self._directory / "share.sock")
        root.mkdir()
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(path)
        listener.listen(1)
        connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        connection.connect(path)  # waits in the backlog
        shares = {str(path.resolve()) for path in self._settings.shares}
        mounts = sorted({_mount_point(PROJECT), *map(_mount_point, map(Path, shares))} - {"/"})
        log = stack.enter_context((self._directory / "share.log").open("w+b"))
        daemon = subprocess.Popen(
            [
                *_DIES_WITH_US, "unshare", "--mount", "--propagation", "private",
                "sh", "-c", _SHARE, "sh", str(root), *mounts, "--",
                find_virtiofsd(), f"--fd={listener.fileno()}", "-o", f"source={root}", "-f",
                "-o", "cache=always", "-o", "sandbox=chroot", "-o", "xattr",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
        )  # fmt: skip
        stack.callback(_end, daemon)
        return connection

    def _argv(self, share: socket.socket) -> list[str]:
        size = f"{self._settings.memory}M"
        argv = ["qemu-system-x86_64", "-accel", "tcg"]
        argv += ["-cpu", "max,+svm,+npt,-la57", "-m", size, "-smp", str(self._settings.cpus)]
        argv += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        argv += ["-object", f"memory-backend-memfd,id=memory,size={size},share=on"]
        argv += ["-M", "q35,memory-backend=memory,kernel-irqchip=split"]
        # An IOMMU, which must come before what it serves, and devices alone in their groups, for VFIO.
        argv += ["-device", "intel-iommu,intremap=on"]
        spare = self._directory / "spare"
        spare.write_bytes(SPARE_DISK.ljust(16 << 20, b"\0"))
        argv += ["-drive", f"file={spare},format=raw,if=none,id=spare,cache=unsafe"]
        argv += ["-netdev", "user,id=net,restrict=on"]
        for number, functions in enumerate(_SPARE_DEVICES, 97):
            argv += ["-device", f"pcie-root-port,id=vfio{number},chassis={number},slot={number}"]
            for function in functions:
                argv += ["-device", f"{function},bus=vfio{number}"]
        argv += ["-kernel", str(self._files.kernel), "-initrd", str(self._directory / "initrd")]
        argv += ["-append", f"{_KERNEL_WORDS} {self._settings.append}".strip()]
        argv += ["-chardev", f"socket,id=share,fd={share.fileno()}"]
        argv += ["-device", "vhost-user-fs-pci,chardev=share,tag=host,queue-size=1024"]
        argv += ["-device", "virtio-rng-pci"]
        if self._settings.disk_gib:
            disk = self._directory / "disk"
            with disk.open("wb") as file:
                file.truncate(self._settings.disk_gib << 30)
            argv += ["-drive", f"file={disk},format=raw,if=none,id=disk,cache=unsafe"]
            argv += ["-device", "virtio-blk-pci,drive=disk"]
        return [*argv, *self._settings.extra]

    # ---- what it says ------------------------------------------------------------------------

    def events(self) -> Iterator[Event]:
        """What the job says, as it says it, until the machine is gone; sets `result`."""
        assert self._qemu is not None
        begin = time.monotonic()
        started = 0.0
        code: int | None = None
        reason = ""
        console, output, line = bytearray(), bytearray(), bytearray()
        with selectors.DefaultSelector() as selector, _pidfd(self._qemu.pid) as ended:
            selector.register(ended, selectors.EVENT_READ, "end")
            for name, sock in self._sockets.items():
                selector.register(sock, selectors.EVENT_READ, name)
            running = True
            while running:
                left = (started + self._settings.limit if started else begin + _BOOT_LIMIT) - time.monotonic()
                if left <= 0:
                    reason = (
                        f"the job did not end within {self._settings.limit:g} s"
                        if started
                        else f"the bench host did not boot within {_BOOT_LIMIT:g} s"
                    )
                    self._qemu.kill()
                    break
                for key, _ in selector.select(left):
                    if key.data == "end":
                        running = False  # after what the sockets still hold
                        continue
                    data = _receive(self._sockets[key.data])
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.data == "console":
                        _append(console, data, _CONSOLE_LIMIT)
                    elif key.data == "output":
                        _append(output, data, _OUTPUT_LIMIT)
                        yield Event("output", data)
                    else:
                        line += data
                        *lines, rest = bytes(line).split(b"\n")
                        line = bytearray(rest)
                        for one in lines:
                            if one == b"ready":
                                started = time.monotonic()
                            elif one.startswith(b"exit "):
                                code = int(one[5:])
                            else:
                                yield Event("control", one)
        self._qemu.wait()
        while data := _receive(self._sockets["output"]):
            output += data
        while data := _receive(self._sockets["console"]):
            console += data
        for log in ("qemu.log", "share.log"):
            console += (self._directory / log).read_bytes()[-4000:]
        if code is None and not reason:
            reason = f"the bench host ended (QEMU: {self._qemu.returncode}) before its job"
        end = time.monotonic()
        self.result = Result(
            code,
            reason,
            bytes(output),
            console.decode(errors="replace").replace("\r", ""),
            end - begin,
            started - begin if started else 0.0,
        )


def events(
    job: str | Callable[[], str], settings: Settings, then: Callable[[Result], None]
) -> Iterator[Event]:
    """A machine's events, and a second one's if a soft lockup ended the first; `then` gets the result.

    A callable job is asked again for the second machine: it may leave out what is done.
    """
    for attempt in (1, 2):
        with BenchHost(job if isinstance(job, str) else job(), settings) as machine:
            yield from machine.events()
            assert machine.result is not None
            result = machine.result
        if attempt == 1 and result.code is None and soft_lockup(result.console):
            yield Event("retry", result.explain().encode())
            continue
        then(result)
        return


def run(job: str, settings: Settings = _DEFAULT) -> Result:
    """The job's end."""
    results: list[Result] = []
    for _ in events(job, settings, results.append):
        pass
    return results[0]


def take_turn(stack: contextlib.ExitStack, waits: Callable[[str], None], path: str = _LOCK) -> None:
    """Return when no other machine runs; who has the turn says so in the file, for those who wait."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    stack.callback(os.close, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = plain(os.pread(lock, 500, 0).decode(errors="replace")).strip() or "a process that does not say"
        waits(f"bench host: waits for another one, of {who}")
        fcntl.flock(lock, fcntl.LOCK_EX)
    words = Path(f"/proc/{os.getpid()}/cmdline").read_bytes().replace(b"\0", b" ")[:400]
    os.ftruncate(lock, 0)
    os.pwrite(lock, b"pid %d since %s: %s" % (os.getpid(), time.strftime("%T").encode(), words), 0)


# ---- small things ----------------------------------------------------------------------------

_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")


def _append(buffer: bytearray, data: bytes, limit: int) -> None:
    buffer += data
    del buffer[:-limit]


def _receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(65536)
    except (BlockingIOError, ConnectionResetError):
        return b""


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    process.wait()


def _remove(directory: Path) -> None:
    """The machine's directory, name by name: / is mounted below it, though in no namespace of ours."""
    for name in ("initrd", "disk", "spare", "share.sock", "share.log", "qemu.log"):
        (directory / name).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        (directory / "root").rmdir()
    directory.rmdir()


def _mount_point(path: Path) -> str:
    """The mount point that the path is on: by the table, since a bind mount looks like its file system."""
    targets = {entry.target for entry in mount_table()}
    places = map(str, (path.resolve(), *path.resolve().parents))
    return next((place for place in places if place in targets), "/")
