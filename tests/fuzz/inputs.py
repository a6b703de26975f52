"""The targets that read files: the user's, the administrator's and our own; and the management socket.

What: enters them into `targets.TARGETS`. Those that read by a path get a file of a directory of their own.
"""

from __future__ import annotations

import asyncio
import math
import os
from functools import cache
from typing import Any

from ctl.trace import read_phases, stretches
from devices.cdi import find_device
from devices.errors import KataError
from shim.config import load_config
from shim.config.annotations import PREFIX
from shim.resources.direct_volumes import MOUNT_INFO, find, volume_directory
from shim.resources.network import dan
from shim.sandbox import management
from shim.spec.guest_spec import Volume
from shim.state import healthfile, journalfile, recoveryfile
from shim.state.trace import TRACE_FILE, Trace, owner_of
from tests.fuzz.targets import directory, mapping, run, scratch, target

__all__: list[str] = []


@cache
def _base() -> str:
    """A configuration with which everything that a pod may ask for is enabled."""
    files = {name: scratch(name, b"x") for name in ("kernel", "image", "initrd")}
    text = "[hypervisor.qemu]\n" + "".join(f'{name} = "{path}"\n' for name, path in files.items())
    text += 'path = "/bin/true"\nenable_annotations = [".*"]\nvalid_hypervisor_paths = ["/bin/*"]\n'
    text += 'virtio_fs_daemon = "/bin/true"\n[runtime]\n[agent.kata]\n'
    path = scratch("base.toml", text.encode())
    asked = load_config(path, annotations={f"{PREFIX}hypervisor.default_memory": "300"})
    assert asked.hypervisor.default_memory == 300, "else every annotation is refused, and nothing is tried"
    return path


@target
def configuration(data: bytes) -> None:
    """A configuration.toml: a checked configuration, or an error that says what is wrong."""
    try:
        load_config(scratch("configuration.toml", data))
    except KataError as error:
        assert error.phase, error


@target
def pod_annotations(data: bytes) -> None:
    """A pod's annotations, with everything enabled."""
    found = mapping(data)
    if found is None:
        return
    base = _base()
    try:
        load_config(base, annotations={f"{PREFIX}{key}": found[key] for key in found})
    except KataError as error:
        assert error.phase, error


@target
def network_file(data: bytes) -> None:
    """A directly attachable network's file."""
    try:
        dan.read(scratch("dan.json", data))
    except KataError as error:
        assert error.phase == "network"


@target
def volume_file(data: bytes) -> None:
    """A directly assigned volume's mountInfo.json."""
    root = os.path.dirname(scratch("volumes", b""))
    volume = Volume(0, "/v", "/v", readonly=False, recursive=False, share_name="v")
    place = volume_directory(volume.source, root)
    os.makedirs(place, exist_ok=True)
    with open(f"{place}/{MOUNT_INFO}", "wb") as file:
        file.write(data)
    try:
        find([volume], root)
    except KataError as error:
        assert error.phase, error


@target
def management_request(data: bytes) -> None:
    """A request on the management socket."""
    try:
        _method, path, body = run(_request(data))
        if path.startswith("/direct-volume/resize"):
            management._resize_request(body)
    except (KataError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return


async def _request(data: bytes) -> Any:
    reader = asyncio.StreamReader(limit=management._MAX_HEAD)
    reader.feed_data(data)
    reader.feed_eof()
    return await management._read(reader)


# --- files of ours, which a crash, a full disk or another hand may have spoilt

_DROP = b'{"op":"drop","n":1}\n'


@target
def journal(data: bytes) -> None:
    """A journal in any state: what it tells has whole facts, damage costs what follows it and nothing
    before, and written anew it tells the same."""
    place = directory("journal", data)
    try:
        history = journalfile.load(place)
    except journalfile.JournalError as error:
        assert str(error).isprintable()
        return
    finally:
        version, identity = journalfile.read_identity(place)
    facts = _facts(history)
    if history.identity is not None:
        assert (version, identity) == (history.version, history.identity)
    if not history.version:
        assert not facts
        return
    whole = data[: data.rfind(b"\n") + 1]
    for junk in (b"\xff\n", b"{}\n", b"[1]\n", b"{" * 2000 + b"\n"):
        spoilt = journalfile.parse(whole + junk + _DROP)
        assert spoilt.damage
        assert _facts(spoilt) == _facts(journalfile.parse(whole))
    if whole:
        lines = map(journalfile.encode_record, history.records)
        again = journalfile.parse(b"".join([journalfile.encode(history.header), *lines]))
        assert not again.damage
        assert _facts(again) == facts
        assert again.identity == history.identity


def _facts(history: journalfile.History) -> list[tuple[int, str, dict[str, str | int]]]:
    for record in history.records:
        assert all(type(value) in (str, int) for value in record.facts.values())
    return [(record.number, record.kind, record.facts) for record in history.records]


@target
def health_file(data: bytes) -> None:
    """The file that says that a guest does not answer."""
    found = healthfile.read(directory(healthfile.NAME, data))
    assert found is None or math.isfinite(found.since)


@target
def recovery_file(data: bytes) -> None:
    """What a shim that is to take a VM over reads: exactly what one writes, or an error of its own."""
    where = directory(recoveryfile.NAME, data)
    try:
        found = recoveryfile.read(where)
    except recoveryfile.RecoveryError:
        return
    recoveryfile.write(where, found)
    assert recoveryfile.read(where) == found


@target
def trace_file(data: bytes) -> None:
    """The phases of a start, for `kata-ctl` and for the metrics."""
    path = scratch(TRACE_FILE, data)
    assert all(isinstance(text, str) for text in owner_of(path))
    phases, bad = read_phases(path)
    assert bad >= 0
    stretches(phases)
    Trace("s", directory(TRACE_FILE, data)).durations()


@target
def cdi_file(data: bytes) -> None:
    """A specification of a device, as a vendor's tool leaves it below /etc/cdi."""
    path = os.path.join(directory("x", b""), "cdi")
    os.makedirs(path, exist_ok=True)
    with open(f"{path}/a.json", "wb") as file:
        file.write(data)
    try:
        found = find_device("a.b/c=d", [path])
    except KataError as error:
        assert error.phase, error
        return
    assert all(node.startswith("/") for node in found.nodes)
