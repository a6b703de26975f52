"""What a sandbox takes from the files that its first container mounts.

What: `read_host_files` gives the lines of resolv.conf for the guest's own, and the size of its /dev/shm.
Invariants: what is read is a regular file, and bounded; a file that cannot be read is done without, and
told: the mount itself may still be what somebody wants.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import structlog

from devices.small_file import read_small

__all__ = ["DEFAULT_SHM", "MAX_RESOLV_CONF", "HostFiles", "read_host_files"]

DEFAULT_SHM = 64 << 20  # bytes; Kata's and Docker's default
MAX_RESOLV_CONF = 64 << 10  # bytes

_log = structlog.get_logger("runtime")


HostFiles = tuple[tuple[str, ...], int]
"""Lines of resolv.conf; bytes of /dev/shm."""


def read_host_files(spec: Mapping[str, Any]) -> HostFiles:
    """By the mounts of a spec. Blocks: a source may lie on a file server that does not answer."""
    sources = {"/etc/resolv.conf": "", "/dev/shm": ""}
    for mount in reversed(spec.get("mounts") or []):  # the first that names a destination counts
        if mount.get("destination") in sources:
            sources[mount["destination"]] = mount.get("source", "")
    return _dns(sources["/etc/resolv.conf"]), _shm_size(sources["/dev/shm"])


def _dns(source: str) -> tuple[str, ...]:
    if not source.startswith("/"):
        return ()
    try:
        return tuple(read_small(source, MAX_RESOLV_CONF).decode(errors="replace").splitlines())
    except OSError as error:
        _log.warning("resolv.conf cannot be read", path=source, error=error.strerror)
        return ()


def _shm_size(source: str) -> int:
    if source.startswith("/"):
        try:
            size = os.statvfs(source)
        except OSError:
            return DEFAULT_SHM
        return size.f_frsize * size.f_blocks
    return DEFAULT_SHM
