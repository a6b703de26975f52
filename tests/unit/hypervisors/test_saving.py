"""A VM's state goes through a pipe, whole or not at all, and a QEMU that fails is told with its reason."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from devices.errors import HostError, HypervisorError
from hypervisors.qemu import saving
from hypervisors.qemu.qmp import QmpClient, QmpError
from hypervisors.qemu.saving import load, save

STATE = b"state" * 50_000


class Saver:
    """A QEMU that writes `state` to the descriptor that it got, or takes what comes from it; `refuses`: a
    command, `ends`: how a migration does."""

    def __init__(self) -> None:
        self.sock, self.client = socket.socketpair()
        self.client.setblocking(False)
        self.state, self.refuses, self.ends = STATE, "", "completed"
        self.loaded = b""
        self.said: list[str] = []
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def say(self, message: dict[str, Any]) -> None:
        self.sock.sendall(json.dumps(message).encode() + b"\n")

    def _serve(self) -> None:
        self.say({"QMP": {}})
        fd, buffer = -1, b""
        while True:
            data, fds, _, _ = socket.recv_fds(self.sock, 65536, 4)
            if not data:
                return
            fd = fds[0] if fds else fd
            *lines, buffer = (buffer + data).split(b"\n")
            for command in map(json.loads, lines):
                fd = self._do(command, fd)

    def _do(self, command: dict[str, Any], fd: int) -> int:
        name = command["execute"]
        self.said.append(name)
        if name == self.refuses:
            if fd >= 0:
                os.close(fd)
            self.say({"error": {"class": "GenericError", "desc": "not now"}, "id": command["id"]})
            return -1
        answer = {"error-desc": "it does not fit"} if name == "query-migrate" else {}
        self.say({"return": answer, "id": command["id"]})
        if not name.startswith("migrate") or name == "migrate-set-capabilities":
            return fd
        assert command["arguments"]["uri"].startswith("fd:")
        with open(fd, "wb" if name == "migrate" else "rb") as pipe:
            try:
                if name == "migrate":
                    pipe.write(self.state)
                else:
                    self.loaded = pipe.read(1 if self.ends == "failed" else -1)
            except BrokenPipeError:
                self.ends = "failed"
        for status in ("setup", "active", self.ends):
            self.say({"event": "MIGRATION", "data": {"status": status}})
        return -1


@pytest.fixture
async def qemu() -> AsyncIterator[tuple[QmpClient, Saver]]:
    saver = Saver()
    client = await QmpClient.connect(saver.client, timeout=10)
    yield client, saver
    await client.close()
    saver.thread.join(10)
    saver.sock.close()


async def test_what_is_saved_is_what_is_loaded(qemu: tuple[QmpClient, Saver], tmp_path: Path) -> None:
    client, saver = qemu
    path = tmp_path / "state"
    await save(client, str(path), 10)
    assert path.read_bytes() == STATE
    assert path.stat().st_mode & 0o777 == 0o600
    assert saver.said[1] == "stop"
    assert "cont" not in saver.said
    await load(client, str(path), 10)
    assert saver.loaded == STATE
    assert saver.said[-1] == "cont"


@pytest.mark.parametrize("refuses", ["migrate-set-capabilities", "getfd", "migrate", ""])
async def test_a_vm_that_cannot_be_saved_goes_on_and_leaves_no_file(
    qemu: tuple[QmpClient, Saver], tmp_path: Path, refuses: str
) -> None:
    client, saver = qemu
    saver.refuses = refuses
    saver.ends = "completed" if refuses else "failed"
    with pytest.raises(HypervisorError, match="not now" if refuses else "migrate failed: it does not fit"):
        await save(client, f"{tmp_path}/state", 10)
    assert os.listdir(tmp_path) == []
    assert (saver.said[1], saver.said[-1]) == ("stop", "cont")


async def test_an_empty_or_endless_state_is_none(
    qemu: tuple[QmpClient, Saver], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, saver = qemu
    saver.state = b""
    with pytest.raises(HypervisorError, match="has saved nothing"):
        await save(client, f"{tmp_path}/state", 10)
    saver.state = STATE
    monkeypatch.setattr(saving, "STATE_LIMIT", 1 << 16)
    with pytest.raises(HypervisorError, match="the VM's state has more than"):
        await save(client, f"{tmp_path}/state", 10)
    assert os.listdir(tmp_path) == []


async def test_what_cannot_be_loaded_is_told_and_does_not_run(
    qemu: tuple[QmpClient, Saver], tmp_path: Path
) -> None:
    client, saver = qemu
    with pytest.raises(HostError, match="cannot be opened: No such file"):
        await load(client, f"{tmp_path}/state", 10)
    Path(tmp_path, "state").write_bytes(STATE)
    saver.ends = "failed"
    with pytest.raises(HypervisorError, match="migrate-incoming failed: it does not fit"):
        await load(client, f"{tmp_path}/state", 10)
    saver.refuses = "migrate-incoming"
    with pytest.raises(QmpError, match="not now"):
        await load(client, f"{tmp_path}/state", 10)
    assert "cont" not in saver.said
