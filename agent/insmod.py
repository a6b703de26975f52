"""Kernel modules of the image, loaded when something needs them.

What: `load` puts modules, and what they depend on, into the kernel.
Why not modprobe: a process of PID 1's own, for a table of a few lines and one system call a module.
Invariants: only modules of the image, by names that this agent has; one that is there already is fine.
Source: init_module(2), modules.dep(5).
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable

from agent import log

__all__ = ["load"]

_FINIT_MODULE = 313  # x86_64
# A host of SCSI would look at each of 256 targets; the agent knows the address (`agent.storage.blockdev`).
_PARAMETERS = {"scsi_mod": b"scan=manual"}

_libc = ctypes.CDLL(None, use_errno=True)


def load(names: Iterable[str], directory: str = "") -> None:
    """Blocks. What cannot be loaded is logged: it may be built in, and if not, its device does not appear."""
    directory = directory or f"/lib/modules/{os.uname().release}"
    try:
        with open(f"{directory}/modules.dep", encoding="ascii") as table:
            needs = dict(line.rstrip("\n").split(":", 1) for line in table if ":" in line)
    except OSError as error:
        log.debug(f"modules: {error}")
        return
    paths = {os.path.basename(path)[:-3].replace("-", "_"): path for path in needs}
    for path in (paths[name] for name in names if name in paths):
        for each in (*reversed(needs[path].split()), path):
            _insert(f"{directory}/{each}")


def _insert(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        log.error(f"module {path}: {error.strerror}")
        return
    try:
        parameters = _PARAMETERS.get(os.path.basename(path)[:-3], b"")
        if _libc.syscall(_FINIT_MODULE, fd, parameters, 0) != 0 and ctypes.get_errno() != errno.EEXIST:
            log.error(f"module {path}: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(fd)
