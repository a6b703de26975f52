"""What a template has done before it is saved, so that no VM that begins with it has to.

What: `warm_up` loads the agent's modules and runs the programs that a pod's first calls run.
Why: what is in a template's memory is there in each VM, at no cost in time and, until it is written, in
memory: imports, the page cache of crun and its libraries, the kernel's modules.
Invariants: it makes nothing that is a pod's, and nothing that is secret: what the kernel draws from its
random generator here would be the same in all of them. /proc/sys/kernel/random/boot_id is not read: its first
reader makes it.
"""

from __future__ import annotations

import gc
from importlib import import_module
from typing import TYPE_CHECKING

from agent import log

if TYPE_CHECKING:
    from agent.reaper import Reaper

__all__ = ["warm_up"]

_MODULES = (
    "json",
    "shutil",
    "concurrent.futures.thread",
    "agent.fit",
    "agent.guest",
    "agent.modules",
    "agent.network.interfaces",
    "agent.network.routes",
    "agent.oom",
    "agent.privileged",
    "agent.shim_service",
    "agent.stats",
    "agent.storage.blockdev",
    "agent.storage.copyfile",
    "agent.storage.mounts",
    "agent.storage.storages",
    "agent.storage.volumes",
)
_DEADLINE = 30.0  # seconds
_KERNEL_MODULES = ("erofs", "overlay", "virtio_net")


async def warm_up(reaper: Reaper) -> None:
    """See the module's docstring. What this guest lacks is no error: it is slower then, no more."""
    for name in _MODULES:
        import_module(name)
    from agent.crun import PROGRAM
    from agent.modules import load
    from agent.programs import run_program
    from ttrpc import RpcError

    try:
        for name in _KERNEL_MODULES:
            await load(reaper, name)
        await run_program(reaper, [PROGRAM, "--version"], _DEADLINE)
    except RpcError as error:
        log.debug(f"warming up: {error.message}")
    # What is here stays, and no collection writes to its pages.
    gc.collect()
    gc.freeze()
