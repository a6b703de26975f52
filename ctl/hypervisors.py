"""`kata-ctl hypervisors`: which there are, and what each can do at most; made from the plugins themselves.

The same table stands in docs/hypervisors.md (`--markdown`), where a test compares it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from hypervisors.base import Capabilities
from hypervisors.registry import broken_plugins, load_plugins

__all__ = ["run", "table"]

MEANING = {
    "block_device": "disks before the start",
    "block_hotplug": "disks while it runs",
    "block_hot_unplug": "take disks away again",
    "network_device": "network cards",
    "network_hotplug": "network cards while it runs",
    "fs_sharing": "virtio-fs: files of the host",
    "hybrid_vsock": "vsock without the host's kernel",
    "vcpu_hotplug": "more CPUs while it runs",
    "vcpu_hot_unplug": "fewer again",
    "memory_hotplug": "more memory while it runs",
    "memory_hot_unplug": "less again",
    "pause": "pause and resume",
    "snapshot": "save and restore a VM",
}
"""What each capability means to a user, by its field."""


def table(plugins: Mapping[str, Any]) -> list[list[str]]:
    """Rows of texts, the first one with the names."""
    rows = [["", *plugins]]
    for field in fields(Capabilities):
        can = ["yes" if getattr(plugin.capabilities, field.name) else "-" for plugin in plugins.values()]
        rows.append([MEANING[field.name], *can])
    return rows


def markdown(rows: list[list[str]]) -> str:
    """The rows as a Markdown table."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run(*, as_json: bool = False, as_markdown: bool = False) -> int:
    """The command; returns its exit code: 1 if a plugin that is installed cannot be loaded."""
    plugins = dict(sorted(load_plugins().items()))
    broken = broken_plugins()
    if as_json:
        able = {
            name: {field.name: getattr(plugin.capabilities, field.name) for field in fields(Capabilities)}
            for name, plugin in plugins.items()
        }
        print(json.dumps({"hypervisors": able, "broken": broken}, indent=2))
    elif as_markdown:
        print(markdown(table(plugins)))
    else:
        rows = table(plugins)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            print("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())
        for name, problem in sorted(broken.items()):
            print(f"\n{name}: installed, but cannot be loaded: {problem}")
    return 1 if broken else 0
