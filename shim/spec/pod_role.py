"""What a container is to its pod, by the annotations of its OCI spec.

What: `container_type` and `annotations_of`.
Invariants: nothing is read but the spec.
Source: facts/containerd-shim.md section 5 (the keys of containerd's CRI plugin, CRI-O and dockershim).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from devices.errors import CallerError
from shim.spec.guest_spec import MEMBER, OWN

__all__ = ["annotations_of", "container_type"]

_SANDBOX_TYPES = frozenset({"sandbox", "podsandbox", "pod_sandbox"})
_TYPE_KEYS = (
    "io.kubernetes.cri-o.ContainerType",
    "io.kubernetes.cri.container-type",
    "io.kubernetes.docker.type",
)


def annotations_of(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of the spec; {} if it has none. Raises CallerError if they are no object."""
    found = spec.get("annotations") or {}
    if not isinstance(found, Mapping):
        raise CallerError(
            "config.json: annotations must be an object", code="INVALID_ARGUMENT", phase="bundle"
        )
    return found


def container_type(spec: Mapping[str, Any]) -> str:
    """OWN for a pod's sandbox container, MEMBER for any other of a pod, else "single_container"."""
    found = spec.get("annotations") or {}
    for key in _TYPE_KEYS:
        if key in found:
            return OWN if found[key] in _SANDBOX_TYPES else MEMBER
    return "single_container"
