"""vhost-device-vsock: hybrid vsock for QEMU on hosts without /dev/vhost-vsock.

What: `VsockDaemon.start` runs it for one VM; `connection` is the socket that the VMM's chardev gets.
Why: many hosts (nested, containers, kernels without vhost) have no vhost-vsock; this needs only user
space and shared guest memory.
Invariants: one daemon per VM. It takes exactly one vhost-user connection: ours, inherited by the VMM. It sees
a directory with its sockets and nothing else of the host; that is a file system in memory of its own, with
room for them and no more, since a guest that has taken it over could fill it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Callable

from devices import mounts, seccomp
from devices.child import Child
from devices.config import VsockConfig
from devices.confine import Bind, Confinement, View
from devices.errors import HostError
from devices.rendezvous import connect_when_listening
from devices.syscalls import mount
from devices.threads import acquire
from devices.undo import Entry, UndoLog

__all__ = ["VsockDaemon", "find_vsock_daemon"]

_CID = 3  # private to this VM: the daemon serves no other
# Bytes that the guest may have on the way, and so the most that a packet of its holds. Linux 6.12.y and later
# lay larger ones than 32 KiB into several descriptors; 0.3.0 reads the first, and output stops for ever.
_PACKET = 28672
# Our agent sends no larger packets by itself (agent/vsock.py). With several on the way it need not wait for
# the daemon's word after each.
_PACKETS_OF_OURS = 4
_READY_TIMEOUT = 10.0  # seconds; it takes about 7 ms
_ROOM = "size=4k,nr_inodes=8,mode=0700"  # of its directory: three sockets
_FILES = 16384  # a connection for each stream of each process in the guest, and its buffers' ends


def find_vsock_daemon(configured: str = "") -> str:
    """Its absolute path. Raises HostError."""
    path = configured or shutil.which("vhost-device-vsock") or ""
    if path and os.access(path, os.X_OK):
        return path
    raise HostError(
        f"there is no /dev/vhost-vsock, and vhost-device-vsock is not executable at {path}"
        if path
        else "there is neither /dev/vhost-vsock nor vhost-device-vsock on PATH",
        phase="devices",
        hint="modprobe vhost_vsock, or install vhost-device-vsock (config key vsock_daemon)",
    )


class VsockDaemon:
    """One running vhost-device-vsock. `path`: the unix socket that `HybridVsock` dials."""

    def __init__(self, child: Child, home: _Home) -> None:
        self.child = child
        self.path = home.path("kata.hvsock")
        self._home = home

    @classmethod
    def adopt(cls, child: Child, path: str, undo: UndoLog) -> VsockDaemon:
        """One that runs already, and has its VMM; its directory stands in the undo log."""
        return cls(child, _Home(os.path.dirname(path), 0, undo))

    @classmethod
    async def start(
        cls,
        config: VsockConfig,
        state_dir: str,
        undo: UndoLog,
        on_output: Callable[[bytes], None] | None = None,
        *,
        user: int = 0,
    ) -> VsockDaemon:
        """Start it as this user; `connect` waits until it is ready. Raises HostError."""
        program = find_vsock_daemon(config.daemon)
        home = _Home(f"{state_dir}/v", user, undo)
        await acquire(home.make)
        try:
            child = await Child.spawn(
                _arguments(program, home.path("vhost"), home.path("kata.hvsock"), ours=config.home_call),
                name="vhost-device-vsock",
                undo=undo,
                confinement=_confinement(user, home.directory),
                on_output=on_output,
            )
        except BaseException:
            await acquire(home.remove)
            raise
        return cls(child, home)

    async def connect(self) -> socket.socket:
        """The vhost-user connection for the VMM. Raises HostError."""
        return await connect_when_listening(self._home.path("vhost"), self.child, _READY_TIMEOUT)

    async def stop(self) -> None:
        """Kill it and remove its sockets. Idempotent."""
        await self.child.kill()
        await acquire(self._home.remove)


def _arguments(program: str, vhost: str, uds: str, *, ours: bool) -> list[str]:
    """`ours`: the guest's agent is."""
    on_the_way = _PACKET * (_PACKETS_OF_OURS if ours else 1)
    return [
        *(program, "--guest-cid", str(_CID), "--socket", vhost),
        *("--uds-path", uds, "--tx-buffer-size", str(on_the_way)),
    ]


def _confinement(user: int, directory: str) -> Confinement:
    return Confinement(
        user=user,
        view=View(binds=(Bind(path=directory, writable=True),)),
        files=_FILES,
        writes=0,
        filter=seccomp.vsock_daemon(),
    )


class _Home:
    """The directory of its sockets. The methods block for less than a millisecond."""

    def __init__(self, directory: str, user: int, undo: UndoLog) -> None:
        self.directory = directory
        self._user = user
        self._undo = undo
        self._mount: Entry | None = None

    def path(self, name: str) -> str:
        """Of a socket."""
        return f"{self.directory}/{name}"

    def make(self) -> None:
        """Raises HostError; then nothing of it is left."""
        self._mount = self._undo.record("mount", path=self.directory)
        try:
            os.mkdir(self.directory, 0o700)
            options = f"{_ROOM},uid={self._user},gid={self._user}"
            mount("tmpfs", self.directory, "tmpfs", mounts.MS_NOSUID | mounts.MS_NODEV, options)
        except OSError as error:
            self.remove()
            raise HostError(
                f"cannot make {self.directory} for vhost-device-vsock: {error.strerror}", phase="devices"
            ) from error

    def remove(self) -> None:
        """Idempotent."""
        mounts.unmount(self.directory)
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(self.directory)
        if self._mount is not None:
            self._undo.forget(self._mount)
            self._mount = None
