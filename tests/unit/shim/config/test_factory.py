"""A configuration whose VMs cannot begin with a template is refused, with the key that is in the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypervisors.firecracker.plugin import plugin as firecracker
from hypervisors.qemu.plugin import plugin as qemu
from shim.config import Config, ConfigFileError, load_config

GOOD = {"shared_fs": '"none"', "default_bridges": "1"}


def load(
    tmp_path: Path,
    section: dict[str, str],
    rest: str = "[hypervisor.qemu.factory]\nenable_template = true\n",
    name: str = "qemu",
) -> Config:
    for each in ("qemu", "kernel", "initrd", "image"):
        file = tmp_path / each
        file.touch()
        file.chmod(0o755)
    files = {key: f'"{tmp_path}/{key}"' for key in ("kernel", "initrd", "image")}
    values = {"path": f'"{tmp_path}/qemu"', **files, **section}
    lines = [f"[hypervisor.{name}]", *(f"{key} = {value}" for key, value in values.items()), rest]
    path = tmp_path / "c.toml"
    path.write_text("\n".join(lines))
    return load_config(str(path), env={}, get_plugin=lambda _: firecracker if name == "fc" else qemu)


def test_either_table_of_katas_switches_it_on(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert (config.factory.enable_template, config.factory.template_path) == (True, "/run/vc/vm/template")
    assert config.inactive == ()
    go = load(tmp_path, GOOD, '[factory]\nenable_template = true\ntemplate_path = "/run/x"\n')
    assert (go.factory.enable_template, go.factory.template_path) == (True, "/run/x")
    both = "[factory]\nenable_template = true\n[hypervisor.qemu.factory]\nenable_template = false\n"
    assert not load(tmp_path, GOOD, both).factory.enable_template, "its own table counts"
    assert not load(tmp_path, {}, "").factory.enable_template


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"shared_fs": '"virtio-fs"'}, 'shared_fs is not "none"'),
        ({"machine_type": '"microvm"'}, "a microvm has no PCI"),
        ({"default_bridges": "0"}, "no port or bridge is configured"),
        ({"cold_plug_vfio": '"root-port"'}, 'cold_plug_vfio is not "no-port"'),
        ({"enable_iommu": "true"}, "enable_iommu"),
        ({"reclaim_guest_freed_memory": "true"}, "reclaim_guest_freed_memory"),
        ({"rootless": "false"}, "rootless is false"),
    ],
)
def test_a_class_that_cannot_is_refused(tmp_path: Path, section: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigFileError) as caught:
        load(tmp_path, {**GOOD, **section})
    (problem,) = caught.value.problems
    assert problem.startswith(f"{tmp_path}/c.toml:")
    assert "[hypervisor.qemu.factory] enable_template = true: its VMs cannot begin with a template" in problem
    assert reason in problem


def test_so_are_a_shim_that_is_replaced_and_a_guest_that_is_not_ours(tmp_path: Path) -> None:
    rest = "[factory]\nenable_template = true\n[runtime]\non_shim_death = 'keep'\n"
    with pytest.raises(ConfigFileError, match=r"\[factory\] enable_template = true: .* on_shim_death"):
        load(tmp_path, GOOD, rest)
    with pytest.raises(ConfigFileError, match="the guest is not ours"):
        load(tmp_path, {**GOOD, "initrd": '""'})
    relative = '[factory]\nenable_template = true\ntemplate_path = "x"\n'
    with pytest.raises(ConfigFileError, match="template_path is no absolute path"):
        load(tmp_path, GOOD, relative)


def test_of_a_vmm_without_templates_it_has_no_effect_and_says_so(tmp_path: Path) -> None:
    rest = "[hypervisor.fc.factory]\nenable_template = true\n"
    config = load(tmp_path, {"jailer_path": '""'}, rest, name="fc")
    assert not config.factory.enable_template
    (inactive,) = [each for each in config.inactive if each.key == "enable_template"]
    assert not inactive.harmless
    assert inactive.section == "hypervisor.fc.factory"


def test_a_table_of_other_keys_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigFileError, match=r"\[hypervisor.qemu.factory\] has no key"):
        load(tmp_path, GOOD, "[hypervisor.qemu.factory]\nenable_templat = true\n")
