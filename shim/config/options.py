"""The runtime options of a request: which configuration file containerd names for this runtime.

What: `config_path`.
Invariants: options of other types (runc's) are no error: containerd sends them to all runtimes.
Source: containerd's api/types/runtimeoptions; facts/containerd-shim.md 1.10.
"""

from __future__ import annotations

from google.protobuf.any_pb2 import Any as AnyMessage

from devices.errors import CallerError
from proto import runtimeoptions_pb2

__all__ = ["config_path"]

_TYPES = frozenset({"runtimeoptions.v1.Options", "cri.runtimeoptions.v1.Options"})


def config_path(options: AnyMessage) -> str | None:
    """The path that containerd's configuration (or `ctr --runtime-config-path`) names. Raises CallerError."""
    if options.type_url.rsplit("/", 1)[-1] not in _TYPES:
        return None
    message = runtimeoptions_pb2.Options()
    try:
        message.ParseFromString(options.value)
    except Exception as error:
        raise CallerError(
            "the runtime options are not a runtimeoptions.v1.Options message",
            code="INVALID_ARGUMENT",
            phase="config",
        ) from error
    return message.config_path or None
