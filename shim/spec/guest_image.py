"""Which image a guest is to fetch for a container, where nothing of the host reaches it.

What: `pulled_image`, from the annotations that CRI's runtimes put into the OCI spec.
Invariants: pure; what names no image is refused, before anything is done for the container. The guest decides
what it fetches, and whether: this is a name, and no proof of what is in it.
Source: Kata Containers 4.1.0, runtime-rs' resource/src/rootfs/virtual_volume.rs (the keys, and "pause").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from devices.errors import CallerError
from shim.spec.pod_role import container_type
from shim.state.bundle import OWN

__all__ = ["PulledImage", "pulled_image"]

_KEYS = ("io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName")
_PAUSE = "pause"  # the guest brings it itself


@dataclass(frozen=True, slots=True)
class PulledImage:
    """Its name, and what the guest is told besides: the container's annotations."""

    name: str
    annotations: Mapping[str, str] = field(default_factory=dict)


def pulled_image(spec: Mapping[str, Any]) -> PulledImage:
    """Raises CallerError for a container without."""
    annotations = spec.get("annotations") or {}
    if container_type(spec) == OWN:
        return PulledImage(_PAUSE, annotations)
    name = next((annotations[key] for key in _KEYS if annotations.get(key)), "")
    if not name:
        raise CallerError(
            f"the guest fetches its images itself, and no annotation of the container names one ({_KEYS[0]})",
            phase="rootfs",
            hint=f"CRI sets it; with ctr: --annotation {_KEYS[0]}=IMAGE",
            code="INVALID_ARGUMENT",
        )
    return PulledImage(name, annotations)
