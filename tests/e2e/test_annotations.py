"""Annotations as containerd passes them: those enabled change the VM, any other refuses the container."""

from __future__ import annotations

from pathlib import Path

import pytest

from testing.containerd import Containerd
from testing.guest import write_configuration

BUSYBOX = "local/busybox:1"
HYPERVISOR = "io.katacontainers.config.hypervisor."

pytestmark = pytest.mark.kata_only


@pytest.fixture
def configuration(containerd: Containerd, tmp_path: Path) -> Path:
    """A configuration that enables one annotation; named by ConfigPath, so that others are not affected."""
    path = tmp_path / "configuration-open.toml"
    write_configuration(path)
    text = path.read_text()
    path.write_text(
        text.replace("[hypervisor.qemu]", '[hypervisor.qemu]\nenable_annotations = ["default_vcpus"]')
    )
    return path


def test_an_enabled_annotation_changes_the_vm(containerd: Containerd, configuration: Path) -> None:
    options = ["--runtime-config-path", str(configuration), "--annotation", HYPERVISOR + "default_vcpus=2"]
    done = containerd.run(BUSYBOX, "nproc", options=options)
    assert done.text == "2"


def test_any_other_refuses_the_container_before_a_vm_is_started(
    containerd: Containerd, configuration: Path
) -> None:
    options = ["--runtime-config-path", str(configuration), "--annotation", HYPERVISOR + "kernel=/tmp/evil"]
    done = containerd.run(BUSYBOX, "true", options=options, check=False)
    assert done.code != 0
    assert f"annotation {HYPERVISOR}kernel is not enabled" in done.error
    assert f"({configuration}:2)" in done.error
    assert 'the administrator can add "kernel" to it' in done.error
