"""What a sandbox takes from the files that its first container mounts.

What: `dns`, the lines of resolv.conf for the guest's own, and `shm_size`, how large its /dev/shm is to be.
Invariants: what is read is bounded; a file that cannot be read is done without.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import structlog

__all__ = ["DEFAULT_SHM", "MAX_RESOLV_CONF", "dns", "shm_size"]

DEFAULT_SHM = 64 << 20  # bytes; Kata's and Docker's default
MAX_RESOLV_CONF = 64 << 10  # bytes

_log = structlog.get_logger("runtime")


def dns(spec: Mapping[str, Any]) -> list[str]:
    """The lines of the container's resolv.conf, for the guest's own."""
    source = _mount_source(spec, "/etc/resolv.conf")
    if not source.startswith("/"):
        return []
    try:
        with open(source, encoding="utf-8", errors="replace") as file:
            return file.read(MAX_RESOLV_CONF).splitlines()
    except OSError as error:
        _log.warning("resolv.conf cannot be read", path=source, error=error.strerror)
        return []


def shm_size(spec: Mapping[str, Any]) -> int:
    """Bytes of the file system that it mounts at /dev/shm."""
    source = _mount_source(spec, "/dev/shm")
    if source.startswith("/"):
        with contextlib.suppress(OSError):
            size = os.statvfs(source)
            return size.f_frsize * size.f_blocks
    return DEFAULT_SHM


def _mount_source(spec: Mapping[str, Any], destination: str) -> str:
    for mount in spec.get("mounts") or []:
        if isinstance(mount, Mapping) and mount.get("destination") == destination:
            return str(mount.get("source") or "")
    return ""
