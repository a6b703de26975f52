"""The peer of the hot-plug rows does what ours did, and waits for the same."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from hypervisors.qemu.qmp import QmpError
from tests.bench.raw_qmp import Command, RawQmp, Recorder
from tests.unit.hypervisors.machine import Machine

Script = list[tuple[str, list[dict[str, Any]]]]


async def test_what_succeeded_is_noted_and_what_only_asks_is_not() -> None:
    machine = Machine()
    client = await machine.connect()
    try:
        machine.refuse.add("object-del")
        with Recorder(client).commands() as seen:
            await client.execute("query-hotpluggable-cpus")
            await client.execute("object-add", {"id": "n", "qom-type": "x"})
            with pytest.raises(QmpError):
                await client.execute("object-del", {"id": "n"})
        await client.execute("query-hotpluggable-cpus")
        await client.execute("object-add", {"id": "later", "qom-type": "x"})
    finally:
        await client.close()
        await machine.close()
    assert seen == [Command("object-add", {"id": "n", "qom-type": "x"}, ())]


def _qemu(path: Path, script: Script, got: list[str]) -> threading.Thread:
    """Answers each expected command with its messages."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener, listener.accept()[0] as connection, connection.makefile("rwb") as stream:
            stream.write(b'{"QMP": {}}\n')
            stream.flush()
            for name, messages in [("qmp_capabilities", [{"return": {}}]), *script]:
                got.append(json.loads(stream.readline())["execute"])
                assert got[-1] == name
                for message in messages:
                    stream.write(json.dumps(message).encode() + b"\n")
                stream.flush()
            stream.read()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


def test_a_replay_waits_for_the_guest(tmp_path: Path) -> None:
    """A refused removal of what is in use is tried again; events of others, and old ones, are no answer."""
    deleted = {"event": "DEVICE_DELETED", "data": {"device": "disk"}}
    ost = {"event": "ACPI_DEVICE_OST", "data": {"info": {"device": "dimm0", "status": 0}}}
    size = {"event": "MEMORY_DEVICE_SIZE_CHANGE", "data": {"id": "v", "size": 4}}
    script: Script = [
        ("device_add", [ost, {"return": {}}]),
        ("device_del", [{"event": "DEVICE_DELETED", "data": {"device": "other"}}, {"return": {}}, deleted]),
        ("blockdev-del", [{"error": {"desc": "Node n is in use"}}]),
        ("blockdev-del", [{"return": {}}]),
        ("qom-set", [{"return": {}}]),
        ("qom-get", [{"return": 2}]),
        ("qom-get", [size, {"return": 4}]),
    ]
    got: list[str] = []
    thread = _qemu(tmp_path / "qmp", script, got)
    raw = RawQmp(str(tmp_path / "qmp"))
    raw.replay(
        [
            Command("device_add", {"driver": "pc-dimm", "id": "dimm0"}, ()),
            Command("device_del", {"id": "disk"}, ()),
            Command("blockdev-del", {"node-name": "n"}, ()),
            Command("qom-set", {"path": "v", "property": "requested-size", "value": 4}, ()),
        ]
    )
    raw.close()
    thread.join(20)
    assert got[1:] == [name for name, _ in script]


def test_a_refusal_ends_the_replay(tmp_path: Path) -> None:
    thread = _qemu(tmp_path / "qmp", [("device_del", [{"error": {"desc": "no such"}}])], [])
    raw = RawQmp(str(tmp_path / "qmp"))
    with pytest.raises(RuntimeError, match="no such"):
        raw.replay([Command("device_del", {"id": "disk"}, ())])
    raw.close()
    thread.join(20)
