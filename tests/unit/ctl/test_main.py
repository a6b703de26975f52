"""`kata-ctl` promises 0 for fine, 1 for a problem told in one paragraph, 2 for a wrong command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ctl import environment
from ctl.main import main
from hypervisors.config import HypervisorConfig
from shim.config import find as find_module

ROOT = Path(__file__).parents[3]


class Plugin:
    """The real schema without the host's facts."""

    name = "qemu"
    section = HypervisorConfig

    def adjust_config(self, section: Any) -> Any:
        return section

    def validate_config(self, section: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def _no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypervisors.registry.get_plugin", lambda _: Plugin())
    monkeypatch.setattr(find_module, "SEARCH_PATH", ("/none",))
    monkeypatch.delenv("KATA_CONF_FILE", raising=False)


def test_a_wrong_command_line_is_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["nonsense"], ["config"], ["trace", "--nonsense"]):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 2
    assert "usage: kata-ctl" in capsys.readouterr().err


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    commands = [[name] for name in ("check", "env", "hypervisors", "list", "trace", "config")]
    for argv in ([], *commands, ["config", "show"], ["config", "check"], ["config", "set"]):
        with pytest.raises(SystemExit) as caught:
            main([*argv, "--help"])
        assert caught.value.code == 0
        assert " ".join(["kata-ctl", *argv]) in capsys.readouterr().out


def test_errors_are_one_paragraph_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "/no/such/file"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("kata-ctl: config: the given file does not exist: /no/such/file; try: ")


def test_config_check_tells_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[runtime]\nx = 1\nenable_tracing = true\n[hypervisor.qemu]\ny = 2\n")
    monkeypatch.chdir(tmp_path)
    assert main(["config", "check", "c.toml"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(": ")[0] for line in err.splitlines()] == [f"{path}:2", f"{path}:5", "try"]
    path.write_text("[runtime]\nenable_tracing = true\n[hypervisor.qemu]\nenable_hugepages = false\n")
    assert main(["config", "check", "c.toml"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"note: {path}:2: [runtime] enable_tracing = true has no effect yet: kata-shim behaves as with false",
        "note: 1 more keys have no effect yet, but ask for what happens anyway",
        f"{path}: good, for qemu",
    ]
    path.write_text("[runtime\n")
    assert main(["config", "check", "c.toml"]) == 1
    assert "not TOML" in capsys.readouterr().err


def test_what_config_show_prints_is_a_configuration_that_means_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        '[hypervisor.qemu]\ndefault_vcpus = 2.5\nkernel_params = "a=\\"b\\" \\\\ c"\n'
        'virtio_fs_extra_args = ["-x"]\n'
    )
    assert main(["config", "show", str(path)]) == 0
    shown = capsys.readouterr().out
    table = tomllib.loads(shown)["hypervisor"]["qemu"]
    assert table["kernel_params"] == 'a="b" \\ c'
    (tmp_path / "again.toml").write_text(shown.replace('entropy_source = "/dev/urandom"\n', ""))
    assert main(["config", "show", str(tmp_path / "again.toml")]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == shown.splitlines()[1:]


def test_env_gathers_without_a_configuration_and_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert sorted(facts) == ["config", "guest", "host", "programs", "shim"]
    assert facts["host"]["kernel"] == os.uname().release
    assert "there is no configuration file" in facts["config"]["problem"]
    assert main(["env"]) == 0
    assert f"  kernel: {os.uname().release}\n" in capsys.readouterr().out


def test_env_shows_the_guests_manifest(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_text("x")
    (tmp_path / "manifest.json").write_text('{"inputs": "abc"}')
    path = tmp_path / "c.toml"
    path.write_text(f'[hypervisor.qemu]\nkernel = "{tmp_path}/vmlinux"\n')
    facts = environment.gather(str(path))
    assert facts["config"] == {
        "path": str(path),
        "files": [str(path)],
        "hypervisor": "qemu",
        "agent": "kata",
        "keys_without_effect": [],
        "problem": "",
    }
    assert facts["guest"]["manifest"] == {"inputs": "abc"}


def test_a_program_that_hangs_or_is_missing_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "VERSION_TIMEOUT", 0.05)
    assert environment.first_line(["sleep", "60"]) == ""
    assert environment.first_line(["/no/such/program"]) == ""
    monkeypatch.setattr(environment, "VERSION_TIMEOUT", 10.0)
    assert environment.first_line(["sh", "-c", "echo; echo one >&2; echo two"]) == "one"


def test_a_reader_that_leaves_early_is_no_traceback(tmp_path: Path) -> None:
    lines = [{"phase": f"p{n}", "start": n / 100, "end": n / 100, "id": "x"} for n in range(4000)]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "ctl", "trace", str(path)],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")
