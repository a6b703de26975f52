"""virtiofsd: the daemon that serves a host directory to the guest by virtio-fs.

What: `Virtiofsd.start` finds it (QEMU's C version of Debian 12, the Rust version of later releases),
starts it sandboxed on a socket that listens already, and connects for the VMM.
Why: containers' root file systems and volumes reach the guest through it.
Invariants:
- Its seccomp filter and its sandbox are always on.
- `sandbox=chroot`, not `namespace`: containers' mounts appear below the shared directory after
  virtiofsd has started, and it must see them. It stays in the shim's (private) mount namespace, so it
  does; with a namespace of its own a later mount was an empty directory in the guest, unless the
  shim's mounts are shared (tried with QEMU 7.2's: private and slave no, shared yes).
- It has no CAP_MKNOD unless its directory's config says so: a device node that a guest makes in a volume is
  the host's. FIFOs, sockets and the whiteouts of an overlay need no capability (Linux 5.8).
- announce_submounts is on: each mount below the directory is a file system of its own in the guest,
  so equal inode numbers of two overlays do not collide.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
from collections.abc import Callable
from enum import Enum

from devices.child import Child
from devices.config import CacheMode, ShareFsConfig
from devices.errors import BugError, HostError
from devices.rendezvous import connect_now, listen
from devices.undo import UndoLog

__all__ = ["Flavour", "Virtiofsd", "carries_groups", "find_virtiofsd", "is_noise", "virtiofsd_arguments"]

_C_PATH = "/usr/lib/qemu/virtiofsd"  # Debian 12 and Ubuntu 22.04: part of QEMU, always the C version
_PLACES = ("/usr/libexec/virtiofsd", _C_PATH, "/usr/lib/virtiofsd", "/opt/kata/libexec/virtiofsd")
# What the C version says whenever its VMM goes: no evidence of anything.
_NOISE = ("virtio_loop: Unexpected poll revents", "fv_remove_watch: TODO!")
_NO_MKNOD = "-mknod"
_MODCAPS = re.compile(r"(?:^|,|^-o|^--)modcaps=")
_PROBE_TIMEOUT = 5.0  # seconds for `virtiofsd --version`


class Flavour(Enum):
    """Two programs of one name with different options."""

    C = "C"
    RUST = "Rust"


def find_virtiofsd(configured: str = "") -> str:
    """Its absolute path. Raises HostError."""
    for path in (configured,) if configured else _PLACES:
        if os.access(path, os.X_OK):
            return path
    looked = configured or ", ".join(_PLACES)
    raise HostError(
        f"virtiofsd is not there (looked at {looked})",
        phase="devices",
        hint="install virtiofsd (Debian 12: qemu-system-common), or set virtio_fs_daemon",
    )


def carries_groups(configured: str = "") -> bool:
    """Whether what a guest makes gets a supplemental group of its maker, where the guest's kernel asks (Linux
    6.3): the C version knows one user and one group."""
    try:
        return os.path.realpath(find_virtiofsd(configured)) != _C_PATH
    except HostError:
        return True


async def flavour_of(path: str, undo: UndoLog) -> Flavour:
    """Which of the two it is, asking only where the path does not tell. Raises HostError."""
    if os.path.realpath(path) == _C_PATH:
        return Flavour.C
    child = await Child.spawn([path, "--version"], name="virtiofsd", undo=undo)
    try:
        await child.wait(_PROBE_TIMEOUT)
    except TimeoutError:
        raise HostError(
            f"{path} --version did not end within {_PROBE_TIMEOUT:g} s", phase="devices"
        ) from None
    finally:
        await child.kill()
    # The C version adds a line "using FUSE kernel interface version ...".
    return Flavour.C if "FUSE kernel interface" in child.stderr_tail() else Flavour.RUST


def virtiofsd_arguments(config: ShareFsConfig, flavour: Flavour, fd: int) -> list[str]:
    """Its arguments (without the program) for the listening socket `fd`; pure."""
    if "," in config.source or "\\" in config.source:
        raise BugError(f"the shared directory {config.source!r} has a character that virtiofsd cannot take")
    argv = [f"--fd={fd}"]
    if flavour is Flavour.C:
        cache = "none" if config.cache is CacheMode.NEVER else config.cache.value
        argv += ["-f", "-o", f"source={config.source}", "-o", f"cache={cache}", "-o", "sandbox=chroot"]
        argv += [
            "-o",
            "log_level=warn",
            "-o",
            "announce_submounts",
            "-o",
            "xattr" if config.xattr else "no_xattr",
        ]
    else:
        argv += [f"--shared-dir={config.source}", f"--cache={config.cache.value}", "--sandbox=chroot"]
        argv += ["--seccomp=kill", "--announce-submounts"]
        argv += ["--xattr"] if config.xattr else []
    return argv + _extra_arguments(config, flavour)


def _extra_arguments(config: ShareFsConfig, flavour: Flavour) -> list[str]:
    """The administrator's, and what is taken from the capabilities: he may give it back, but only by name.

    Of several `modcaps` both programs take the last: ours goes into his.
    """
    extra = list(config.extra_args)
    if config.mknod:
        return extra
    found = False
    for index, word in enumerate(extra):
        if index and extra[index - 1] == "--modcaps":
            extra[index], found = f"{_NO_MKNOD}:{word}", True
        elif _MODCAPS.search(word):
            extra[index], found = _MODCAPS.sub(rf"\g<0>{_NO_MKNOD}:", word), True
    if found:
        return extra
    own = ["-o", f"modcaps={_NO_MKNOD}"] if flavour is Flavour.C else [f"--modcaps={_NO_MKNOD}"]
    return own + extra


def is_noise(line: str) -> bool:
    """Whether virtiofsd says this at every orderly end."""
    return any(words in line for words in _NOISE)


class Virtiofsd:
    """One running virtiofsd and its connection for the VMM."""

    def __init__(self, child: Child, connection: socket.socket) -> None:
        self.child = child
        self.connection = connection

    @classmethod
    async def start(
        cls,
        config: ShareFsConfig,
        state_dir: str,
        undo: UndoLog,
        on_output: Callable[[bytes], None] | None = None,
    ) -> Virtiofsd:
        """Start it on `<state_dir>/<id>.sock`; it need not be waited for. Raises HostError."""
        program = find_virtiofsd(config.daemon)
        if not os.path.isdir(config.source):
            raise BugError(f"the directory to share, {config.source}, does not exist")
        flavour = await flavour_of(program, undo)
        path = f"{state_dir}/{config.id}.sock"
        listener = listen(path)
        try:
            # In the listener's backlog before the daemon exists: nothing has to be waited for, and
            # when the daemon dies unaccepted the VMM sees the end of the connection.
            connection = connect_now(path)
            try:
                child = await Child.spawn(
                    [program, *virtiofsd_arguments(config, flavour, listener.fileno())],
                    name="virtiofsd",
                    undo=undo,
                    pass_fds=[listener.fileno()],
                    on_output=on_output,
                )
            except BaseException:
                connection.close()
                raise
        finally:
            listener.close()
            with contextlib.suppress(OSError):
                os.unlink(path)
        return cls(child, connection)

    @property
    def lost(self) -> asyncio.Future[int]:
        """Done when it has ended, for whatever reason."""
        return self.child.exited

    def describe_loss(self) -> str:
        """One sentence, once it has ended."""
        return f"virtiofsd {self.child.describe()}"

    def evidence(self) -> dict[str, str]:
        """What it said last."""
        return {"virtiofsd stderr": self.stderr_tail()}

    @property
    def pids(self) -> list[int]:
        """Its process, while it lives."""
        return [self.child.pid] if self.child.alive else []

    def handed_over(self) -> None:
        """The VMM has the connection; virtiofsd is to see its end with the VMM's."""
        self.connection.close()

    def abort(self) -> None:
        """End whatever the VMM waits for from it."""
        self.child.send_signal(signal.SIGKILL)

    def stderr_tail(self, lines: int = 10) -> str:
        """Its last lines, without what it says at every end."""
        said = [line for line in self.child.output.lines() if not is_noise(line)]
        return "\n".join(said[-lines:])

    async def stop(self) -> None:
        """Kill it. Idempotent."""
        self.connection.close()
        await self.child.kill()
