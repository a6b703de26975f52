"""`kata-ctl hypervisors`: which there are, and what each can do at most; made from the plugins themselves.

What: one table for all, with a word for each operation that can be done, and the versions that each was seen
working with; `--markdown`: one table for each, with the reason for what cannot. The latter stand in
docs/hypervisors.md, where a test compares them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from devices.kinds import OPERATIONS, Kind, Op
from devices.plain import plain
from hypervisors.base import Capabilities
from hypervisors.registry import broken_plugins, load_plugins

__all__ = ["device_table", "markdown", "run", "seen", "seen_with", "table"]

_WORDS = {Op.COLD: "start", Op.HOT: "plug", Op.UNPLUG: "unplug", Op.RESIZE: "resize"}
MEANING = {
    "tap_by_name": "tap opened by its name, not handed over",
    "hybrid_vsock": "vsock without the host's kernel",
    "own_vsock": "and without a daemon",
    "pause": "pause and resume",
    "snapshot": "save a VM",
    "restore": "start a saved VM",
    "adopt": "outlive a shim, and be taken over",
}
"""What each of the other capabilities means to a user, by its field."""


def table(plugins: Mapping[str, Any]) -> list[list[str]]:
    """Rows of texts, the first one with the names."""
    rows = [["", *plugins]]
    able: list[Capabilities] = [plugin.capabilities for plugin in plugins.values()]
    for kind in Kind:
        cells = (" ".join(_WORDS[op] for op in OPERATIONS[kind] if one.can(kind, op)) for one in able)
        rows.append([kind.value, *(cell or "-" for cell in cells)])
    for name, meaning in MEANING.items():
        rows.append([meaning, *("yes" if getattr(one, name) else "-" for one in able)])
    rows.append(["seen with", *(" ".join(seen_with(plugin)) or "-" for plugin in plugins.values())])
    return rows


def seen_with(plugin: Any) -> tuple[str, ...]:
    """Versions of the VMM that its author has seen working with the driver; none if he does not say."""
    return tuple(map(plain, getattr(plugin, "seen_with", ())))


def seen(plugin: Any) -> str:
    """The same as a sentence."""
    versions = ", ".join(seen_with(plugin))
    return f"Seen with {versions}." if versions else "Seen with no released version."


def device_table(able: Capabilities) -> list[list[str]]:
    """Of one VMM or VM: a row a kind, a column an operation; "yes", or the reason why not."""
    rows = [["kind", *(op.value for op in Op)]]
    for kind in Kind:
        cells = [(able.why_not(kind, op) or "yes") if op in OPERATIONS[kind] else "" for op in Op]
        rows.append([kind.value, *cells])
    return rows


def markdown(rows: list[list[str]]) -> str:
    """The rows as a Markdown table."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _as_data(able: Capabilities) -> dict[str, Any]:
    """For JSON: true, or the reason."""
    devices = {
        kind.value: {op.value: able.why_not(kind, op) or True for op in OPERATIONS[kind]} for kind in Kind
    }
    return {"devices": devices, **{name: getattr(able, name) for name in MEANING}}


def run(*, as_json: bool = False, as_markdown: bool = False) -> int:
    """The command; returns its exit code: 1 if a plugin that is installed cannot be loaded."""
    plugins = dict(sorted(load_plugins().items()))
    broken = broken_plugins()
    if as_json:
        able = {
            name: {**_as_data(plugin.capabilities), "seen_with": seen_with(plugin)}
            for name, plugin in plugins.items()
        }
        print(json.dumps({"hypervisors": able, "broken": broken}, indent=2))
    elif as_markdown:
        for name, plugin in plugins.items():
            print(f"### {name}\n\n{seen(plugin)}\n\n{markdown(device_table(plugin.capabilities))}\n")
    else:
        rows = table(plugins)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for row in rows:
            print("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())
        for name, problem in sorted(broken.items()):
            print(f"\n{name}: installed, but cannot be loaded: {plain(problem)}")
    return 1 if broken else 0
