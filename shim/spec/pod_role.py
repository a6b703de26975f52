"""What a container is to its pod, by the annotations of its OCI spec.

What: `container_type`.
Invariants: it is what `start` made of the same annotations, by the same table (`shim.state.bundle`), so that
no container is one thing to the shim that was started for it and another to the daemon.
Source: facts/containerd-shim.md section 5 (the keys of containerd's CRI plugin, CRI-O and dockershim).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from devices.errors import CallerError
from shim.state.bundle import BundleError, pod_role

__all__ = ["container_type"]


def container_type(spec: Mapping[str, Any]) -> str:
    """SINGLE, OWN or MEMBER. Raises CallerError for annotations that contradict each other."""
    try:
        kind, _ = pod_role(spec.get("annotations") or {})
    except BundleError as error:
        raise CallerError(f"config.json: {error}", code="INVALID_ARGUMENT", phase="bundle") from None
    return kind
