"""Words of the OCI spec that a shim of Kata's writes otherwise than the OCI specification does.

What: a namespace's type, a capability, the error number of a seccomp rule, the numbers of a device rule, as
config.json has them.
Why: Kata's shims since 4.0 write the names that their Rust types print, and numbers where nothing was said.
Kata's agent reads both forms; crun refuses some, and leaves out a capability that it does not know without a
word, so that the container runs without it.
Invariants: what config.json itself would say comes out as it is; a name that is none is refused.
Source: Kata Containers 4.1.0's messages, as seen; its conversions in src/libs/protocols.
"""

from __future__ import annotations

from proto.capabilities import CAPABILITIES
from ttrpc import Code, RpcError

__all__ = ["capability", "device_numbers", "namespace_type", "takes_errno"]

_NAMESPACES = {
    **{name: name for name in ("pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time")},
    "net": "network",
    "mnt": "mount",
}
_WITH_ERRNO = frozenset({"SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"})


def namespace_type(word: str) -> str:
    """Raises INVALID_ARGUMENT."""
    name = _NAMESPACES.get(word)
    if name is None:
        raise RpcError(Code.INVALID_ARGUMENT, f"linux.namespaces: {word[:40]!r} is no type of namespace")
    return name


def capability(word: str) -> str:
    """`CAP_KILL`, for that, `KILL`, and either as JSON. Raises INVALID_ARGUMENT."""
    name = word.strip('"').upper()
    name = name if name.startswith("CAP_") else f"CAP_{name}"
    if name not in CAPABILITIES:
        raise RpcError(Code.INVALID_ARGUMENT, f"process.capabilities: {word[:40]!r} is no capability")
    return name


def takes_errno(action: str, errno: int) -> bool:
    """Whether a rule's error number belongs there: 0 is what a shim of Kata's writes if there is none."""
    return errno != 0 or action in _WITH_ERRNO


def device_numbers(major: int, minor: int) -> tuple[int, int]:
    """Of a rule: -1 is any. 0 and 0 are no device's, and stand where neither was said."""
    return (-1, -1) if major == minor == 0 else (major, minor)
