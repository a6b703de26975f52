"""`kata-ctl config set` changes the one key, keeps all else, and never writes what would not load."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from ctl.main import main

TEXT = """\
# Ours. Ask Ada before changing.
[runtime]
hypervisor_name = "qemu"   # the only one

[hypervisor.qemu]
path = "@DIR@/qemu"
kernel = "@DIR@/vmlinux"
image = "@DIR@/rootfs.img"
# Enough for a small pod.
default_memory = 256  # MiB
virtio_fs_extra_args = [
    "-d", # verbose
]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for name in ("qemu", "vmlinux", "rootfs.img"):
        (tmp_path / name).touch(mode=0o755)
    path = tmp_path / "configuration.toml"
    path.write_text(TEXT.replace("@DIR@", str(tmp_path)))
    path.chmod(0o640)
    return path


def change(file: Path, key: str, value: str, *more: str) -> int:
    return main(["config", "set", key, value, "--file", str(file), *more])


def test_only_the_value_changes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = file.read_text()
    assert change(file, "hypervisor.qemu.default_memory", "512") == 0
    assert file.read_text() == before.replace("default_memory = 256  # MiB", "default_memory = 512  # MiB")
    assert file.stat().st_mode & 0o777 == 0o640
    assert capsys.readouterr().out == f"{file}: hypervisor.qemu.default_memory = 512\n"
    assert os.listdir(file.parent).count("configuration.toml") == 1
    assert not [name for name in os.listdir(file.parent) if name.endswith(".new")]


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("hypervisor.qemu.kernel_params", "quiet nosmt", "quiet nosmt"),
        ("hypervisor.qemu.kernel_params", '"a=1"', "a=1"),
        ("hypervisor.qemu.enable_debug", "true", True),
        ("hypervisor.qemu.default_vcpus", "1.5", 1.5),
        ("hypervisor.qemu.enable_annotations", '["default_vcpus"]', ["default_vcpus"]),
        ("agent.kata.reconnect_timeout_ms", "60000", 60000),
        ("runtime.log_level", "warn", "warn"),
    ],
)
def test_values_are_toml_or_text_and_sections_are_made(
    file: Path, key: str, value: str, meant: object
) -> None:
    assert change(file, key, value) == 0
    table = tomllib.loads(file.read_text())
    for name in key.split("."):
        table = table[name]
    assert table == meant
    assert file.read_text().startswith("# Ours. Ask Ada before changing.\n")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hypervisor.qemu.default_memry", "512", 'the nearest is "default_memory"'),
        ("hypervisor.qemu.default_memory", "lots", "must be an integer"),
        ("hypervisor.qemu.default_memory", "1", "is less than 64 MiB"),
        ("hypervisor.qemu.kernel", "/no/such", "does not exist"),
        ("runtime.hypervisor_name", "qemuu", "there is no hypervisor"),
        ("runtime.name.deeper", "1", "[runtime] name must be a string"),
        ("default_memory", "1", "is no key"),
        ("runtime..x", "1", "is no key"),
    ],
)
def test_what_would_not_load_is_not_written(
    file: Path, capsys: pytest.CaptureFixture[str], key: str, value: str, words: str
) -> None:
    before = file.read_bytes(), file.stat().st_ino
    assert change(file, key, value) == 1
    assert (file.read_bytes(), file.stat().st_ino) == before
    assert words in capsys.readouterr().err


def test_a_drop_in_that_comes_later_is_told(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drop_in = file.parent / "config.d" / "50-more.toml"
    drop_in.parent.mkdir()
    drop_in.write_text("[hypervisor.qemu]\ndefault_memory = 300\n")
    before = file.read_text()
    assert change(file, "hypervisor.qemu.default_memory", "512") == 1
    assert file.read_text() == before
    assert "--drop-in 50-more.toml" in capsys.readouterr().err
    assert change(file, "hypervisor.qemu.default_memory", "512", "--drop-in", "50-more") == 0
    assert drop_in.read_text() == "[hypervisor.qemu]\ndefault_memory = 512\n"
    assert file.read_text() == before


def test_a_new_drop_in_is_made(file: Path) -> None:
    before = file.read_text()
    assert change(file, "hypervisor.qemu.default_memory", "512", "--drop-in", "10-a") == 0
    assert tomllib.loads((file.parent / "config.d" / "10-a.toml").read_text()) == {
        "hypervisor": {"qemu": {"default_memory": 512}}
    }
    assert file.read_text() == before
    for evil in ("../x", "/etc/x", ".hidden"):
        assert change(file, "hypervisor.qemu.default_memory", "512", "--drop-in", evil) == 1


def test_a_link_stays_a_link_and_nothing_new_is_no_write(file: Path) -> None:
    link = file.parent / "link.toml"
    link.symlink_to(file)
    inode = file.stat().st_ino
    assert change(link, "hypervisor.qemu.default_memory", "256") == 0
    assert file.stat().st_ino == inode
    assert change(link, "hypervisor.qemu.default_memory", "128") == 0
    assert link.is_symlink()
    assert "default_memory = 128  # MiB" in file.read_text()


def test_a_secret_is_not_repeated(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert change(file, "runtime.jaeger_password", "hunter2") == 0
    assert "hunter2" not in "".join(capsys.readouterr())
    assert main(["config", "show", "--written", str(file)]) == 0
    assert "hunter2" not in "".join(capsys.readouterr())


def test_show_tells_where_each_value_comes_from(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--effective", "--origin", str(file)]) == 0
    lines = {line.partition(" = ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["default_memory"] == f"default_memory = 256  # {file}:10"
    assert lines["machine_type"].endswith("# default")
    assert lines["default_maxmemory"].endswith("# chosen for this host and guest")
    assert lines["enable_annotations"] == "enable_annotations = []  # default"
    file.write_text(file.read_text().replace("default_memory = 256", "default_memory = 999999999"))
    assert main(["config", "show", "--origin", str(file)]) == 0
    shown = capsys.readouterr().out
    assert f"# {file}:10 says 999999999\n" in shown


def test_show_written_is_what_the_files_say(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--written", str(file)]) == 0
    shown = tomllib.loads(capsys.readouterr().out)
    assert shown == tomllib.loads(file.read_text())
