"""How long the agent waits for what the host has plugged; the host decides (agent.hotplug_timeout).

Invariants: set once, by `agent.main`, before the modules that wait are imported: they take it as it is then.
"""

from __future__ import annotations

from agent.cmdline import HOTPLUG_TIMEOUT

__all__ = ["HOTPLUG", "set_hotplug"]

HOTPLUG = HOTPLUG_TIMEOUT


def set_hotplug(seconds: float) -> None:
    """For the modules that are imported from now on."""
    global HOTPLUG  # noqa: PLW0603  (one agent, one host)
    HOTPLUG = seconds
