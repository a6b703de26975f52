"""What unit tests must not share with the machine's own daemons."""

from __future__ import annotations

from pathlib import Path

import pytest

from devices import versions


@pytest.fixture(autouse=True)
def own_versions(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The versions of a test's programs are forgotten with the test."""
    monkeypatch.setattr(
        versions, "CACHE", str(Path(tmp_path_factory.mktemp("versions"), "run/versions.json"))
    )
