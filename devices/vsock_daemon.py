"""vhost-device-vsock: hybrid vsock for QEMU on hosts without /dev/vhost-vsock.

What: `VsockDaemon.start` runs it for one VM; `connection` is the socket that the VMM's chardev gets.
Why: many hosts (nested, containers, kernels without vhost) have no vhost-vsock; this needs only user
space and shared guest memory.
Invariants: one daemon per VM, all its sockets in the sandbox's 0700 directory. It takes exactly one
vhost-user connection: ours, inherited by the VMM.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Callable

from devices.child import Child
from devices.config import VsockConfig
from devices.errors import HostError
from devices.rendezvous import connect_when_listening
from devices.undo import UndoLog

__all__ = ["VsockDaemon", "find_vsock_daemon"]

_CID = 3  # private to this VM: the daemon serves no other
# Bytes that the guest may have on the way, and so the most that a packet of its holds. Linux 6.12.y and later
# lay larger ones than 32 KiB into several descriptors; 0.3.0 reads the first, and output stops for ever.
_TX_BUFFER = 28672
_READY_TIMEOUT = 10.0  # seconds; it takes about 7 ms


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

    def __init__(self, child: Child, vhost_path: str, path: str) -> None:
        self.child = child
        self.path = path
        self._vhost_path = vhost_path

    @classmethod
    async def start(
        cls,
        config: VsockConfig,
        state_dir: str,
        undo: UndoLog,
        on_output: Callable[[bytes], None] | None = None,
    ) -> VsockDaemon:
        """Start it; `connect` waits until it is ready. Raises HostError."""
        vhost_path, path = f"{state_dir}/vsock.sock", f"{state_dir}/kata.hvsock"
        argv = [find_vsock_daemon(config.daemon)]
        argv += ["--guest-cid", str(_CID), "--socket", vhost_path, "--uds-path", path]
        argv += ["--tx-buffer-size", str(_TX_BUFFER)]
        child = await Child.spawn(argv, name="vhost-device-vsock", undo=undo, on_output=on_output)
        return cls(child, vhost_path, path)

    async def connect(self) -> socket.socket:
        """The vhost-user connection for the VMM. Raises HostError."""
        return await connect_when_listening(self._vhost_path, self.child, _READY_TIMEOUT)

    async def stop(self) -> None:
        """Kill it and remove its sockets. Idempotent."""
        await self.child.kill()
        for path in (self._vhost_path, self.path):
            with contextlib.suppress(OSError):
                os.unlink(path)
