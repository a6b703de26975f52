"""Keys of Kata's that its files do not have any more, or not by that name: what became of each.

What: `changes` finds them in what the files of a configuration say; `kata-ctl config check` tells them.
Why: a file of either age loads here; whoever moves on with Kata wants to know which of its keys do not.
Source: the configurations that Kata 3.20 and 4.1.0 ship for all of their VMMs; which keys 4.1.0 reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shim.config import Config

__all__ = ["changes"]

_SECTIONS = {
    ("hypervisor", "cloud-hypervisor"): "is [hypervisor.clh] since",
    ("factory",): "is [hypervisor.NAME.factory] since",
}
_RENAMED = {
    "hypervisor": {
        "seccompsandbox": "is seccomp_sandbox since",
        "file_mem_backend": "is gone since",
        "valid_file_mem_backends": "is gone since",
        "msize_9p": "is gone since, with 9p",
        "hotplug_vfio_on_root_bus": "is gone since; hot_plug_vfio says where devices go",
        "measurement_algo": "is gone since",
        # Kata 4.1's own file has these still, and its Rust runtime does not read them.
        "remote_hypervisor_socket": "is hypervisor_socket since",
        "remote_hypervisor_timeout": "is hypervisor_timeout since",
    },
    "agent": {
        "dial_timeout": "is dial_timeout_ms since, in milliseconds",
        "cdh_api_timeout": "is cdh_api_timeout_ms since, in milliseconds",
    },
    "runtime": {
        "create_container_timeout": "is in [agent.NAME] since",
        "disable_guest_empty_dir": "is emptydir_mode since",
    },
}


def changes(config: Config) -> Iterator[str]:
    """One sentence for each, with its file and line."""
    for name, what in _SECTIONS.items():
        if _at(config.source.values, name):
            yield f"{_place(config, *name)}: [{'.'.join(name)}] {what} (Kata 4)"
    for kind, renamed in _RENAMED.items():
        names = [(kind,), *((kind, name) for name in _at(config.source.values, (kind,)))]
        for name in names:
            table = _at(config.source.values, name)
            for key in (key for key in table if key in renamed and not isinstance(table[key], dict)):
                yield f"{_place(config, *name, key)}: [{'.'.join(name)}] {key} {renamed[key]} (Kata 4)"


def _at(values: Mapping[str, Any], name: tuple[str, ...]) -> Mapping[str, Any]:
    """The table of that name; an absent one is empty."""
    for part in name:
        found = values.get(part)
        if not isinstance(found, dict):
            return {}
        values = found
    return values


def _place(config: Config, *key: str) -> str:
    file, line = config.source.locate(*key)
    return f"{file}:{line}"
