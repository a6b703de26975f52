"""A file system on a disk that has none.

What: `make_filesystem` serves the storage option `create_filesystem`, by mke2fs.
Why in the guest: the host is not to touch what a guest may have written.
Invariants: a disk that has anything in its first mebibyte is left as it is.
"""

from __future__ import annotations

from agent import log
from agent.programs import run_program
from agent.reaper import Reaper
from agent.threads import in_thread
from ttrpc import Code, RpcError

__all__ = ["make_filesystem"]

_DEADLINE = 300.0  # seconds
_LOOKED_AT = 1 << 20  # bytes; every superblock lies there
_KINDS = ("ext2", "ext3", "ext4")


async def make_filesystem(reaper: Reaper, device: str, fstype: str) -> None:
    """Raises RpcError: UNIMPLEMENTED for another kind, INTERNAL if it cannot be made."""
    if fstype not in _KINDS:
        raise RpcError(Code.UNIMPLEMENTED, f"this guest makes {', '.join(_KINDS)} only, not {fstype[:40]!r}")
    if not await in_thread(f"looking at {device}", lambda: _is_blank(device)):
        log.debug(f"{device} is not blank, and is left as it is")
        return
    code = await run_program(
        reaper, ["/usr/bin/mke2fs", "-q", "-F", "-m", "0", "-t", fstype, device], _DEADLINE
    )
    if code != 0:
        raise RpcError(Code.INTERNAL, f"cannot make a file system on {device}: mke2fs ended with {code}")


def _is_blank(device: str) -> bool:
    with open(device, "rb") as file:
        return not any(file.read(_LOOKED_AT))
