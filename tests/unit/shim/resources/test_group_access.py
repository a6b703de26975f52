"""A directory that only a supplemental group opens is told, where virtiofsd carries one group."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from devices import share_fs
from shim.resources.group_access import told
from shim.spec.guest_spec import plan_volumes

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives directories to a group")


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A virtiofsd of the C kind."""
    program = tmp_path / "virtiofsd"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setattr(share_fs, "_C_PATH", str(program))
    return str(program)


def directory(path: Path, gid: int, mode: int, uid: int = 0) -> Path:
    path.mkdir()
    os.chown(path, uid, gid)
    path.chmod(mode)
    return path


def lines(daemon: str, *sources: Path, options: str = "rw", **user: Any) -> list[str]:
    mounts = [
        {"destination": f"/v{number}", "type": "bind", "source": str(path), "options": ["rbind", options]}
        for number, path in enumerate(sources)
    ]
    given = {"uid": 1000, "gid": 3000, "additionalGids": [2000, 3000], **user}
    spec = {"mounts": mounts, "process": {"user": given}}
    return told(plan_volumes(spec, "c1"), spec, daemon)


def test_what_is_told(daemon: str, tmp_path: Path) -> None:
    closed = directory(tmp_path / "closed", 2000, 0o2775)

    assert lines(daemon, closed) == [f"/v0 ({closed}, of group 2000)"]


def test_what_is_not(daemon: str, tmp_path: Path) -> None:
    closed = directory(tmp_path / "closed", 2000, 0o2775)
    others = (
        directory(tmp_path / "open", 2000, 0o2777),
        directory(tmp_path / "own", 2000, 0o2775, uid=1000),
        directory(tmp_path / "main", 3000, 0o2775),
        directory(tmp_path / "foreign", 4000, 0o2775),
        directory(tmp_path / "still", 2000, 0o2755),
        tmp_path / "missing",
    )

    assert lines(daemon, *others) == []
    assert lines(daemon, closed, options="ro") == []
    assert lines(daemon, closed, uid=0) == []
    assert lines(daemon, closed, additionalGids=[]) == []
    assert lines("/bin/true", closed) == [], "Rust's carries the group"
    assert lines("/nonexistent", closed) == []
