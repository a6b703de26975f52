"""`kata-ctl conformance` says what is missing before it starts anything, and runs the package's suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import conformance
from ctl import conformance as command
from ctl.main import main
from devices.errors import ConfigError, HostError


def test_a_missing_pytest_is_told_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "pytest_asyncio" else name)
    assert main(["conformance", "qemu"]) == 1
    said = capsys.readouterr().err
    assert "pytest-asyncio is not installed beside kata-shim" in said
    assert "pip install 'kata-shim[conformance]'" in said


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(HostError, match="run it as root"):
        command.run("qemu")


def test_an_unknown_vmm_is_told_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(ConfigError, match='no hypervisor "qmu"; the nearest is "qemu"'):
        command.run("qmu")


def test_the_suite_of_the_package_is_run_with_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    def fails(words: list[str]) -> int:
        given.extend(words)
        return 1

    monkeypatch.setattr(pytest, "main", fails)
    assert main(["conformance", "qemu", "--config", "/x.toml", "-x", "-k", "paused"]) == 1
    (home,) = conformance.__path__
    assert Path(given[given.index("-c") + 1]) == Path(home, "pytest.ini")
    assert Path(home, "pytest.ini").exists()
    assert {"--hypervisor=qemu", "--hypervisor-config=/x.toml"} <= set(given)
    assert given[-2:] == ["--pyargs", "conformance.test_vmm"]
    assert given[given.index("-k") + 1] == "paused"
    assert "-x" in given
