"""`kata-ctl direct-volume`: assign disks to volumes, and ask the sandbox that has one.

What: `add` and `remove` write and remove what a storage driver would (`shim.resources.direct_volumes`);
`stats` and `resize` ask the shim, by the socket of the sandbox whose id lies with the volume.
Invariants: nothing of a volume itself is touched here; what would not work for a container is not written.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
from urllib.parse import quote

from devices.errors import CallerError, HostError
from shim.resources.direct_volumes import DIRECTORY, MOUNT_INFO, find, volume_directory
from shim.sandbox.management import SOCKET
from shim.spec.guest_spec import Volume

__all__ = ["add", "remove", "resize", "stats"]

STATE_DIR = "/run/kata"
_DEADLINE = 60.0  # seconds; a large file system takes long to grow
_PHASE = "direct-volume"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


def add(path: str, mount_info: str, directory: str = DIRECTORY) -> int:
    """Assign: `mount_info` is the text of mountInfo.json. Raises CallerError for what cannot be used."""
    _check_path(path)
    try:
        json.loads(mount_info)
    except ValueError as error:
        raise CallerError(f"the mount info is not JSON: {error}", phase=_PHASE) from None
    where = volume_directory(path, directory)
    os.makedirs(where, 0o700, exist_ok=True)
    partial = f"{where}/.{MOUNT_INFO}"
    old = f"{where}/{MOUNT_INFO}"
    if os.path.exists(old):
        raise CallerError(f"{path} is assigned already ({old})", phase=_PHASE, hint="remove it first")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(mount_info)
    os.rename(partial, old)
    try:
        find([Volume(0, path, "/", False, False, "")], directory)
    except BaseException:
        shutil.rmtree(where)
        raise
    return 0


def remove(path: str, directory: str = DIRECTORY) -> int:
    """Take the assignment back; containers that have the disk keep it."""
    where = volume_directory(path, directory)
    try:
        shutil.rmtree(where)
    except FileNotFoundError:
        raise CallerError(f"{path} is not assigned ({where} does not exist)", phase=_PHASE) from None
    return 0


def stats(path: str, directory: str = DIRECTORY, state_dir: str = STATE_DIR) -> int:
    """Print how full it is: JSON, as the agent answers."""
    target = f"/direct-volume/stats?path={quote(path, safe='')}"
    print(_ask(path, "POST", target, None, directory, state_dir), end="")
    return 0


def resize(path: str, size: int, directory: str = DIRECTORY, state_dir: str = STATE_DIR) -> int:
    """Have it grow to `size` bytes: image, disk and file system."""
    body = json.dumps({"VolumePath": path, "Size": size})
    _ask(path, "POST", "/direct-volume/resize", body, directory, state_dir)
    return 0


def _check_path(path: str) -> None:
    if not path.startswith("/") or len(path) > 180:
        raise CallerError(f"{path[:200]!r} is no absolute path of a volume", phase=_PHASE)


def _sandbox(path: str, directory: str) -> str:
    """The sandbox that has the volume."""
    where = volume_directory(path, directory)
    try:
        names = sorted(name for name in os.listdir(where) if name != MOUNT_INFO and _ID.fullmatch(name))
    except FileNotFoundError:
        raise CallerError(f"{path} is not assigned ({where} does not exist)", phase=_PHASE) from None
    if not names:
        raise CallerError(f"no sandbox uses {path}", phase=_PHASE)
    return names[0]


def _ask(path: str, method: str, target: str, body: str | None, directory: str, state_dir: str) -> str:
    name = os.path.join(state_dir, _sandbox(path, directory), SOCKET)
    connection = _Connection(name)
    try:
        headers = {"Content-Type": "application/json"} if body else {}
        connection.request(method, target, body, headers)
        response = connection.getresponse()
        text = response.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise HostError(
            f"no answer from the shim at {name}: {error!r}", phase=_PHASE, hint="is its sandbox still there?"
        ) from error
    finally:
        connection.close()
    if response.status != 200:
        raise CallerError(f"the shim answers {response.status}: {text.strip()}", phase=_PHASE)
    return text


class _Connection(http.client.HTTPConnection):
    """To a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_DEADLINE)
        self._path = path

    def connect(self) -> None:
        """See `HTTPConnection.connect`."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_DEADLINE)
        self.sock.connect(self._path)
