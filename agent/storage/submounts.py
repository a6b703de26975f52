"""Keeping what a container uses of the shared directory mounted beyond the container's own end.

What: each mount of the host below the share is a file system of its own to the guest, mounted when a path
first leads through it. `hold` makes it be mounted here, in the agent's namespace, before the container gets a
copy; `drop` takes it away again when the container is removed.
Why: else the container's last process is the one whose exit unmounts it. Linux 6.1 does not wait there for
the closing of files that is still on its way to the host, as of that very program's own file: it finds the
file system busy, calls that a BUG and stops the process in mid-exit, a zombie that nobody can reap and whose
exit is never told (seen: once in some dozens of containers on a busy host).
Invariants: nothing here fails a container, and nothing but virtio-fs below the share is unmounted. Before a
file system goes it has answered a question asked after all others: requests are answered in their order, so
nothing of it is on its way any more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from agent.storage.mounts import MNT_DETACH, umount

__all__ = ["SHARE", "drop", "hold"]

SHARE = "/run/kata-containers/shared/"
"""Where the shared directories are in the guest, by Kata's convention."""
_TYPE = "virtiofs"


def hold(
    config: Mapping[str, Any], *, share: str = SHARE, mountinfo: str = "/proc/self/mountinfo"
) -> list[str]:
    """Mount what the container with this config.json will use; answers the places, for `drop`. Blocks."""
    sources = [config.get("root", {}).get("path", "")]
    sources += [mount.get("source", "") for mount in config.get("mounts", ())]
    used = {path.rstrip("/") for path in sources if path.startswith(share)}
    for path in used:
        with contextlib.suppress(OSError):  # crun tells better what is wrong with it
            os.stat(f"{path}/.")  # only a path that goes on beyond it makes the kernel mount it
    if not used:
        return []
    with open(mountinfo, encoding="utf-8", errors="surrogateescape") as file:
        mounted = {line.split(" ")[4] for line in file if f" - {_TYPE} " in line}
    return sorted(used & mounted)


def drop(held: list[str]) -> None:
    """Unmount them, with no process of the container left. Blocks."""
    for path in held:
        with contextlib.suppress(OSError):  # it went with a mount above it, or the VM is about to go
            os.statvfs(path)
            umount(path, MNT_DETACH)
