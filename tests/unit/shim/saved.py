"""A sandbox as a shim has written it down, for tests."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

from hypervisors.base import HypervisorState
from shim.state.procfs import start_time
from shim.state.recoveryfile import Saved, SavedContainer, SavedDaemon, SavedProcess, SavedSandbox

__all__ = ["process", "saved"]


def process(exec_id: str = "", **fields: Any) -> SavedProcess:
    """One that runs, without streams, unless `fields` say otherwise."""
    known: dict[str, Any] = {
        "stdin": "",
        "stdout": "",
        "stderr": "",
        "terminal": False,
        "status": "running",
        "input_over": False,
    }
    return SavedProcess(exec_id=exec_id, **{**known, **fields})


def saved(*containers: SavedContainer, pid: int = 0, socket: str = "/run/s", **daemon: Any) -> Saved:
    """A VM whose VMM is the process `pid` (0: this one)."""
    pid = pid or os.getpid()
    fields: dict[str, Any] = {
        "id": "c1",
        "socket": socket,
        "config_path": "",
        "publish_binary": "/usr/bin/containerd",
        "runtime_class": "",
        "alias": "c1",
        "debug": False,
        "log_level": "info",
        "mounts": os.stat("/proc/self/ns/mnt").st_ino,
        "program": (sys.executable,),
        "environment": {"PATH": "/bin"},
    }
    return Saved(
        daemon=SavedDaemon(**{**fields, **daemon}),
        sandbox=SavedSandbox(
            hypervisor="qemu",
            section={"path": "/usr/bin/qemu", "virtio_fs_extra_args": []},
            vm=dataclasses.asdict(
                HypervisorState(hypervisor="qemu", sandbox_id="c1", pid=pid, start=start_time(pid))
            ),
            is_pod=False,
            direct_stdio=True,
            agent_port=1024,
            boot=60.0,
            request=30.0,
            stop=5.0,
            kill=10.0,
            health_interval=30.0,
            health_timeout=10.0,
            health_ends=False,
            writing=(),
        ),
        containers=containers or (SavedContainer(id="c1", bundle="/b", processes=(process(),)),),
    )
