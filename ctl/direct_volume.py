"""`kata-ctl direct-volume`: assign disks to volumes, and ask the sandbox that has one.

What: `add` and `remove` write and remove what a storage driver would (`shim.resources.direct_volumes`);
`stats` and `resize` ask the shim, by the socket of the sandbox whose name (id or key) lies with the volume.
Invariants: nothing of a volume itself is touched here; what would not work for a container is not written.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
from dataclasses import dataclass
from urllib.parse import quote

from ctl.which import ANY, Which, name_of, only
from devices.errors import CallerError, HostError
from shim.resources.direct_volumes import DIRECTORY, MOUNT_INFO, find, volume_directory
from shim.sandbox.management import SOCKET
from shim.spec.guest_spec import Volume
from shim.state.identity import KATA_RUN, RUN_DIR, is_key
from shim.state.journalfile import read_identity

__all__ = ["add", "remove", "resize", "stats"]

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


def stats(
    path: str, wanted: Which = ANY, directory: str = DIRECTORY, run: str = RUN_DIR, kata: str = KATA_RUN
) -> int:
    """Print how full it is: JSON, as the agent answers. `wanted`: the sandbox to ask, if several have it."""
    target = f"/direct-volume/stats?path={quote(path, safe='')}"
    print(_ask(_sandbox(path, wanted, directory, run, kata), "POST", target, None), end="")
    return 0


def resize(
    path: str,
    size: int,
    wanted: Which = ANY,
    directory: str = DIRECTORY,
    run: str = RUN_DIR,
    kata: str = KATA_RUN,
) -> int:
    """Have it grow to `size` bytes: image, disk and file system. `wanted`: as for `stats`."""
    body = json.dumps({"VolumePath": path, "Size": size})
    _ask(_sandbox(path, wanted, directory, run, kata), "POST", "/direct-volume/resize", body)
    return 0


@dataclass(frozen=True, slots=True)
class _User:
    """A sandbox that has the volume, by its state directory."""

    id: str
    namespace: str
    containerd: str
    directory: str


def _check_path(path: str) -> None:
    if not path.startswith("/") or len(path) > 180:
        raise CallerError(f"{path[:200]!r} is no absolute path of a volume", phase=_PHASE)


def _sandbox(path: str, wanted: Which, directory: str, run: str, kata: str) -> str:
    """The state directory of the sandbox that has the volume. Raises CallerError if several have."""
    where = volume_directory(path, directory)
    try:
        names = sorted(name for name in os.listdir(where) if name != MOUNT_INFO and _ID.fullmatch(name))
    except FileNotFoundError:
        raise CallerError(f"{path} is not assigned ({where} does not exist)", phase=_PHASE) from None
    users = [_user(name, run, kata) for name in names]
    live = [user for user in users if os.path.exists(user.directory)] or users
    try:
        return only(wanted, live, _PHASE, f"several sandboxes have {path}").directory
    except LookupError:
        others = ", ".join(name_of(user, live) for user in live)
        told = f"; {others} have it" if others else ""
        which = f" that is {wanted.id or wanted.namespace or wanted.containerd}" if wanted != ANY else ""
        raise CallerError(f"no sandbox{which} uses {path}{told}", phase=_PHASE) from None


def _user(name: str, run: str, kata: str) -> _User:
    """The sandbox that left this name with its volume: a key, or an id that is a link's."""
    directory = os.path.join(run if is_key(name) and os.path.isdir(f"{run}/{name}") else kata, name)
    _, owner = read_identity(directory)
    if owner is None:
        return _User(name, "", "", directory)
    return _User(owner.sandbox_id, owner.namespace, owner.address, directory)


def _ask(state_dir: str, method: str, target: str, body: str | None) -> str:
    name = os.path.join(state_dir, SOCKET)
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
