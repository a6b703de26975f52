"""The peer of the hot-plug rows: QMP over a plain blocking socket, one command after the other.

What: `Recorder` notes the commands that a `QmpClient` sends, `RawQmp.replay` sends the same ones to another
VM and waits for the same events.
Why recorded: the peer does exactly what ours does, whatever kind it is, without a second description.
Invariants: what only asks (query-*, qom-get) is not replayed: a script that knows what it wants needs none of
it. A command that QEMU refuses raises, but for a back end that is in use still: that is tried again at once.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypervisors.qemu.qmp import QmpClient

__all__ = ["Command", "RawQmp", "Recorder"]

_ASKS = ("query-", "x-query-", "qom-get", "qom-list")
_LIMIT = 60.0  # seconds for an answer or an event


@dataclass(frozen=True, slots=True)
class Command:
    """One that succeeded; `fds` went along with it."""

    name: str
    arguments: Mapping[str, Any]
    fds: Sequence[int]


class Recorder:
    """Notes what goes through one client."""

    def __init__(self, client: QmpClient) -> None:
        self._client = client

    @contextlib.contextmanager
    def commands(self) -> Iterator[list[Command]]:
        """Those of the block."""
        execute, seen = self._client.execute, list[Command]()

        async def noted(
            command: str,
            arguments: Mapping[str, Any] | None = None,
            *,
            timeout: float = 5.0,
            fds: Sequence[int] = (),
        ) -> Any:
            answer = await execute(command, arguments, timeout=timeout, fds=fds)
            if not command.startswith(_ASKS):
                seen.append(Command(command, arguments or {}, fds))
            return answer

        self._client.execute = noted  # type: ignore[method-assign]
        try:
            yield seen
        finally:
            del self._client.execute


class RawQmp:
    """One connection to a QEMU whose control socket nobody else holds."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_LIMIT)
        self._socket.connect(path)
        self._buffer = b""
        self._events: list[dict[str, Any]] = []
        assert "QMP" in self._read()
        self.execute("qmp_capabilities")

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def execute(self, name: str, arguments: Mapping[str, Any] | None = None, fds: Sequence[int] = ()) -> Any:
        """Its answer. Raises RuntimeError with QEMU's refusal."""
        data = json.dumps({"execute": name, "arguments": dict(arguments or {})}).encode() + b"\n"
        if fds:
            socket.send_fds(self._socket, [data], fds)
        else:
            self._socket.sendall(data)
        while True:
            message = self._read()
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                raise RuntimeError(message["error"]["desc"])
            else:
                return message["return"]

    def replay(self, commands: Sequence[Command], *, served: str = "") -> None:
        """All of them, each with its event. `served`: a vhost-user back end's socket, which QEMU connects
        to itself then, where ours handed it a connection."""
        for command in _by_path(commands, served) if served else commands:
            self._events.clear()
            end = time.monotonic() + _LIMIT
            while True:
                try:
                    self.execute(command.name, command.arguments, command.fds)
                    break
                except RuntimeError as error:
                    if "in use" not in str(error) or time.monotonic() > end:
                        raise
            self._wait(command)

    def _wait(self, command: Command) -> None:
        """Until what it asks of the guest has happened."""
        wanted = command.arguments
        match command.name:
            case "device_del":
                self._until("DEVICE_DELETED", lambda data: data.get("device") == wanted["id"])
            case "device_add" if "-cpu" in wanted["driver"] or wanted["driver"] == "pc-dimm":
                self._until("ACPI_DEVICE_OST", lambda data: data["info"].get("device") == wanted["id"])
            case "qom-set":  # QEMU tells it at most once a second
                look = {"path": wanted["path"], "property": "size"}
                while self.execute("qom-get", look) != wanted["value"]:
                    time.sleep(0.001)

    def _until(self, event: str, match: Callable[[dict[str, Any]], bool]) -> None:
        while not any(seen["event"] == event and match(seen["data"]) for seen in self._events):
            self._events[:] = [self._read()]

    def _read(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            data = self._socket.recv(1 << 16)
            assert data, "QEMU hung up"
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message


def _by_path(commands: Sequence[Command], path: str) -> list[Command]:
    """With `path` instead of descriptors."""
    address = {"type": "unix", "data": {"path": path}}
    backend = {"type": "socket", "data": {"addr": address, "server": False}}
    return [
        replace(command, arguments={**command.arguments, "backend": backend})
        if command.name == "chardev-add"
        else command
        for command in commands
        if command.name != "getfd"
    ]
