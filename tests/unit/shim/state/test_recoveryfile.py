"""What a shim writes down for the next one is read back as it was, and nothing else is taken for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shim.state import recoveryfile
from shim.state.recoveryfile import RecoveryError, Saved
from tests.unit.shim.saved import saved

Document = dict[str, Any]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    whole = saved()
    recoveryfile.write(str(tmp_path), whole)

    assert recoveryfile.read(str(tmp_path)) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["recovery.json"]
    assert (tmp_path / "recovery.json").stat().st_mode & 0o777 == 0o600
    recoveryfile.remove(str(tmp_path))
    recoveryfile.remove(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        recoveryfile.read(str(tmp_path))


def _without(document: Document, *path: str | int) -> None:
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.update(version=2), "not of version 1"),
        (lambda d: d.pop("version"), "not of version 1"),
        (lambda d: d.update(more=1), "more is missing, or unknown"),
        (lambda d: _without(d, "daemon", "socket"), "daemon.socket is missing, or unknown"),
        (lambda d: d.update(daemon=[]), "daemon is no object"),
        (lambda d: d["daemon"].update(mounts="7"), "daemon.mounts is no int"),
        (lambda d: d["daemon"].update(mounts=True), "daemon.mounts is no int"),
        (lambda d: d["daemon"].update(program="x"), "daemon.program is no array"),
        (lambda d: d["daemon"].update(program=[1]), "daemon.program[0] is no str"),
        (lambda d: d["daemon"]["environment"].update(PATH=1), "daemon.environment.PATH is no str"),
        (lambda d: d["sandbox"].update(kill="soon"), "sandbox.kill is no float"),
        (
            lambda d: _without(d, "containers", 0, "processes", 0, "status"),
            "containers[0].processes[0].status",
        ),
    ],
)
def test_what_is_not_exactly_that_is_refused(
    tmp_path: Path, change: Callable[[Document], object], says: str
) -> None:
    recoveryfile.write(str(tmp_path), saved())
    path = tmp_path / "recovery.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))

    with pytest.raises(RecoveryError) as caught:
        recoveryfile.read(str(tmp_path))
    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1, "version": 1}', "x" * 100])
def test_what_is_no_such_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "recovery.json").write_text(text)

    with pytest.raises(RecoveryError):
        recoveryfile.read(str(tmp_path))


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recovery.json").mkdir()

    with pytest.raises(RecoveryError, match="no regular file"):
        recoveryfile.read(str(tmp_path))


def test_a_number_may_be_whole(tmp_path: Path) -> None:
    """Seconds that are integers in JSON are seconds."""
    whole = saved()
    recoveryfile.write(str(tmp_path), whole)
    path = tmp_path / "recovery.json"
    path.write_text(path.read_text().replace('"kill":10.0', '"kill":10'))

    found: Saved = recoveryfile.read(str(tmp_path))

    assert found == whole
