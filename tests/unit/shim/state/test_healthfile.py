"""Whoever looks whether a guest answers reads all of the file or nothing, and fails by nothing in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shim.state import healthfile


def test_it_is_there_while_the_guest_is_silent(tmp_path: Path) -> None:
    silence = healthfile.Silence(12.5, "it did not \x1b answer\n")
    healthfile.write(str(tmp_path), silence)
    assert healthfile.read(str(tmp_path)) == silence
    assert (tmp_path / healthfile.NAME).stat().st_mode & 0o777 == 0o600
    healthfile.write(str(tmp_path), healthfile.Silence(1.0, "x" * 100_000))
    told = healthfile.read(str(tmp_path))
    assert told is not None
    assert len(told.why) == 1024
    healthfile.clear(str(tmp_path))
    healthfile.clear(str(tmp_path))
    assert os.listdir(tmp_path) == []
    with pytest.raises(OSError, match="No such file"):
        healthfile.write(str(tmp_path / "gone"), silence)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"since": "x", "why": ""}', '{"why": "x"}', "null", "[" * 9000, "\xff"),
        *(
            '{"since": 1' + "0" * 400 + ', "why": ""}',
            '{"since": 1e999, "why": ""}',
            '{"since": NaN, "why": ""}',
        ),
        *('{"since": "nan", "why": ""}', '{"since": true, "why": ""}', '{"since": 1, "why": [1]}'),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str) -> None:
    """Whoever looks must not fail by it."""
    assert healthfile.read(str(tmp_path)) is None
    (tmp_path / healthfile.NAME).write_text(text)
    assert healthfile.read(str(tmp_path)) is None


def test_no_link_and_no_fifo_is_read(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text('{"since": 1, "why": "x"}')
    (tmp_path / healthfile.NAME).symlink_to(tmp_path / "elsewhere")
    assert healthfile.read(str(tmp_path)) is None
    (tmp_path / healthfile.NAME).unlink()
    os.mkfifo(tmp_path / healthfile.NAME)
    assert healthfile.read(str(tmp_path)) is None
