"""What decides about a VM or its guest makes another class of template, and nothing else does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from devices.config import PortConfig, ShareFsConfig, VsockConfig
from hypervisors.qemu.plugin import plugin
from shim.config import Config, load_config
from shim.factory.template_class import template_class

FILES = ("path", "kernel", "initrd", "image", "firmware")


@pytest.fixture(autouse=True)
def files(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).write_text(name)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def config(files: Path, section: str = "", runtime: str = "", **annotations: str) -> Config:
    named = "\n".join(f'{name} = "{files}/{name}"' for name in FILES)
    path = files / "c.toml"
    path.write_text(
        f'[hypervisor.qemu]\nshared_fs = "none"\nenable_annotations = [".*"]\n{named}\n{section}\n'
        f"[hypervisor.qemu.factory]\nenable_template = true\n[runtime]\n{runtime}\n"
    )
    return load_config(str(path), env={}, annotations=annotations, get_plugin=lambda _: plugin)


def digest(files: Path, section: str = "", runtime: str = "") -> str:
    return template_class(config(files, section, runtime)).digest


def test_it_is_the_same_for_the_same(files: Path) -> None:
    assert digest(files) == digest(files)
    assert digest(files) == digest(files, runtime='log_level = "debug"'), "the shim's, not the VM's"


@pytest.mark.parametrize(
    "section",
    [
        "default_vcpus = 2",
        "default_memory = 512",
        "default_maxmemory = 4096",
        'kernel_params = "quiet"',
        'cpu_features = "-avx"',
        "default_bridges = 2",
        "pcie_root_port = 1",
        'accelerator = "tcg"',
        "enable_debug = true",
        'machine_accelerators = "hpet=off"',
        "disable_seccomp = true",
    ],
)
def test_a_key_of_the_vms_makes_another(files: Path, section: str) -> None:
    assert digest(files) != digest(files, section)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_changes_makes_another(files: Path, name: str) -> None:
    """Its content at the same size, or another file in its place; a new time is enough."""
    before = digest(files)
    os.utime(files / name, ns=(1, 1))
    touched = digest(files)
    (files / "new").write_text(name)
    (files / "new").chmod(0o755)
    os.utime(files / "new", ns=(1, 1))
    os.replace(files / "new", files / name)
    assert len({before, touched, digest(files)}) == 3


def test_kvm_and_our_own_code_make_another(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, kvm = digest(files), os.access("/dev/kvm", os.R_OK | os.W_OK)
    monkeypatch.setattr(os, "access", lambda path, _mode: (not kvm) if path == "/dev/kvm" else True)
    other = digest(files)
    monkeypatch.setattr("shim.factory.template_class._FORMAT", 0)
    assert len({before, other, digest(files)}) == 3


def test_its_devices_are_those_of_a_vm_that_boots_with_a_port_for_vsock(files: Path) -> None:
    devices = template_class(config(files)).devices
    assert [type(device) for device in devices].count(PortConfig) == 1
    assert not any(isinstance(device, VsockConfig | ShareFsConfig) for device in devices)


def test_a_file_that_is_not_there_is_told(files: Path) -> None:
    loaded = config(files)
    (files / "image").unlink()
    with pytest.raises(OSError, match="image"):
        template_class(loaded)
