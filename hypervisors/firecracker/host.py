"""What of one Firecracker the host sees: its vCPUs' threads, and the cgroups that its jailer made.

Why apart: the jailer makes cgroups and never removes them; that is left to who started it.
Invariants: everything here blocks for at most two seconds; call it in a thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import time

from hypervisors.firecracker.config import FirecrackerConfig

__all__ = ["cgroup_paths", "remove_cgroup", "vcpu_threads"]

_CGROUP_DEADLINE = 2.0  # seconds


def vcpu_threads(pid: int) -> dict[int, int]:
    """Thread ids by vCPU number, as Firecracker names its threads. Raises OSError when it is gone."""
    found = {}
    for tid in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/task/{tid}/comm", encoding="utf-8") as file:
                match = re.fullmatch(r"fc_vcpu (\d+)\n?", file.read())
            if match:
                found[int(match[1])] = int(tid)
    return found


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
