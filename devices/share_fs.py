"""virtiofsd: the daemon that serves a host directory to the guest by virtio-fs.

What: `Virtiofsd.start` finds it (QEMU's C version of Debian 12, the Rust version of later releases),
starts it sandboxed on a socket that listens already, and connects for the VMM.
Why: containers' root file systems and volumes reach the guest through it.
Invariants:
- Its seccomp filter and its sandbox are always on.
- `sandbox=chroot`, not `namespace`: its namespaces are ours, made before it runs. In its view there is the
  shared directory, and what the shim mounts below that later: the directory's propagation is shared
  (`shim.resources.shared_dir`), and the view's a slave of it.
- It is root, since files get the owners that the guest's users have, with the capabilities for that.
- It has no CAP_MKNOD unless its directory's config says so: a device node that a guest makes in a volume is
  the host's. FIFOs, sockets and the whiteouts of an overlay need no capability (Linux 5.8).
- announce_submounts is on: each mount below the directory is a file system of its own in the guest,
  so equal inode numbers of two overlays do not collide.
- Inodes are descriptors, not file handles (1.14's default is to prefer handles): handles need the right to
  open any file of the host by number, and file systems that export them, which overlays do not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
from collections.abc import Callable, Sequence
from enum import Enum

from devices.child import Child
from devices.config import CacheMode, ShareFsConfig
from devices.confine import CAPABILITIES, Bind, Confinement, View
from devices.errors import BugError, HostError
from devices.rendezvous import connect_now, listen
from devices.undo import UndoLog
from devices.versions import version_of

__all__ = [
    "Flavour",
    "Virtiofsd",
    "carries_groups",
    "find_virtiofsd",
    "is_noise",
    "virtiofsd_arguments",
    "virtiofsd_confinement",
]

_C_PATH = "/usr/lib/qemu/virtiofsd"  # Debian 12 and Ubuntu 22.04: part of QEMU, always the C version
_PLACES = ("/usr/libexec/virtiofsd", _C_PATH, "/usr/lib/virtiofsd", "/opt/kata/libexec/virtiofsd")
# What the C version says whenever its VMM goes: no evidence of anything.
_NOISE = ("virtio_loop: Unexpected poll revents", "fv_remove_watch: TODO!")
_NO_MKNOD = "-mknod"
_MODCAPS = re.compile(r"(?:^|,|^-o|^--)modcaps=")
_GIVEN = re.compile(r"\+([a-z_]+)")  # in its value
# To act as the guest's users do, and to confine itself further: chroot, and capabilities away.
_CAPABILITIES = (
    *("chown", "dac_override", "fowner", "fsetid", "setgid", "setuid", "setfcap"),
    *("sys_chroot", "setpcap"),
)
_FILES = 1 << 20  # what a guest has open is open here
_HANDLES = (1, 13)  # from here on it is known to have the option; older ones use descriptors anyway


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


async def flavour_of(path: str, undo: UndoLog) -> tuple[Flavour, tuple[int, ...]]:
    """Which of the two it is, and which version, asking only where the path does not tell (the C version's
    makes no difference). Raises HostError."""
    if os.path.realpath(path) == _C_PATH:
        return Flavour.C, ()
    version = await version_of(path, undo)
    if not version.numbers:
        raise HostError(
            f"{path} --version says no version: {version.text.strip() or 'nothing'!r:.100}", phase="devices"
        )
    # The C version adds a line "using FUSE kernel interface version ...".
    return (Flavour.C if "FUSE kernel interface" in version.text else Flavour.RUST), version.numbers


def virtiofsd_arguments(
    config: ShareFsConfig, flavour: Flavour, fd: int, version: tuple[int, ...] = ()
) -> list[str]:
    """Its arguments (without the program) for the listening socket `fd`; pure. `version` is Rust's."""
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
        argv += ["--seccomp=kill", "--announce-submounts", "--log-level=warn"]
        argv += ["--inode-file-handles=never"] if version >= _HANDLES else []
        argv += ["--xattr"] if config.xattr else []
    return argv + _extra_arguments(config, flavour)


def _extra_arguments(config: ShareFsConfig, flavour: Flavour) -> list[str]:
    """The administrator's, and what is taken from the capabilities: he may give it back, but only by name.

    Of several `modcaps` both programs take the last: ours goes into his.
    """
    extra = list(config.extra_args)
    if config.mknod:
        return extra
    his = _modcaps(extra)
    for index in his:
        word = extra[index]
        ours = _MODCAPS.sub(rf"\g<0>{_NO_MKNOD}:", word)
        extra[index] = ours if ours != word else f"{_NO_MKNOD}:{word}"
    if his:
        return extra
    own = ["-o", f"modcaps={_NO_MKNOD}"] if flavour is Flavour.C else [f"--modcaps={_NO_MKNOD}"]
    return own + extra


def _modcaps(arguments: Sequence[str]) -> list[int]:
    """Which of the arguments say what capabilities it is to keep."""
    return [
        index
        for index, word in enumerate(arguments)
        if _MODCAPS.search(word) or (index and arguments[index - 1] == "--modcaps")
    ]


def virtiofsd_confinement(config: ShareFsConfig) -> Confinement:
    """What it may: to a capability that the administrator adds by name it is let, and to no other."""
    words = [config.extra_args[index].lower() for index in _modcaps(config.extra_args)]
    more = {name for word in words for name in _GIVEN.findall(word) if name in CAPABILITIES}
    more |= {"mknod"} if config.mknod else set()
    return Confinement(
        capabilities=(*_CAPABILITIES, *sorted(more - set(_CAPABILITIES))),
        view=View(binds=(Bind(path=config.source, follows=True), Bind(path="/sys/devices/system"))),
        files=_FILES,
    )


def is_noise(line: str) -> bool:
    """Whether virtiofsd says this at every orderly end."""
    return any(words in line for words in _NOISE)


class Virtiofsd:
    """One running virtiofsd, and for its VMM a connection, or the `path` at which it listens."""

    def __init__(self, child: Child, connection: socket.socket | None = None, path: str = "") -> None:
        self.child = child
        self.path = path
        self._connection = connection

    @classmethod
    def adopt(cls, child: Child) -> Virtiofsd:
        """One that runs already, and has its VMM."""
        return cls(child)

    @property
    def connection(self) -> socket.socket:
        """For the VMM, of one that was not started `at_path`."""
        assert self._connection is not None
        return self._connection

    @classmethod
    async def start(
        cls,
        config: ShareFsConfig,
        state_dir: str,
        undo: UndoLog,
        on_output: Callable[[bytes], None] | None = None,
        *,
        at_path: bool = False,
    ) -> Virtiofsd:
        """Start it on `<state_dir>/<id>.sock`; it need not be waited for. Raises HostError.

        `at_path`: for a VMM that connects by itself, once: the socket stays there until `stop`.
        """
        program = find_virtiofsd(config.daemon)
        if not os.path.isdir(config.source):
            raise BugError(f"the directory to share, {config.source}, does not exist")
        flavour, version = await flavour_of(program, undo)
        path = f"{state_dir}/{config.id}.sock"
        listener = listen(path)
        try:
            # In the listener's backlog before the daemon exists: nothing has to be waited for, and
            # when the daemon dies unaccepted the VMM sees the end of the connection.
            connection = None if at_path else connect_now(path)
            try:
                child = await Child.spawn(
                    [program, *virtiofsd_arguments(config, flavour, listener.fileno(), version)],
                    name="virtiofsd",
                    undo=undo,
                    confinement=virtiofsd_confinement(config),
                    pass_fds=[listener.fileno()],
                    on_output=on_output,
                )
            except BaseException:
                if connection is not None:
                    connection.close()
                _unlink(path)
                raise
        finally:
            listener.close()
            if not at_path:
                _unlink(path)
        return cls(child, connection, path if at_path else "")

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
    def inside(self) -> bool:
        """Whether it is a part of this process."""
        return False

    @property
    def pids(self) -> list[int]:
        """Its process, while it lives."""
        return [self.child.pid] if self.child.alive else []

    def handed_over(self) -> None:
        """The VMM has the connection; virtiofsd is to see its end with the VMM's."""
        if self._connection is not None:
            self._connection.close()

    def abort(self) -> None:
        """End whatever the VMM waits for from it."""
        self.child.send_signal(signal.SIGKILL)

    def stderr_tail(self, lines: int = 10) -> str:
        """Its last lines, without what it says at every end."""
        said = [line for line in self.child.output.lines() if not is_noise(line)]
        return "\n".join(said[-lines:])

    async def stop(self) -> None:
        """Kill it. Idempotent."""
        self.handed_over()
        if self.path:
            _unlink(self.path)
        await self.child.kill()


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
