"""A binary is asked for its version once, and again when it is another one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from devices import versions
from devices.child import Child
from devices.errors import HostError
from devices.undo import MemoryUndo
from devices.versions import parse, version_of


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """It says its version. `asked` counts how often: a confined program could not."""
    path = tmp_path / "program"
    path.write_text("#!/bin/sh\necho program 1.2.3\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command lines that were started."""
    started: list[str] = []
    spawn = Child.spawn

    async def record(argv: list[str], **how: Any) -> Child:
        started.append(" ".join(argv))
        return await spawn(argv, **how)

    monkeypatch.setattr(Child, "spawn", record)
    return started


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)", (7, 2, 22)),
        ("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1)", (11, 1, 3)),
        ("virtiofsd 1.13.2", (1, 13, 2)),
        ("virtiofsd version 7.2.22 (Debian)\nusing FUSE kernel interface version 7.36", (7, 2, 22)),
        ("vhost-device-vsock 0.3.0", (0, 3, 0)),
        ("Firecracker v1.12.1", (1, 12, 1)),
        ("who knows", ()),
    ],
)
def test_the_words_of_the_programs(text: str, numbers: tuple[int, ...]) -> None:
    """The first dotted number, wherever they put it."""
    assert parse(text).numbers == numbers


async def test_it_is_asked_once(program: Path, asked: list[str]) -> None:
    """By whichever daemon: the answer is in a file, which is root's alone."""
    undo = MemoryUndo()
    for _ in range(3):
        assert (await version_of(str(program), undo)).numbers == (1, 2, 3)

    assert asked == [f"{program} --version"]
    assert undo.entries == []
    assert os.stat(versions.CACHE).st_mode & 0o777 == 0o600


async def test_another_binary_is_asked_again(program: Path, asked: list[str]) -> None:
    """An upgrade replaces the file: another inode, time and size."""
    await version_of(str(program), MemoryUndo())
    new = program.with_suffix(".new")
    new.write_text(program.read_text().replace("1.2.3", "1.2.4"))
    new.chmod(0o755)
    new.replace(program)

    assert (await version_of(str(program), MemoryUndo())).numbers == (1, 2, 4)
    assert asked == [f"{program} --version"] * 2


@pytest.mark.parametrize(
    "text", ["", "no json", "[1]", '{"/x": 1}', '{"PROGRAM": [1, 2]}', "1" * 70000, "[" * 60000]
)
async def test_a_broken_file_is_an_empty_one(program: Path, text: str) -> None:
    Path(versions.CACHE).parent.mkdir(exist_ok=True)
    Path(versions.CACHE).write_text(text.replace("PROGRAM", str(program)))

    assert (await version_of(str(program), MemoryUndo())).numbers == (1, 2, 3)
    assert list(json.loads(Path(versions.CACHE).read_text())) == [str(program)]


async def test_a_file_that_cannot_be_written_is_no_error(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "CACHE", "/proc/nothing/versions.json")

    assert (await version_of(str(program), MemoryUndo())).numbers == (1, 2, 3)


async def test_not_more_is_kept_than_fits(program: Path) -> None:
    """Whatever was there before goes first."""
    entries = {f"/p{number}": [1, 2, 3, 4, "x 1.0"] for number in range(200)}
    Path(versions.CACHE).parent.mkdir(exist_ok=True)
    Path(versions.CACHE).write_text(json.dumps(entries))
    await version_of(str(program), MemoryUndo())

    kept = json.loads(Path(versions.CACHE).read_text())
    assert len(kept) == 64
    assert str(program) in kept


async def test_one_that_is_not_there_is_named() -> None:
    with pytest.raises(HostError, match="/no/such cannot be run: No such file"):
        await version_of("/no/such", MemoryUndo())
