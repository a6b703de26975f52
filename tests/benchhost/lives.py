"""A container in the bench host, as tests of a VMM drive it: one that traps SIGTERM, and how it ended."""

from __future__ import annotations

import time

from testing.containerd import KATA, Containerd
from tests.benchhost.conftest import BUSYBOX, PATIENCE

__all__ = ["start", "stopped"]


def start(containerd: Containerd, name: str, *options: str) -> None:
    """`ctr run` of one that ends with 42 by SIGTERM; it can by the time that this returns."""
    script = "trap 'exit 42' TERM; touch /trapped; while :; do sleep 0.1; done"
    containerd.ctr(
        *("run", "--detach", "--runtime", KATA, *options, BUSYBOX, name, "sh", "-c", script), timeout=PATIENCE
    )
    waiting = "until test -e /trapped; do sleep 0.1; done"
    containerd.ctr("task", "exec", "--exec-id", "up", name, "sh", "-c", waiting, timeout=60)


def stopped(containerd: Containerd, name: str) -> str:
    """What `ctr` says of its end."""
    deadline = time.monotonic() + 60
    while "STOPPED" not in containerd.ctr("task", "ls").text and time.monotonic() < deadline:
        time.sleep(0.1)
    said = containerd.ctr("task", "rm", name, check=False).error
    containerd.ctr("container", "rm", name)
    return said
