"""Whatever annotations a pod brings: unless enabled, they change no argument of the VMM or of virtiofsd.

The configuration, its rules, the plugin and the arguments are the real ones; only nothing is started.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.config import ShareFsConfig
from devices.errors import ConfigError
from devices.share_fs import Flavour, virtiofsd_arguments
from hypervisors.qemu.cmdline import Plan, arguments
from hypervisors.qemu.kvm import Accelerator
from hypervisors.qemu.recipes import Placed
from shim.config import Config, load_config
from shim.config.annotations import PREFIX, known_names
from shim.sandbox.cold_devices import cold_devices, with_agent_params

MARK = "Xevil"
KNOWN = known_names()
CONFIG = "io.katacontainers.config_path"


def command_lines(config: Config) -> list[list[str]]:
    """The argv of QEMU and of virtiofsd in both its versions, as `new_instance` would have them."""
    section = with_agent_params(config, 1029)
    devices = cold_devices(config, section, "/share")
    placed = [
        Placed(device=device, at={"bus": "pcie.0", "addr": f"{slot:#x}"}, fd=9)
        for slot, device in enumerate(devices, 1)
    ]
    plan = Plan(
        sandbox_id="s", section=section, accelerator=Accelerator.TCG, vcpus=1, qmp_fd=3, devices=placed
    )
    lines = [[section.path, *arguments(plan)]]
    for device in devices:
        if isinstance(device, ShareFsConfig):
            lines += [[device.daemon, *virtiofsd_arguments(device, flavour, 4)] for flavour in Flavour]
    return lines


class World:
    """A directory with the files that a configuration names."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.base = directory / "configuration.toml"
        for name in ("qemu", "kernel", "initrd", "image", "virtiofsd", MARK):
            (directory / name).write_bytes(b"x")
            (directory / name).chmod(0o755)

    def write(self, policy: str) -> None:
        names = "\n".join(
            f'{key} = "{self.directory / file}"'
            for key, file in (
                ("path", "qemu"),
                ("kernel", "kernel"),
                ("initrd", "initrd"),
                ("image", "image"),
            )
        )
        self.base.write_text(
            f'[hypervisor.qemu]\n{names}\nvirtio_fs_daemon = "{self.directory}/virtiofsd"\n{policy}\n'
        )

    def load(self, annotations: dict[str, Any]) -> Config:
        return load_config(str(self.base), annotations=annotations)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="kata-annotations-") as directory:
        yield World(Path(directory))


TEXT = st.text(max_size=30)
EVIL = st.sampled_from(
    [
        f"/tmp/{MARK}", f"--{MARK}", f"init=/{MARK}", f"q35,{MARK}=1", f"+{MARK}", f"a b={MARK}",
        f"\n-device {MARK}", f"../{MARK}", "true", "1", "64Mi", MARK,
    ]
)  # fmt: skip
VALUE = st.one_of(TEXT, EVIL, st.integers(), st.none())
NAME = st.one_of(
    st.sampled_from(KNOWN),
    st.sampled_from(["io.katacontainers.config_path", "io.katacontainers.volume"]),
    TEXT.map(PREFIX.__add__),
    TEXT.map((PREFIX + "hypervisor.").__add__),
    TEXT,
)


@given(st.dictionaries(NAME, VALUE, max_size=6))
@settings(max_examples=300, deadline=None)
def test_command_lines_do_not_change_under_annotations_that_are_not_enabled(
    world: World, annotations: dict[str, Any]
) -> None:
    world.write("")
    before = command_lines(world.load({}))
    ours = any(name.startswith(PREFIX) or name == CONFIG for name in annotations)
    try:
        after = command_lines(world.load(annotations))
    except ConfigError:
        assert ours  # who brings none of ours is never refused
    else:
        assert after == before


@given(
    st.sets(st.sampled_from(KNOWN)),
    st.dictionaries(st.sampled_from(KNOWN), VALUE, min_size=1, max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_with_some_enabled_the_others_still_refuse_the_pod(
    world: World, allowed: set[str], annotations: dict[str, Any]
) -> None:
    names = [name.removeprefix(PREFIX).removeprefix("hypervisor.") for name in sorted(allowed)]
    world.write(f"enable_annotations = {names}")
    try:
        config = world.load(annotations)
    except ConfigError:
        return
    assert set(annotations) <= allowed
    assert {PREFIX + name for name in config.annotations} == set(annotations)


@given(st.dictionaries(st.sampled_from(KNOWN), st.one_of(EVIL, TEXT), min_size=1, max_size=4))
@settings(max_examples=300, deadline=None)
def test_with_all_enabled_no_path_argument_or_parameter_comes_from_a_pod(
    world: World, annotations: dict[str, Any]
) -> None:
    """Everything is enabled and nothing is listed: what a pod may still bring are plain values."""
    world.write('enable_annotations = [".*"]')
    annotations = {name: text.replace("/tmp", str(world.directory)) for name, text in annotations.items()}
    before = command_lines(world.load({}))
    try:
        config = world.load(annotations)
    except ConfigError:
        return
    after = command_lines(config)
    assert [line[0] for line in after] == [line[0] for line in before][: len(after)]
    features = annotations.get(PREFIX + "hypervisor.cpu_features", "")
    for line in after:
        for word in line:
            assert MARK not in word or (word.startswith("max,") and features in word)
    assert config.hypervisor.kernel_params == ""
    assert config.hypervisor.virtio_fs_extra_args == ()
    assert config.hypervisor.machine_accelerators == ""
