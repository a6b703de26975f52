"""The management socket answers two of Kata's requests, root's alone, and nothing that it does not know."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from ctl import direct_volume
from ctl.which import which
from devices.errors import CallerError, GuestError, HostError
from devices.undo import MemoryUndo
from proto import csi_pb2
from shim.resources.direct_volumes import volume_directory
from shim.sandbox import management
from shim.sandbox.management import SOCKET, Management
from shim.state.identity import Identity
from shim.state.journalfile import encode, header_of


class Volumes:
    """Stands for the sandbox's volumes; remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.error: Exception | None = None

    async def stats(self, name: str, _agent: object) -> csi_pb2.VolumeStatsResponse:
        self.asked.append(("stats", name))
        if self.error is not None:
            raise self.error
        answer = csi_pb2.VolumeStatsResponse()
        answer.usage.add(available=1, total=3, used=2, unit=csi_pb2.VolumeUsage.BYTES)
        return answer

    async def resize(self, name: str, size: int, _agent: object, _host: object) -> None:
        self.asked.append(("resize", name, size))
        if self.error is not None:
            raise self.error


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room for a key and a socket's name."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
async def volumes(tmp_path: Path) -> AsyncIterator[Volumes]:
    """Served on `tmp_path/s1/shim-monitor.sock`; nothing of it is left."""
    made, undo = Volumes(), MemoryUndo()
    (tmp_path / "s1").mkdir()
    served = Management(made, None, lambda: None)  # type: ignore[arg-type, return-value]
    await served.start(str(tmp_path / "s1"), undo)
    assert [(entry.kind, entry.facts["path"]) for entry in undo.entries] == [
        ("socket", f"{tmp_path}/s1/{SOCKET}")
    ]
    yield made
    await served.close()
    await served.close()
    assert undo.entries == []
    assert list((tmp_path / "s1").iterdir()) == []


async def ask(tmp_path: Path, text: str) -> tuple[str, str]:
    """(status line, body) of the answer."""
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s1" / SOCKET))
    writer.write(text.encode())
    answer = (await asyncio.wait_for(reader.read(), 10)).decode()
    writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    return head.split("\r\n")[0], body


def post(path: str, document: Any) -> str:
    body = document if isinstance(document, str) else json.dumps(document)
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}"


async def test_it_is_roots_alone(volumes: Volumes, tmp_path: Path) -> None:
    assert stat.S_IMODE(os.stat(tmp_path / "s1" / SOCKET).st_mode) == 0o600
    assert volumes.asked == []


async def test_stats_are_answered_as_katas_shim_does(volumes: Volumes, tmp_path: Path) -> None:
    for method in ("GET", "POST"):
        status, body = await ask(
            tmp_path, f"{method} /direct-volume/stats?path=%2Fvar%2Fa%20b HTTP/1.1\r\n\r\n"
        )
        assert status == "HTTP/1.1 200 OK"
        assert json.loads(body)["usage"] == [{"available": 1, "total": 3, "used": 2, "unit": 1}]
    assert volumes.asked == [("stats", "/var/a b")] * 2


@pytest.mark.parametrize(
    "document",
    [
        {"VolumePath": "/v", "Size": 512},
        {"volume_guest_path": "/v", "size": 512},
        {"volume_path": "/v", "size": 512},
    ],
)
async def test_a_resize_by_the_words_of_each_runtime(
    volumes: Volumes, tmp_path: Path, document: dict[str, object]
) -> None:
    assert await ask(tmp_path, post("/direct-volume/resize", document)) == ("HTTP/1.1 200 OK", "")
    assert volumes.asked == [("resize", "/v", 512)]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CallerError("no such volume", code="NOT_FOUND"), "404 Not Found"),
        (CallerError("too small", code="INVALID_ARGUMENT"), "400 Bad Request"),
        (CallerError("in use"), "409 Conflict"),
        (GuestError("no", code="UNIMPLEMENTED"), "501 Not Implemented"),
        (HostError("disk full", code="UNKNOWN"), "500 Internal Server Error"),
    ],
)
async def test_errors_have_a_status_and_say_why(
    volumes: Volumes, tmp_path: Path, error: Exception, status: str
) -> None:
    volumes.error = error
    answer = await ask(tmp_path, post("/direct-volume/resize", {"VolumePath": "/v", "Size": 512}))
    assert answer == (f"HTTP/1.1 {status}", f"{error}\n")


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("GET /metrics HTTP/1.1\r\n\r\n", "404 Not Found"),
        ("GET /direct-volume/resize HTTP/1.1\r\n\r\n", "404 Not Found"),
        ("nonsense\r\n\r\n", "400 Bad Request"),
        (post("/direct-volume/resize", "[]"), "400 Bad Request"),
        (post("/direct-volume/resize", "[" * 9000), "400 Bad Request"),
        (post("/direct-volume/resize", {"VolumePath": 7, "Size": 512}), "400 Bad Request"),
        (post("/direct-volume/resize", {"VolumePath": "/v", "Size": True}), "400 Bad Request"),
        ("POST /direct-volume/resize HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", "400 Bad Request"),
        ("POST /direct-volume/resize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", "400 Bad Request"),
        ("POST /direct-volume/resize HTTP/1.1\r\nContent-Length: -1\r\n\r\n", "400 Bad Request"),
    ],
)
async def test_other_requests_do_nothing(volumes: Volumes, tmp_path: Path, text: str, status: str) -> None:
    assert (await ask(tmp_path, text))[0] == f"HTTP/1.1 {status}"
    assert volumes.asked == []


async def test_a_request_that_never_ends_is_given_up(
    volumes: Volumes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(management, "_REQUEST", 0.05)
    assert await ask(tmp_path, "POST /direct-volume/resize HTTP/1.1\r\n") == ("", "")
    assert await ask(tmp_path, "x" * 100_000) == ("", "")
    assert volumes.asked == []


async def test_kata_ctl_asks_the_sandbox_that_has_the_volume(
    volumes: Volumes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk, directory = tmp_path / "disk.img", str(tmp_path / "volumes")
    disk.write_bytes(bytes(4096))
    info = json.dumps({"volume-type": "block", "device": str(disk), "fstype": "ext4"})
    direct_volume.add("/var/vol", info, directory)
    with pytest.raises(CallerError, match="is assigned already"):
        direct_volume.add("/var/vol", info, directory)
    where: dict[str, Any] = {"directory": directory, "run": str(tmp_path / "run"), "kata": str(tmp_path)}
    with pytest.raises(CallerError, match="no sandbox uses /var/vol"):
        direct_volume.stats("/var/vol", **where)
    (folder,) = (tmp_path / "volumes").iterdir()
    (folder / "s1").touch()

    await asyncio.to_thread(direct_volume.stats, "/var/vol", **where)
    assert json.loads(capsys.readouterr().out)["usage"][0]["total"] == 3
    await asyncio.to_thread(direct_volume.resize, "/var/vol", 8192, **where)
    assert volumes.asked == [("stats", "/var/vol"), ("resize", "/var/vol", 8192)]
    volumes.error = CallerError("it is read-only", code="INVALID_ARGUMENT")
    with pytest.raises(CallerError, match="the shim answers 400: it is read-only"):
        await asyncio.to_thread(direct_volume.resize, "/var/vol", 8192, **where)
    (folder / "s1").rename(folder / "s2")
    with pytest.raises(HostError, match="no answer from the shim"):
        direct_volume.stats("/var/vol", **where)
    direct_volume.remove("/var/vol", directory)
    assert not folder.exists()
    with pytest.raises(CallerError, match="is not assigned"):
        direct_volume.remove("/var/vol", directory)


async def test_of_several_sandboxes_that_have_a_volume_one_must_be_named(
    volumes: Volumes, tmp_path: Path, short: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two with the same id: one by its id and Kata's link, the other by its key. Nothing is guessed."""
    run, kata, directory = short / "run", short / "kata", tmp_path / "volumes"
    ours, other = Identity("/c.sock", "a", "twin"), Identity("/c.sock", "b", "twin")
    kata.mkdir()
    for who in (ours, other):
        (run / who.key).mkdir(parents=True)
        (run / who.key / "journal").write_bytes(encode(header_of(who)))
    (run / other.key / SOCKET).symlink_to(tmp_path / "s1" / SOCKET)
    (kata / "twin").symlink_to(f"../run/{ours.key}")
    folder = Path(volume_directory("/var/vol", str(directory)))
    folder.mkdir(parents=True)
    for name in ("mountInfo.json", "twin", other.key, "f" * 32):
        (folder / name).touch()
    where: dict[str, Any] = {"directory": str(directory), "run": str(run), "kata": str(kata)}

    with pytest.raises(CallerError, match=r"several sandboxes have /var/vol: b/twin, a/twin; try: name one"):
        direct_volume.stats("/var/vol", **where)
    with pytest.raises(CallerError, match=r"no sandbox that is nope uses /var/vol; b/twin, a/twin have it"):
        direct_volume.stats("/var/vol", which("nope"), **where)
    await asyncio.to_thread(direct_volume.stats, "/var/vol", which("b/twin"), **where)
    await asyncio.to_thread(direct_volume.resize, "/var/vol", 8192, which(None, "b"), **where)
    assert volumes.asked == [("stats", "/var/vol"), ("resize", "/var/vol", 8192)]
    capsys.readouterr()


@pytest.mark.parametrize("info", ["{", "{}", '{"volume-type": "block", "device": "/nope", "fstype": "ext4"}'])
def test_what_no_container_could_use_is_not_assigned(tmp_path: Path, info: str) -> None:
    with pytest.raises((CallerError, HostError)):
        direct_volume.add("/var/vol", info, str(tmp_path / "volumes"))
    assert not any((tmp_path / "volumes").glob("*"))
