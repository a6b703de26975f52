"""Kernel modules that the host asks for, by modprobe.

What: `load` loads one that has to be there, `modprobe` tries; both wait for the program's end, which the
reaper sees.
Invariants: nothing of the host's looks like an option; the wait ends at `DEADLINE`; to `load` one that the
kernel has already, loaded or built in, is fine.
Source: modprobe(8), Documentation/kbuild/kbuild.rst (modules.builtin).
"""

from __future__ import annotations

import contextlib
import os

from agent import log
from agent.programs import run_program
from agent.reaper import Reaper
from ttrpc import Code, RpcError

__all__ = ["load", "modprobe"]

DEADLINE = 30.0  # seconds
DIRECTORY = "/lib/modules"


async def modprobe(reaper: Reaper, name: str, *parameters: str) -> int:
    """modprobe's exit code. `name` may be an alias. Raises RpcError if it cannot be run or does not end."""
    if not name or any(word.startswith("-") for word in (name, *parameters)):
        raise RpcError(Code.INVALID_ARGUMENT, f"kernel module {' '.join((name, *parameters))[:60]!r}")
    return await run_program(reaper, ["/sbin/modprobe", name, *parameters], DEADLINE)


async def load(reaper: Reaper, name: str, *parameters: str) -> None:
    """Raises RpcError, FAILED_PRECONDITION for a module that cannot be loaded."""
    if not name or "/" in name or "\0" in name:
        raise RpcError(Code.INVALID_ARGUMENT, f"kernel module {name[:60]!r} is no name of one")
    if _is_there(name):
        if parameters:
            log.error(f"kernel module {name} is there already: {' '.join(parameters)} has no effect")
        return
    if await modprobe(reaper, name, *parameters) == 0:
        return
    what = f"{name} {' '.join(parameters)}".strip()
    release = os.uname().release
    known = _is_listed(name, "modules.dep")
    why = "the kernel refused it" if known else "the guest's image has no such module"
    raise RpcError(
        Code.FAILED_PRECONDITION,
        f"kernel module {what[:200]!r} was not loaded: {why}; try: see what the guest's kernel {release} says"
        " of it on its console, or add it to the image (guest/module_list.py)",
    )


def _is_there(name: str) -> bool:
    return os.path.isdir(f"/sys/module/{name.replace('-', '_')}") or _is_listed(name, "modules.builtin")


def _is_listed(name: str, index: str) -> bool:
    wanted = name.replace("-", "_")
    with (
        contextlib.suppress(OSError),
        open(f"{DIRECTORY}/{os.uname().release}/{index}", encoding="utf-8") as lines,
    ):
        for line in lines:
            path = line.partition(":")[0].strip()
            if os.path.basename(path).partition(".")[0].replace("-", "_") == wanted:
                return True
    return False
