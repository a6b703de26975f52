"""Which hypervisors exist: plugins by name.

What: `register_hypervisor_plugin`, `get_plugin`, and `load_plugins`, which finds installed plugins by
the entry point group `kata_shim.hypervisors` (design D4).
Why: a package of somebody else's adds a VMM by naming its plugin object in its metadata.
Invariants: reading the metadata of all installed packages costs tens of milliseconds, so a built-in
plugin that is asked for by name is imported directly; entry points are read only for other names
and for listings. A plugin that cannot be imported is reported by name when asked for, and does
not hide the others.
"""

from __future__ import annotations

import importlib
from typing import Any

from devices.errors import BugError, ConfigError
from hypervisors.base import HypervisorPlugin

__all__ = [
    "broken_plugins",
    "get_plugin",
    "load_plugins",
    "names_of",
    "register_built_in",
    "register_hypervisor_plugin",
]

GROUP = "kata_shim.hypervisors"
_BUILT_IN = {
    "clh": "hypervisors.cloud_hypervisor.plugin:plugin",
    "dragonball": "hypervisors.dragonball.plugin:plugin",
    "firecracker": "hypervisors.firecracker.plugin:plugin",
    "qemu": "hypervisors.qemu.plugin:plugin",
    "remote": "hypervisors.remote.plugin:plugin",
}

# Names of one VMM in the files of Kata's two runtimes; the first is the plugin's.
_NAMES = (("firecracker", "fc"), ("clh", "cloud-hypervisor", "ch"))

# What makes an object a plugin; see `HypervisorPlugin`.
_MEMBERS = ("adjust_config", "capabilities", "check", "create", "name", "section", "validate_config")

_plugins: dict[str, HypervisorPlugin[Any]] = {}
_offers: dict[str, str] = {}  # "module:attribute" of plugins that are known by name only
_broken: dict[str, Exception] = {}


def register_hypervisor_plugin(name: str, plugin: HypervisorPlugin[Any]) -> None:
    """Make `plugin` known as `name`. The same again is fine; a second one of that name is a BugError."""
    known = _plugins.setdefault(name, plugin)
    if known is not plugin:
        raise BugError(f"two hypervisor plugins are called {name!r}: {known!r} and {plugin!r}")


def register_built_in() -> None:
    """Make those known that come with the shim; each is imported when it is asked for. Idempotent."""
    for name, value in _BUILT_IN.items():
        _offers.setdefault(name, value)


def names_of(name: str) -> tuple[str, ...]:
    """All names of the VMM that is called `name` in some file; the first is its plugin's."""
    return next((names for names in _NAMES if name in names), (name,))


def get_plugin(name: str) -> HypervisorPlugin[Any]:
    """The plugin called `name`. Raises ConfigError that lists what there is."""
    name = names_of(name)[0]
    if name in _plugins:
        return _plugins[name]
    register_built_in()
    if name in _offers:
        _load(name, _offers[name])
    else:
        load_plugins()
    if name in _plugins:
        return _plugins[name]
    if name in _broken:
        raise ConfigError(
            f'the hypervisor plugin "{name}" cannot be loaded: {_broken[name]}',
            phase="config",
            hint="install the package that provides it again",
        ) from _broken[name]
    import difflib

    known = sorted(load_plugins())
    near = difflib.get_close_matches(name, known, n=1)
    nearest = f'the nearest is "{near[0]}"; ' if near else ""
    raise ConfigError(
        f'there is no hypervisor "{name}"; {nearest}known: {", ".join(known)}',
        phase="config",
        hint="correct [runtime] hypervisor_name, or install the package that provides it",
    )


def load_plugins() -> dict[str, HypervisorPlugin[Any]]:
    """All plugins that can be loaded, by name."""
    from importlib import metadata  # 15 ms with what it imports: not for a built-in plugin

    register_built_in()
    for point in metadata.entry_points(group=GROUP):
        _offers.setdefault(point.name, point.value)
    for name, value in _offers.items():
        _load(name, value)
    return dict(_plugins)


def broken_plugins() -> dict[str, str]:
    """Plugins that are installed and cannot be loaded, with the reason; complete after `load_plugins`."""
    return {name: f"{type(error).__name__}: {error}" for name, error in _broken.items()}


def _load(name: str, value: str) -> None:
    if name in _plugins:
        return
    module, _, attribute = value.partition(":")
    try:
        plugin = getattr(importlib.import_module(module), attribute)
        missing = [member for member in _MEMBERS if not hasattr(plugin, member)]
        if missing:
            raise TypeError(f"{value} is no hypervisor plugin: it lacks {', '.join(missing)}")
        register_hypervisor_plugin(name, plugin)
    except Exception as error:  # noqa: BLE001  (somebody else's code at import time may raise anything)
        _broken[name] = error
