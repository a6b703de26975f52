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

__all__ = ["DEFAULT_SHM", "MAX_RESOLV_CONF", "HostFiles", "read_dns", "read_host_files", "resolv_conf"]

DEFAULT_SHM = 64 << 20  # bytes; Kata's and Docker's default
MAX_RESOLV_CONF = 64 << 10  # bytes

_log = structlog.get_logger("runtime")


HostFiles = tuple[tuple[str, ...], int]
"""Lines of resolv.conf; bytes of /dev/shm."""


def read_host_files(spec: Mapping[str, Any]) -> HostFiles:
    """By the mounts of a spec. Blocks: a source may lie on a file server that does not answer."""
    return read_dns(resolv_conf(spec)), _shm_size(_source(spec, "/dev/shm"))


def resolv_conf(spec: Mapping[str, Any]) -> str:
    """Where on the host the resolv.conf is that a spec mounts; "" for none."""
    return _source(spec, "/etc/resolv.conf")


def _source(spec: Mapping[str, Any], destination: str) -> str:
    for mount in spec.get("mounts") or []:  # the first that names a destination counts
        if mount.get("destination") == destination:
            return str(mount.get("source", ""))
    return ""


def read_dns(source: str) -> tuple[str, ...]:
    """The lines of a resolv.conf. Blocks."""
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
