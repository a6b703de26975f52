"""Volumes that a container may write by a supplemental group only, which not every virtiofsd can serve.

What: `told` names them, for the log.
Why: a request of virtio-fs carries one user and one group. QEMU's C virtiofsd makes files, directories and
FIFOs as these two, so that a directory of a supplemental group (Kubernetes' fsGroup) answers "permission
denied"; what is there already can be read and written, since that is the guest kernel's to decide. Rust's
virtiofsd and a guest of Linux 6.3 carry the group.
Invariants: looking only.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any

from devices.share_fs import carries_groups
from shim.spec.guest_spec import Volume

__all__ = ["told"]

_WORLD = stat.S_IWOTH
_GROUP = stat.S_IWGRP


def told(volumes: Sequence[Volume], spec: Mapping[str, Any], daemon: str) -> list[str]:
    """A line for each; `daemon`: the configured virtiofsd. Blocks."""
    user = (spec.get("process") or {}).get("user") or {}
    groups = set(user.get("additionalGids") or []) - {user.get("gid", 0)}
    if not groups or not user.get("uid") or carries_groups(daemon):
        return []
    lines = []
    for volume in volumes:
        try:
            info = os.stat(volume.source)
        except OSError:  # whoever shares it says so
            continue
        by_group = stat.S_ISDIR(info.st_mode) and info.st_mode & _GROUP and info.st_gid in groups
        by_others = info.st_mode & _WORLD or info.st_uid == user["uid"]
        if by_group and not by_others and not volume.readonly:
            lines.append(f"{volume.destination} ({volume.source}, of group {info.st_gid})")
    return lines
