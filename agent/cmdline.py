"""What the host asks of the agent on the kernel command line.

What: the few `agent.*` parameters that this agent understands; all others are somebody else's.
Why: the command line is the only channel that exists before vsock does.
Invariants: the host's text is bounded by the kernel (2 KiB); a malformed value counts as absent,
because an agent that refuses to start cannot even report why. The last occurrence wins.
"""

from __future__ import annotations

__all__ = ["AGENT_PORT", "HOTPLUG_TIMEOUT", "Params", "parse"]

AGENT_PORT = 1024  # Kata's agent protocol listens here; part of the protocol, not configurable
HOTPLUG_TIMEOUT = 10.0  # seconds for what the host has plugged to appear, unless the host says otherwise
_LONGEST = 3600.0  # seconds


class Params:
    """Parsed parameters. Ports of 0 mean "not wanted"; `hotplug_timeout` is in seconds. `port`: the name of
    the port of virtio-serial that is the channel in the place of vsock, "" for vsock."""

    __slots__ = ("debug", "home_port", "hotplug_timeout", "port", "stream_port")

    def __init__(
        self,
        home_port: int = 0,
        stream_port: int = 0,
        debug: bool = False,
        hotplug_timeout: float = HOTPLUG_TIMEOUT,
        port: str = "",
    ) -> None:
        self.home_port = home_port
        self.stream_port = stream_port
        self.debug = debug
        self.port = port
        self.hotplug_timeout = hotplug_timeout


def _port(text: str) -> int:
    try:
        port = int(text)
    except ValueError:
        return 0
    return port if 0 < port < 0xFFFFFFFF else 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        return HOTPLUG_TIMEOUT
    return seconds if 0 < seconds <= _LONGEST else HOTPLUG_TIMEOUT


def parse(text: str) -> Params:
    """Read `/proc/cmdline`'s text."""
    params = Params()
    for word in text.split():
        key, _, value = word.partition("=")
        if key == "agent.home_vport":
            params.home_port = _port(value)
        elif key == "agent.stream_port":
            params.stream_port = _port(value)
        elif key == "agent.port":
            params.port = value
        elif key == "agent.hotplug_timeout":
            params.hotplug_timeout = _seconds(value)
        elif key == "agent.log":
            params.debug = value in ("debug", "trace")
    return params
