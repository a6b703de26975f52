"""The threads of a VM's vCPUs, for a VMM that names them."""

from __future__ import annotations

import contextlib
import os
import re

__all__ = ["vcpu_threads"]


def vcpu_threads(pid: int, pattern: re.Pattern[str]) -> dict[int, int]:
    """Thread ids by vCPU number, which is the first group of `pattern`, the VMM's name of such a thread.
    Raises OSError when it is gone."""
    found = {}
    for tid in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/task/{tid}/comm", encoding="utf-8", errors="replace") as file:
                match = pattern.fullmatch(file.read().rstrip("\n"))
            if match:
                found[int(match[1])] = int(tid)
    return found
