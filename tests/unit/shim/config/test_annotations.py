"""Annotations promise: a pod changes what the administrator enabled and listed, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import pytest

from devices.errors import ConfigError
from hypervisors.config import HypervisorConfig
from shim.config import Config
from shim.config.annotations import AGENT, HYPERVISOR, PREFIX, RUNTIME, known_names, listed_path
from shim.config.fill import known_keys
from shim.config.schema import (
    AGENT_INACTIVE,
    HYPERVISOR_INACTIVE,
    RUNTIME_INACTIVE,
    AgentConfig,
    AnnotationPolicy,
    RuntimeConfig,
)

if TYPE_CHECKING:
    from tests.unit.shim.config.conftest import Files

BASE = '[runtime]\nhypervisor_name = "qemu"\n[hypervisor.qemu]\n'


@dataclass(frozen=True, slots=True)
class Real:
    """Every key of the schema that QEMU uses, without its rules."""

    name = "qemu"
    section = HypervisorConfig

    def adjust_config(self, section: Any) -> Any:
        return section

    def validate_config(self, section: Any) -> None:
        pass


@pytest.fixture
def load(files: Files) -> Callable[..., Config]:
    """`load(name, value, policy)`: a file that says `policy` of annotations, and one annotation."""
    files.plugin = Real()  # type: ignore[assignment]

    def do(name: str, value: str, policy: str = "", **more: str) -> Config:
        return files.load(BASE + policy + "\n", annotations={PREFIX + name: value, **more})

    return do


def enabled(*names: str) -> str:
    return "enable_annotations = [" + ", ".join(f"'{name}'" for name in names) + "]"


def refused(load: Callable[..., Config], *arguments: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(*arguments)
    assert caught.value.phase == "config"
    assert caught.value.hint
    return caught.value


# --- who may


@pytest.mark.parametrize("full", known_names())
def test_nothing_is_enabled_unless_the_file_says_so(load: Callable[..., Config], full: str) -> None:
    short = full.removeprefix(PREFIX)
    error = refused(load, short, "1")
    name = short.removeprefix("hypervisor.")
    assert "is not enabled: no pattern of enable_annotations" in error.cause
    assert f'matches "{name}"' in error.cause
    assert f'add "{name}"' in error.hint


def test_the_refusal_names_file_and_line_of_the_list(load: Callable[..., Config], files: Files) -> None:
    error = refused(load, "hypervisor.default_vcpus", "2", 'kernel_params = ""\n' + enabled("x"))
    assert f"({files.base}:5)" in error.cause


@pytest.mark.parametrize(
    ("pattern", "name", "may"),
    [
        ("default_vcpus", "default_vcpus", True),
        ("default_.*", "default_memory", True),
        ("default", "default_vcpus", False),
        ("path", "jailer_path", False),
        ("kernel", "kernel_params", False),
        (".*", "default_vcpus", True),
    ],
)
def test_a_pattern_matches_whole_names(
    load: Callable[..., Config], pattern: str, name: str, may: bool
) -> None:
    if may:
        load("hypervisor." + name, "7", enabled(pattern))
    else:
        assert "is not enabled" in refused(load, "hypervisor." + name, "7", enabled(pattern)).cause


def test_those_of_agent_and_runtime_are_enabled_with_their_group(load: Callable[..., Config]) -> None:
    assert "is not enabled" in refused(load, "agent.enable_tracing", "true", enabled("enable_tracing")).cause
    config = load("runtime.disable_guest_seccomp", "true", enabled(r"runtime\.disable_.*"))
    assert config.runtime.disable_guest_seccomp is True
    assert config.annotations == ("runtime.disable_guest_seccomp",)


def test_an_unknown_name_refuses_the_pod_and_is_not_asked_for(load: Callable[..., Config]) -> None:
    error = refused(load, "hypervisor.default_vcpu", "2", enabled(".*"))
    assert error.cause == (
        f"annotation {PREFIX}hypervisor.default_vcpu is not known; the nearest is "
        f'"{PREFIX}hypervisor.default_vcpus"'
    )
    refused(load, "default_vcpus", "2", enabled(".*"))
    refused(load, "hypervisor." + "x" * 100000, "2", enabled(".*"))


def test_other_annotations_are_nobodys_business_here(files: Files) -> None:
    files.plugin = Real()  # type: ignore[assignment]
    plain = files.load(BASE)
    assert plain == files.load(annotations={"io.katacontainers.pkg.oci.container_type": "x", "a": 1})


def test_a_pattern_that_is_none_is_told_with_its_line(files: Files) -> None:
    with pytest.raises(ConfigError) as caught:
        files.load(BASE + 'enable_annotations = ["("]\n')
    assert caught.value.cause.startswith(
        f'{files.base}:4: [hypervisor.qemu] enable_annotations has "(", which'
    )


# --- what they mean


@pytest.mark.parametrize(
    ("name", "text", "key", "value"),
    [
        ("default_vcpus", "2", "default_vcpus", 2.0),
        ("default_vcpus", "1.5", "default_vcpus", 1.5),
        ("default_max_vcpus", "4", "default_maxvcpus", 4),
        ("default_memory", "512", "default_memory", 512),
        ("default_memory", "512Mi", "default_memory", 512),
        ("default_memory", "2GiB", "default_memory", 2048),
        ("default_memory", "1000M", "default_memory", 954),
        ("default_memory", "1Ki", "default_memory", 1),
        ("memory_slots", "3", "memory_slots", 3),
        ("machine_type", "microvm", "machine_type", "microvm"),
        ("shared_fs", "none", "shared_fs", "none"),
        ("cpu_features", "+avx,-pmu", "cpu_features", "+avx,-pmu"),
        ("pcie_root_port", "2", "pcie_root_port", 2),
    ],
)
def test_values_are_read_by_type(
    load: Callable[..., Config], name: str, text: str, key: str, value: Any
) -> None:
    config = load("hypervisor." + name, text, enabled(name))
    assert getattr(config.hypervisor, key) == value
    assert type(getattr(config.hypervisor, key)) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("default_vcpus", "nan", "a number"),
        ("default_vcpus", "-1", "a number"),
        ("default_vcpus", "1e9", "a number"),
        ("default_vcpus", "", "a number"),
        ("memory_slots", "1.5", "a whole number"),
        ("memory_slots", "٣", "a whole number"),
        ("default_memory", "12 apples", "a size in MiB"),
        ("enable_iommu", "yes", '"true" or "false"'),
        ("machine_type", "q35,accel=kvm", "one plain word"),
        ("machine_type", "q35\n", "one plain word"),
        ("cpu_features", "host,+x", "features with their signs"),
        ("cpu_features", "+x,-y,model=evil", "features with their signs"),
        ("cc_init_data", "a b", "base64"),
    ],
)
def test_a_value_of_another_type_refuses_the_pod(
    load: Callable[..., Config], name: str, text: str, wanted: str
) -> None:
    error = refused(load, "hypervisor." + name, text, enabled(".*"))
    assert error.cause.startswith(f"annotation {PREFIX}hypervisor.{name} must be {wanted}")


def test_a_long_value_is_refused_and_a_wrong_one_is_told_in_short(load: Callable[..., Config]) -> None:
    assert "at most 65536 characters" in refused(load, "hypervisor.cc_init_data", "A" * 65537).cause
    assert len(refused(load, "hypervisor.machine_type", "!" * 9999, enabled(".*")).cause) < 300


def test_hashes_and_host_mounts_are_never_taken(load: Callable[..., Config]) -> None:
    for name in ("hypervisor.kernel_hash", "runtime.sandbox_bind_mounts", "runtime.shared_mounts"):
        assert refused(load, name, "x", enabled(".*")).cause.endswith("is not supported")


@pytest.mark.parametrize("name", ["hypervisor.rootless", "runtime.sandbox_cgroup_only"])
@pytest.mark.parametrize("value", ["true", "false"])
def test_what_confines_is_nobodys_to_ask_for(load: Callable[..., Config], name: str, value: str) -> None:
    """Whatever is enabled; the other keys that do are not annotations at all."""
    error = refused(load, name, value, "enable_annotations = ['.*']")
    assert "is not supported" in error.cause
    for unknown in ("disable_seccomp", "seccomp_sandbox", "rootless_users", "rootless_user"):
        assert (
            "is not known"
            in refused(load, f"hypervisor.{unknown}", value, "enable_annotations = ['.*']").cause
        )


def test_a_key_without_effect_is_listed_and_changes_nothing(load: Callable[..., Config]) -> None:
    config = load("hypervisor.enable_iommu_platform", "true", enabled("enable_iommu_platform"))
    (note,) = config.inactive
    assert str(note).startswith(
        f"annotation {PREFIX}hypervisor.enable_iommu_platform: [hypervisor.qemu] enable_iommu_platform = true"
    )
    assert not note.harmless


def test_the_create_timeout_of_the_pod_wins(load: Callable[..., Config]) -> None:
    config = load("runtime.create_container_timeout", "77", enabled(r"runtime\..*"))
    assert config.agent.create_container_timeout == 77.0


# --- what is listed


@pytest.mark.parametrize(
    ("path", "pattern", "listed"),
    [
        ("/usr/bin/qemu", "/usr/bin/qemu", True),
        ("/usr/bin/qemu-7", "/usr/bin/qemu-?", True),
        ("/usr/bin/qemu/evil", "/usr/bin/qemu*", False),
        ("/usr/bin/../../tmp/qemu", "/usr/bin/*", False),
        ("/usr/bin/../qemu", "/usr/*/*/qemu", False),
        ("//usr/bin/qemu", "//usr/bin/qemu", False),
        ("/usr//bin", "/usr//bin", False),
        ("/usr/bin/", "/usr/bin/", False),
        ("usr/bin/qemu", "usr/bin/qemu", False),
        ("/usr/bin/q\0", "/usr/bin/*", False),
        ("/opt/v1/vmlinux", "/opt/*/vmlinux", True),
    ],
)
def test_paths_match_component_by_component(path: str, pattern: str, listed: bool) -> None:
    assert listed_path(path, (pattern,)) is listed
    assert not listed_path(path, ())


@pytest.mark.parametrize("name", [name for name, rule in HYPERVISOR.items() if rule.reads == "path"])
def test_an_enabled_path_must_be_listed_too(
    load: Callable[..., Config], files: Files, name: str, make_file: Callable[[str], str]
) -> None:
    path, list_key = make_file("program"), HYPERVISOR[name].listed_by
    error = refused(load, "hypervisor." + name, path, enabled(".*"))
    assert f"must be a path that {list_key} lists" in error.cause
    assert f"[hypervisor.qemu] {list_key}" in error.hint
    config = load("hypervisor." + name, path, enabled(".*") + f'\n{list_key} = ["{files.directory}/*"]')
    key = HYPERVISOR[name].key or name
    values = {each.key: each.value for each in config.inactive}
    assert values.get(key, getattr(config.hypervisor, key, None)) == path


def test_a_listed_path_that_is_not_there_is_told(load: Callable[..., Config]) -> None:
    error = refused(
        load, "hypervisor.kernel", "/no/kernel", enabled("kernel") + '\nvalid_guest_paths = ["/no/*"]'
    )
    assert 'must be a path that exists, not "/no/kernel"' in error.cause


def test_kernel_parameters_replace_those_of_their_name(load: Callable[..., Config]) -> None:
    policy = (
        enabled("kernel_params")
        + '\nkernel_params = "a=1 quiet b"\nvalid_kernel_params = ["a=?", "agent.log=*"]\n'
    )
    config = load("hypervisor.kernel_params", "a=2 agent.log=debug", policy)
    assert config.hypervisor.kernel_params == "quiet b a=2 agent.log=debug"
    for evil in ("init=/bin/sh", "a=22", "a=2 b", 'agent.log="x', "a=\x07", "agent.log=x\x00"):
        refused(load, "hypervisor.kernel_params", evil, policy)


def test_arguments_of_virtiofsd_are_appended(load: Callable[..., Config]) -> None:
    policy = (
        enabled("virtio_fs_extra_args")
        + '\nvirtio_fs_extra_args = ["-d"]\nvalid_virtio_fs_extra_args = ["--thread-pool-size=?"]\n'
    )
    config = load("hypervisor.virtio_fs_extra_args", "--thread-pool-size=4", policy)
    assert config.hypervisor.virtio_fs_extra_args == ("-d", "--thread-pool-size=4")
    refused(load, "hypervisor.virtio_fs_extra_args", "--thread-pool-size=4,--shared-dir=/", policy)


def test_options_of_the_machine_are_listed_each(load: Callable[..., Config]) -> None:
    policy = enabled("machine_accelerators") + '\nvalid_machine_accelerators = ["nvdimm=*"]\n'
    config = load("hypervisor.machine_accelerators", "nvdimm=off", policy)
    assert config.hypervisor.machine_accelerators == "nvdimm=off"
    refused(load, "hypervisor.machine_accelerators", "nvdimm=off,memory-backend=x", policy)


# --- sections and files


def test_another_section_may_be_chosen_if_the_first_says_so(files: Files) -> None:
    files.plugin = Real()  # type: ignore[assignment]
    text = (
        '[runtime]\nhypervisor_name = "a"\n[hypervisor.a]\nenable_annotations = ["runtime.hypervisor_name"]\n'
        "[hypervisor.b]\ndefault_memory = 99\n"
    )
    asked = {PREFIX + "runtime.hypervisor_name": "b"}
    config = files.load(text, annotations=asked)
    assert (config.hypervisor_name, config.hypervisor.default_memory) == ("b", 99)
    with pytest.raises(ConfigError, match=r"names no \[hypervisor"):
        files.load(annotations={PREFIX + "runtime.hypervisor_name": "c"})
    with pytest.raises(ConfigError, match="is not enabled"):
        files.load(text.replace("runtime.", ""), annotations=asked)
    # What it may change there is for its own section to say.
    with pytest.raises(ConfigError, match="is not enabled"):
        files.load(text, annotations={**asked, PREFIX + "hypervisor.default_vcpus": "1"})


def test_another_file_must_be_listed(files: Files) -> None:
    files.plugin = Real()  # type: ignore[assignment]
    files.write("[hypervisor.qemu]\n")
    other = files.write("[hypervisor.qemu]\ndefault_memory = 9\n", "other.toml")
    asked = {"io.katacontainers.config_path": str(other)}
    with pytest.raises(ConfigError, match=r"a file that \[runtime\] valid_config_paths") as caught:
        files.load(annotations=asked)
    assert "valid_config_paths" in str(caught.value)
    files.write(f'[runtime]\nvalid_config_paths = ["{files.directory}/*.toml"]\n[hypervisor.qemu]\n')
    config = files.load(annotations=asked)
    assert (config.path, config.hypervisor.default_memory) == (str(other), 9)
    with pytest.raises(ConfigError, match="does not exist"):
        files.load(annotations={"io.katacontainers.config_path": f"{files.directory}/none.toml"})


# --- the tables


def test_every_annotation_changes_a_key_that_exists_and_names_a_list_that_exists() -> None:
    lists = {field.name for field in fields(AnnotationPolicy)}
    for rules, schema, inactive in (
        (HYPERVISOR, HypervisorConfig, HYPERVISOR_INACTIVE),
        (AGENT, AgentConfig, AGENT_INACTIVE),
        (RUNTIME, RuntimeConfig, {**RUNTIME_INACTIVE, "create_container_timeout": 0.0}),
    ):
        known = known_keys(schema, inactive)
        for name, rule in rules.items():
            if rule.reads != "never":
                assert (rule.key or name) in known, name
            assert not rule.listed_by or rule.listed_by in lists, name
            if known.get(rule.key or name) == "strings":
                assert rule.reads in ("append", "lines", "csv", "never"), name


def test_every_list_is_used() -> None:
    used = {rule.listed_by for rules in (HYPERVISOR, AGENT, RUNTIME) for rule in rules.values()}
    assert used - {""} == {field.name for field in fields(AnnotationPolicy)} - {"enable_annotations"}


# --- what the plugin says


def test_what_the_plugin_refuses_is_told_with_the_annotation(files: Files) -> None:
    """The file is right; the line of it would send the reader to the wrong place."""

    class Strict(Real):
        def validate_config(self, section: Any) -> None:
            if section.default_memory < 64:
                raise ConfigError("[hypervisor.qemu] default_memory is too small", key="default_memory")

    files.plugin = Strict()  # type: ignore[assignment]
    text = BASE + "default_memory = 128\n" + enabled("default_memory") + "\n"
    with pytest.raises(ConfigError) as caught:
        files.load(text, annotations={PREFIX + "hypervisor.default_memory": "32"})
    assert caught.value.cause == (
        f"annotation {PREFIX}hypervisor.default_memory: [hypervisor.qemu] default_memory is too small"
    )
    assert caught.value.hint == "correct the annotation"
    with pytest.raises(ConfigError) as caught:
        files.load(text.replace("128", "32"))
    assert caught.value.cause.startswith(f"{files.base}:4: [hypervisor.qemu] default_memory")
