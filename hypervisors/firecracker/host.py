"""The cgroups that Firecracker's jailer made.

Why apart: the jailer makes cgroups and never removes them; that is left to who started it.
Invariants: everything here blocks for at most two seconds; call it in a thread.
"""

from __future__ import annotations

import contextlib
import os
import time

from hypervisors.firecracker.config import FirecrackerConfig

__all__ = ["cgroup_paths", "remove_cgroup"]

_CGROUP_DEADLINE = 2.0  # seconds


def cgroup_paths(section: FirecrackerConfig, jail: str, version: int) -> list[str]:
    """Where the jailer makes the VM's cgroups: below one named after the program."""
    program = os.path.basename(section.path)
    if version == 2:
        return [f"/sys/fs/cgroup/{program}/{jail}"]
    controllers = sorted({setting.partition(".")[0] for setting in section.jailer_cgroups})
    return [f"/sys/fs/cgroup/{name}/{program}/{jail}" for name in controllers]


def remove_cgroup(path: str) -> None:
    """Remove the cgroup of a dead process, and the one above it if that was the last one in it."""
    until = time.monotonic() + _CGROUP_DEADLINE
    while os.path.isdir(path):
        try:
            os.rmdir(path)
        except OSError:  # the kernel lets go of the dead a moment later, and tells nobody
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(path))
