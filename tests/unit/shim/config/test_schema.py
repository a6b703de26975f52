"""The schema promises that a key has one meaning, and that the shipped file says what the code does."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from devices.errors import BugError
from hypervisors.cloud_hypervisor.config import ClhConfig
from hypervisors.config import HypervisorConfig
from hypervisors.dragonball.config import DragonballConfig
from hypervisors.firecracker.config import FirecrackerConfig
from shim.config import Config
from shim.config import load as load_module
from shim.config import rules as rules_module
from shim.config.fill import Table, fill, kind_of_field, kind_of_value
from shim.config.schema import (
    AGENT_INACTIVE,
    HYPERVISOR_ALIASES,
    HYPERVISOR_INACTIVE,
    RUNTIME_INACTIVE,
    AgentConfig,
    AnnotationPolicy,
    RuntimeConfig,
    toml_value,
)

CONFIG = Path(__file__).parents[4] / "config"


@pytest.mark.parametrize(
    ("schema", "inactive"), [(RuntimeConfig, RUNTIME_INACTIVE), (AgentConfig, AGENT_INACTIVE)]
)
def test_a_key_is_a_field_or_without_effect_never_both(schema: Any, inactive: dict[str, Any]) -> None:
    assert not {field.name for field in fields(schema)} & inactive.keys()


def test_an_alias_means_a_known_key_and_is_none_itself() -> None:
    known = HYPERVISOR_INACTIVE.keys() | {field.name for field in fields(HypervisorConfig)}
    assert set(HYPERVISOR_ALIASES.values()) <= known
    assert not HYPERVISOR_ALIASES.keys() & known


@pytest.mark.parametrize("schema", [RuntimeConfig, AgentConfig, HypervisorConfig])
def test_every_field_has_a_kind_that_its_default_agrees_with(schema: Any) -> None:
    for field in fields(schema):
        assert kind_of_value(field.default) == kind_of_field(field), field.name


def test_a_field_of_the_hypervisor_has_the_type_that_kata_gives_the_key() -> None:
    for field in fields(HypervisorConfig):
        if field.name in HYPERVISOR_INACTIVE:
            assert kind_of_value(HYPERVISOR_INACTIVE[field.name]) == kind_of_field(field), field.name


def test_annotations_may_be_types_or_their_names() -> None:
    @dataclass(frozen=True)
    class Odd:
        good: tuple[str,...] = ()  # fmt: skip
        bad: dict[str, int] | None = None

    good, bad = fields(Odd)
    assert kind_of_field(good) == "strings"
    good.type = tuple[str, ...]
    assert kind_of_field(good) == "strings"
    with pytest.raises(BugError, match="bad"):
        kind_of_field(bad)


def test_fill_without_a_schema_knows_only_keys_without_effect() -> None:
    table = Table("t", {"a": True, "b": 1}, lambda _: ("f", 3))
    arguments, inactive, problems = fill(table, None, inactive={"a": False})
    assert arguments == {}
    assert [(each.key, each.value, each.behaviour, each.harmless) for each in inactive] == [
        ("a", True, False, False)
    ]
    assert problems == ['f:3: [t] has no key "b"; no known key is like it']


def test_values_are_shown_as_toml() -> None:
    for value in (True, 7, 1.5, 'a "b" \\ c', ["x", 1], ()):
        shown = tomllib.loads(f"v = {toml_value(value)}")["v"]
        assert shown == (list(value) if isinstance(value, tuple) else value)
    assert toml_value({"a": 1}) == "{...}"


# --- the shipped file


class ShippedPlugin:
    """A real schema without the host's facts, so that the test needs no VMM."""

    def __init__(self, section: type[Any]) -> None:
        self.section = section

    def adjust_config(self, section: Any) -> Any:
        return section

    def validate_config(self, section: Any) -> None:
        pass


def load_shipped(monkeypatch: pytest.MonkeyPatch, name: str, section: type[Any]) -> Config:
    monkeypatch.setattr(rules_module, "PATH_KEYS", {})
    return load_module.load_config(str(CONFIG / name), get_plugin=lambda _: ShippedPlugin(section))  # type: ignore[arg-type, return-value]


def test_the_shipped_file_loads_and_nothing_in_it_is_without_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_shipped(monkeypatch, "configuration-qemu.toml", HypervisorConfig)
    assert config.inactive == ()
    assert config.agent.boot_deadline == 60.0
    assert (config.agent.home_call, config.runtime.use_passfd_io) == (True, True)
    assert config.hypervisor.default_memory == 256


def test_the_one_for_firecracker_does_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_shipped(monkeypatch, "configuration-fc.toml", FirecrackerConfig)
    assert config.inactive == ()
    assert config.hypervisor_name == "firecracker"
    assert config.hypervisor.default_memory == 256


def test_the_one_for_cloud_hypervisor_does_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_shipped(monkeypatch, "configuration-clh.toml", ClhConfig)
    assert config.inactive == ()
    assert config.hypervisor_name == "clh"
    assert config.hypervisor.default_memory == 256


def test_the_one_for_dragonball_does_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_shipped(monkeypatch, "configuration-dragonball.toml", DragonballConfig)
    assert config.inactive == ()
    assert config.hypervisor_name == "dragonball"
    assert config.hypervisor.default_memory == 256


SHIPPED = pytest.mark.parametrize(
    ("file", "section", "schema"),
    [
        ("configuration-qemu.toml", "qemu", HypervisorConfig),
        ("configuration-fc.toml", "firecracker", FirecrackerConfig),
        ("configuration-clh.toml", "clh", ClhConfig),
        ("configuration-dragonball.toml", "dragonball", DragonballConfig),
    ],
)


@SHIPPED
def test_what_a_shipped_file_shows_commented_out_is_the_default(
    file: str, section: str, schema: type[Any]
) -> None:
    shipped = (CONFIG / file).read_text()
    opened = tomllib.loads(re.sub(r"^#(?=\w+ = )", "", shipped, flags=re.MULTILINE))
    places = {"path", "virtio_fs_daemon", "vsock_daemon"}  # found by looking at the host: "" is the default
    told: set[tuple[str, ...]] = set()
    everything: set[tuple[str, ...]] = set()
    for name, keys in (
        (("runtime",), RuntimeConfig),
        (("agent", "kata"), AgentConfig),
        (("hypervisor", section), schema),
        (("hypervisor", section), AnnotationPolicy),
    ):
        table, plain = opened, tomllib.loads(shipped)
        for part in name:
            table, plain = table[part], plain[part]
        defaults = {field.name: field.default for field in fields(keys)}
        told |= {(*name, key) for key in table if key in defaults}
        everything |= {(*name, key) for key in table}
        for key in table.keys() & defaults.keys():
            if key not in plain and key not in places:
                value = tuple(table[key]) if isinstance(table[key], list) else table[key]
                assert value == defaults[key], (name, key)
    assert told == everything


@SHIPPED
def test_every_key_that_has_an_effect_is_explained_in_the_shipped_file(
    file: str, section: str, schema: type[Any]
) -> None:
    """What all files have in common is explained in QEMU's."""
    text = (CONFIG / file).read_text()
    common = (RuntimeConfig, AgentConfig, AnnotationPolicy) if section == "qemu" else ()
    for keys in (*common, schema):
        for field in fields(keys):
            if (keys, field.name) != (AgentConfig, "name"):  # that is the section's
                assert re.search(rf"^#?{field.name} = ", text, re.MULTILINE), field.name
