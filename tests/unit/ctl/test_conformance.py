"""`kata-ctl conformance` says what is missing before it starts anything, and runs the package's suite."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from pathlib import Path

import pytest

import conformance
from ctl import conformance as command
from ctl.main import main
from devices.errors import ConfigError, HostError
from hypervisors.registry import get_plugin


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


def test_in_the_bench_host_it_runs_with_the_places_of_plugin_and_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Which lie outside of the checkout, below /tmp, too."""
    package = tmp_path / "site" / "acme_vmm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("class Plugin: pass\n")
    config = tmp_path / "etc" / "acme.toml"
    config.parent.mkdir()
    config.touch()
    monkeypatch.syspath_prepend(str(package.parent))
    plugin = importlib.import_module("acme_vmm").Plugin()
    checkout, words = command.in_bench_host("acme", str(config), plugin, only="a or b", first=True)
    assert checkout == str(Path(__file__).parents[3])
    assert words[1:4] == ["-m", "tests.benchhost", "--limit=3600"]
    assert words[4:7] == [f"--share={config.parent}", f"--share={package.parent}", "--"]
    inner = shlex.split(words[7])
    assert inner[0] == "env"
    assert str(package.parent) in inner[1].removeprefix("PYTHONPATH=").split(":")
    assert inner[2:] == [
        *(sys.executable, "-m", "ctl", "conformance", "acme"),
        *("--config", str(config), "-k", "a or b", "-x"),
    ]
    _, words = command.in_bench_host("qemu", "", get_plugin("qemu"))
    assert words[4:] == ["--", f"{sys.executable} -m ctl conformance qemu"]


def test_without_the_checkout_there_is_no_bench_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(conformance, "__path__", [str(tmp_path / "conformance")])
    assert main(["conformance", "qemu", "--bench-host"]) == 1
    said = capsys.readouterr().err
    assert f"the bench host is part of kata-shim's checkout, and {tmp_path} is none" in said
    assert "leave --bench-host out" in said


def test_a_vm_of_somebody_elses_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(HostError, match="VMs of remote are somebody else's"):
        command.run("remote")
