"""Plugins are found by name, their own or somebody else's, and a broken one hides no other."""

from __future__ import annotations

import sys
import types
from importlib import metadata
from typing import Any

import pytest

from devices.errors import BugError, ConfigError
from hypervisors import registry
from hypervisors.qemu.plugin import plugin


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_plugins", {})
    monkeypatch.setattr(registry, "_broken", {})
    monkeypatch.setattr(registry, "_offers", {})


def offer(monkeypatch: pytest.MonkeyPatch, *points: metadata.EntryPoint) -> None:
    def entry_points(*, group: str) -> list[metadata.EntryPoint]:
        assert group == "kata_shim.hypervisors"
        return list(points)

    monkeypatch.setattr(metadata, "entry_points", entry_points)


def test_qemu_is_built_in() -> None:
    assert registry.get_plugin("qemu") is plugin
    assert plugin.name == "qemu"


def test_somebody_elses_plugin_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("acme_vmm")
    module.plugin = types.SimpleNamespace(**dict.fromkeys(registry._MEMBERS))
    monkeypatch.setitem(sys.modules, "acme_vmm", module)
    offer(monkeypatch, metadata.EntryPoint("acme", "acme_vmm:plugin", registry.GROUP))

    assert registry.get_plugin("acme") is module.plugin
    assert sorted(registry.load_plugins()) == ["acme", "clh", "dragonball", "firecracker", "qemu", "remote"]


def test_a_broken_plugin_is_named_and_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, metadata.EntryPoint("bad", "no_such_module_here:plugin", registry.GROUP))

    assert sorted(registry.load_plugins()) == ["clh", "dragonball", "firecracker", "qemu", "remote"]
    with pytest.raises(ConfigError, match=r'"bad" cannot be loaded.*no_such_module_here'):
        registry.get_plugin("bad")


def test_an_object_that_is_no_plugin_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("acme_vmm")
    module.plugin = types.SimpleNamespace(name="acme", section=None, create=None, check=None)
    monkeypatch.setitem(sys.modules, "acme_vmm", module)
    offer(monkeypatch, metadata.EntryPoint("acme", "acme_vmm:plugin", registry.GROUP))
    with pytest.raises(ConfigError, match="it lacks adjust_config, capabilities, validate_config"):
        registry.get_plugin("acme")
    assert "it lacks adjust_config" in registry.broken_plugins()["acme"]


def test_an_unknown_name_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch)
    known = 'no hypervisor "qemuu"; the nearest is "qemu"; known: clh, dragonball, firecracker, qemu, remote'
    with pytest.raises(ConfigError, match=known):
        registry.get_plugin("qemuu")


def test_two_plugins_of_one_name_are_a_bug() -> None:
    registry.register_hypervisor_plugin("qemu", plugin)
    registry.register_hypervisor_plugin("qemu", plugin)
    other: Any = object()
    with pytest.raises(BugError, match="two hypervisor plugins"):
        registry.register_hypervisor_plugin("qemu", other)
