"""A file of Kata 3 loads, and `kata-ctl config check` tells what of it Kata 4 calls otherwise, or has not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctl.configuration import check

FILES = Path(__file__).parents[2] / "data" / "kata"
OLD = """
[hypervisor.cloud-hypervisor]
path = "{program}"
kernel = "{program}"
image = "{program}"
shared_fs = "none"
seccompsandbox = ""
file_mem_backend = ""
valid_file_mem_backends = [""]
msize_9p = 8192
hotplug_vfio_on_root_bus = false
measurement_algo = "sha384"
[agent.kata]
dial_timeout = 45
cdh_api_timeout = 50
[runtime]
hypervisor_name = "cloud-hypervisor"
disable_guest_empty_dir = false
create_container_timeout = 60
[factory]
enable_template = false
"""


def _write(tmp_path: Path, text: str) -> str:
    program = tmp_path / "program"
    program.write_text("")
    program.chmod(0o755)
    path = tmp_path / "configuration.toml"
    path.write_text(text.replace("{program}", str(program)))
    return str(path)


def test_what_kata_calls_otherwise_is_told_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write(tmp_path, OLD)
    assert check(path) == 0
    said = capsys.readouterr().out
    for line, words in (
        (2, "[hypervisor.cloud-hypervisor] is [hypervisor.clh] since (Kata 4)"),
        (7, "[hypervisor.cloud-hypervisor] seccompsandbox is seccomp_sandbox since"),
        (8, "file_mem_backend is gone since"),
        (10, "msize_9p is gone since, with 9p"),
        (11, "hotplug_vfio_on_root_bus is gone since; hot_plug_vfio says"),
        (12, "measurement_algo is gone since"),
        (14, "[agent.kata] dial_timeout is dial_timeout_ms since"),
        (15, "[agent.kata] cdh_api_timeout is cdh_api_timeout_ms since"),
        (18, "[runtime] disable_guest_empty_dir is emptydir_mode since"),
        (19, "[runtime] create_container_timeout is in [agent.NAME] since"),
        (20, "[factory] is [hypervisor.NAME.factory] since"),
    ):
        assert any(
            text.startswith(f"note: {path}:{line}: ") and words in text for text in said.splitlines()
        ), words
    assert said.endswith("good, for cloud-hypervisor\n")


def test_of_a_newer_file_nothing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = OLD.replace("cloud-hypervisor]", "clh]").partition("seccompsandbox")[0]
    path = _write(tmp_path, new + '[runtime]\nhypervisor_name = "clh"\nemptydir_mode = "shared-fs"\n')
    assert check(path) == 0
    assert "(Kata 4)" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["configuration-remote.toml", "configuration-remote-go.toml"])
def test_a_remote_hypervisors_keys_too(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Kata 4.1's own file among them: its Rust runtime looks for other names than that has."""
    path = str(FILES / name)
    assert check(path) == 0
    said = capsys.readouterr().out
    line = 4 if "go" in name else 3
    assert (
        f"{path}:{line}: [hypervisor.remote] remote_hypervisor_socket is hypervisor_socket since (Kata 4)"
        in said
    )
    assert "remote_hypervisor_timeout is hypervisor_timeout since (Kata 4)" in said
    assert ("create_container_timeout is in [agent.NAME] since" in said) == ("go" in name)
    assert said.endswith("good, for remote\n")
