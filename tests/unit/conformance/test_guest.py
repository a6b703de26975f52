"""The probe answers each line by one, and who asks it loses no answer by losing patience."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from conformance import probe
from conformance.guest import Asked, GuestSaysError, probed


def told(line: str) -> Any:
    said = probe.answer(line.encode())
    assert said.endswith(b"\n")
    assert said.count(b"\n") == 1
    return json.loads(said)


def test_a_question_has_an_answer() -> None:
    assert told('{"number": 7, "ask": "spin", "with": {"seconds": 0}}') == {"of": 7, "answer": 0}


@pytest.mark.parametrize("asked", ['"ask": "who", "with": {}', '"ask": "spin", "with": {"colour": 1}'])
def test_what_cannot_be_answered_is_an_error(asked: str) -> None:
    said = told(f'{{"number": 7, {asked}}}')
    assert (said["of"], list(said)) == (7, ["of", "error"])


@pytest.mark.parametrize("line", ["nonsense", "[]", "{}"])
def test_nonsense_is_an_error(line: str) -> None:
    assert list(told(line)) == ["of", "error"]


def test_a_write_that_fails_is_told(tmp_path: Path) -> None:
    given = {"node": f"{tmp_path}/x", "offset": 0, "text": "x"}
    assert "No such file" in told(json.dumps({"number": 1, "ask": "write", "with": given}))["error"]


async def test_an_answer_that_comes_late_is_nobody_elses() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        asked = Asked(ours, 5)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asked("beats"), 0.01)
        assert json.loads(theirs.recv(100)) == {"number": 1, "ask": "beats", "with": {}}
        theirs.sendall(b'{"of": 1, "answer": 6}\n{"of": 2,')
        again = asyncio.create_task(asked("beats"))
        await asyncio.sleep(0)
        theirs.sendall(b' "answer": 7}\n{"of": 3, "error": "OSError: no"}\n')
        assert await again == 7
        with pytest.raises(GuestSaysError, match="OSError: no"):
            await asked("beats")
        theirs.close()
        with pytest.raises(OSError, match=r"gone|Broken pipe"):
            await asked("beats")


async def test_an_answer_has_an_end() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        flood = asyncio.create_task(asyncio.to_thread(_flood, theirs))
        with pytest.raises(ConnectionResetError):
            await Asked(ours, 60)("beats")
        ours.close()
        await flood


def _flood(sock: socket.socket) -> None:
    try:
        while True:
            sock.sendall(bytes(65536).replace(b"\0", b"x"))
    except OSError:
        pass


def test_an_image_of_somebody_elses_is_refused(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with pytest.raises(RuntimeError, match=r"is no image of `make guest`"):
        probed(str(image))
