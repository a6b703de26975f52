"""What Cloud Hypervisor may.

Why not a view of its own: it opens disks by their paths, and those of containers come while it runs; its API
takes descriptors for taps only. Its own filter of system calls is on, and `landlock` closes the files where
nothing is to come later.
Invariants: it is root with one capability: disks may belong to anybody.
"""

from __future__ import annotations

from devices.confine import Confinement
from hypervisors.cloud_hypervisor.abilities import max_memory
from hypervisors.cloud_hypervisor.config import ClhConfig

__all__ = ["confinement"]

_FILES = 4096
_EXTRA = 1 << 30  # bytes that devices map besides the guest's memory


def confinement(section: ClhConfig, netns: str | None) -> Confinement:
    """For one VM: what devices of VFIO pin is a limit."""
    passes = (section.cold_plug_vfio, section.hot_plug_vfio) != ("no-port", "no-port")
    locked = (max_memory(section) << 20) + _EXTRA if passes else 64 << 10
    return Confinement(capabilities=("dac_override",), network=netns, view=None, files=_FILES, locked=locked)
