"""Files of the host that somebody has rewritten between CreateContainer and StartContainer.

What: `look_again` has the kernel ask virtiofsd once more for what it knows of each file that a container
mounts.
Why: Docker writes /etc/hosts and resolv.conf anew when it has connected a network, which it does after
Create. What the guest has seen of a file, its size above all, it holds for true for a second, and a program
that begins in that second finds the new text cut at the old end.
Why one question and not `cache=never`: that asks before each read of each file, for as long as the pod lives.
Invariants: nothing here fails a container. Directories are left alone: what is in them is found anew.
Source: statx(2), AT_STATX_FORCE_SYNC.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Mapping
from typing import Any

from agent.storage.submounts import SHARE

__all__ = ["look_again", "shared_files"]

_AT_FDCWD = -100
_AT_STATX_FORCE_SYNC = 0x2000
_STATX_BASIC_STATS = 0x7FF
_STATX_SIZE = 256  # bytes of struct statx

_libc = ctypes.CDLL(None, use_errno=True)


def shared_files(config: Mapping[str, Any], *, share: str = SHARE) -> list[str]:
    """The files of the share that a container with this config.json mounts. Blocks."""
    sources = {str(mount.get("source", "")) for mount in config.get("mounts", ())}
    return sorted(path for path in sources if path.startswith(share) and _is_file(path))


def look_again(paths: list[str]) -> None:
    """Have the kernel know of these what the host has now. Blocks."""
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    for path in paths:  # of one that has gone the container tells better
        _libc.statx(_AT_FDCWD, os.fsencode(path), _AT_STATX_FORCE_SYNC, _STATX_BASIC_STATS, buffer)


def _is_file(path: str) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False
