"""The guest that is asked: an image with the probe in it, and the connection to the probe.

What: `probed` makes a copy of the guest's image in which `conformance.probe` can be the first program (the
kernel's parameter `INIT`); `Asked` puts questions to it.
Why a copy of the image and not a disk, a share or a container: it needs nothing of a VMM but what it boots
from, and no answer of its driver's.
Invariants: the image of the configuration is never written; the copies go with this process.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from devices.vsock import AGENT_PORT, AgentChannel

__all__ = ["INIT", "Asked", "GuestSaysError", "probed"]

_FOLDER, _NAME = "/usr/bin", "kata-probe"
INIT = f"init={_FOLDER}/{_NAME}"
_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
_LONGEST = 1 << 20  # bytes of an answer


class GuestSaysError(Exception):
    """The guest could not do it; the text is its error."""


@functools.cache
def probed(image: str) -> str:
    """A copy of this image of `make guest`, with the probe. Raises RuntimeError, with what is missing."""
    debugfs = shutil.which("debugfs", path=_PATH)
    if debugfs is None:
        raise RuntimeError("the suite needs debugfs (Debian: e2fsprogs) to put its probe into the guest")
    folder = Path(tempfile.mkdtemp(prefix="kata-conformance-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    folder.chmod(0o755)  # a VMM may run as another user
    copy, program = folder / "probed.img", folder / "probe"
    subprocess.run(["cp", "--sparse=always", image, copy], check=True, timeout=60)
    copy.chmod(0o644)
    init = _debugfs(debugfs, copy, "cat /sbin/init").splitlines()
    if not init or not init[0].startswith("#!/"):
        raise RuntimeError(f"{image} is no image of `make guest`: its /sbin/init is no program of Python's")
    source = Path(__file__).with_name("probe.py").read_text(encoding="utf-8")
    program.write_text(f"{init[0]}\n{source}", encoding="utf-8")
    commands = f"cd {_FOLDER}\nwrite {program} {_NAME}\nset_inode_field {_NAME} mode 0100755\n"
    _debugfs(debugfs, copy, "-", commands)
    if _debugfs(debugfs, copy, f"cat {_FOLDER}/{_NAME}") != program.read_text(encoding="utf-8"):
        raise RuntimeError(f"debugfs did not put the probe into a copy of {image}")
    return str(copy)


def _debugfs(program: str, image: Path, request: str, commands: str = "") -> str:
    way = ["-w", "-f", request] if commands else ["-R", request]
    done = subprocess.run(
        [program, *way, image], input=commands, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


class Asked:
    """A connection to the probe. Made by `to`; questions one at a time."""

    def __init__(self, sock: socket.socket, patience: float) -> None:
        self._sock = sock
        self._patience = patience
        self._rest = bytearray()
        self._asked = 0

    @classmethod
    async def to(cls, channel: AgentChannel, patience: float) -> Asked:
        """`patience`: seconds for each answer."""
        sock, _ = await channel.connect(AGENT_PORT, patience)
        return cls(sock, patience)

    async def __call__(self, question: str, /, **given: Any) -> Any:
        """The guest's answer. Raises GuestSaysError; TimeoutError, OSError if none comes."""
        number = await self.put(question, **given)
        async with asyncio.timeout(self._patience):
            while (said := json.loads(await self._line()))["of"] != number:
                pass  # the answer of a question whose asker has lost patience
        if "error" in said:
            raise GuestSaysError(said["error"])
        return said["answer"]

    async def put(self, question: str, /, **given: Any) -> int:
        """Send a question whose answer nobody waits for; its number."""
        self._asked += 1
        line = json.dumps({"number": self._asked, "ask": question, "with": given}).encode() + b"\n"
        await asyncio.get_running_loop().sock_sendall(self._sock, line)
        return self._asked

    async def _line(self) -> bytes:
        while b"\n" not in self._rest:
            data = await asyncio.get_running_loop().sock_recv(self._sock, 65536)
            if not data or len(self._rest) > _LONGEST:
                raise ConnectionResetError("the guest's probe is gone")
            self._rest += data
        line, _, rest = bytes(self._rest).partition(b"\n")
        self._rest[:] = rest
        return line

    def close(self) -> None:
        """Idempotent."""
        self._sock.close()
