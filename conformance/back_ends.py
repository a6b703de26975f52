"""Real vhost-user back ends for tests: a disk by qemu-storage-daemon, a network by passt.

What: `StorageDaemon` serves an image file, `Passt` a network that ends in its own sockets; both as processes
on a unix socket.
Why these: both are small, both are what people run (QEMU's own, and Debian's since trixie), and neither is by
us.
Invariants: `close` ends the process; they listen on the unix socket only, and forward nothing that was not
asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["PASST", "Passt", "StorageDaemon", "listens", "passt_missing", "storage_missing"]

PASST = Path(__file__).resolve().parent.parent / "build/passt/usr"  # in a checkout, by `make setup`
_LIBRARIES = PASST / "lib/x86_64-linux-gnu"
_PATIENCE = 20.0  # seconds; they take milliseconds


def passt_missing() -> str:
    """What to do where it is not there; "" where it is."""
    if (PASST / "bin/passt").exists() or shutil.which("passt"):
        return ""
    return f"passt is not there: run `make setup` in a checkout ({PASST}), or install it (Debian 13: passt)"


def storage_missing() -> str:
    """Likewise of qemu-storage-daemon."""
    found = shutil.which("qemu-storage-daemon")
    return "" if found else "qemu-storage-daemon is not there: install it (Debian: qemu-system-common)"


class _Process:
    def __init__(self, argv: Sequence[str], path: Path) -> None:
        self.path = str(path)
        self.said = path.with_suffix(".log")
        with self.said.open("wb") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until = time.monotonic() + _PATIENCE
        while not listens(self.path):
            if self.process.poll() is not None or time.monotonic() > until:
                self.close()
                raise RuntimeError(f"{argv[0]} does not serve {path}: {self.said.read_text()}")
            time.sleep(0.005)

    def kill(self) -> None:
        """Let it die, and see it dead."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """End it. Idempotent."""
        self.kill()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def listens(path: str) -> bool:
    """Asked without connecting: they take the first connection for the VMM's."""
    with open("/proc/net/unix", encoding="utf-8") as table:
        # Num RefCount Protocol Flags Type St Inode Path; a listening socket has flag 0x10000.
        return any(words[-1] == path and words[3] == "00010000" for words in (line.split() for line in table))


class StorageDaemon(_Process):
    """qemu-storage-daemon: `image` as a vhost-user-blk disk at `path`."""

    def __init__(self, image: Path, path: Path, *, queues: int = 1, writable: bool = True) -> None:
        program = shutil.which("qemu-storage-daemon")
        assert program is not None, "qemu-system-common has it"
        node = {"driver": "file", "node-name": "disk", "filename": str(image), "read-only": not writable}
        argv = [program, "--blockdev", json.dumps(node)]
        export = f"vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={path}"
        argv += ["--export", f"{export},num-queues={queues},writable={'on' if writable else 'off'}"]
        super().__init__(argv, path)


class Passt(_Process):
    """passt: a network with one neighbour, `GATEWAY`, who also is the host that passt runs on."""

    ADDRESS = "10.77.0.2"
    GATEWAY = "10.77.0.1"
    MAC = "9a:55:9a:55:9a:55"  # the neighbour's

    def __init__(self, path: Path) -> None:
        argv = [str(_LIBRARIES / "ld-linux-x86-64.so.2"), "--library-path", str(_LIBRARIES)]
        argv += [str(PASST / "bin/passt")]
        if not (PASST / "bin/passt").exists():
            argv = ["passt"]
        argv += ["--vhost-user", "--socket", str(path), "--foreground"]
        argv += ["--runas", "0", "--ipv4-only", "--tcp-ports", "none", "--udp-ports", "none"]
        argv += ["--address", self.ADDRESS, "--netmask", "24", "--gateway", self.GATEWAY]
        argv += ["--mac-addr", self.MAC]
        super().__init__(argv, path)

    def close(self) -> None:
        """End it. Idempotent."""
        super().close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{self.path}.repair")
