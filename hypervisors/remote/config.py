"""The [hypervisor.remote] section: Kata's keys that a hypervisor service can be told.

Invariants: as in `hypervisors.config`: 0 and "" mean "choose for me", sizes are MiB.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypervisors.config import HostedSection, SandboxSection

__all__ = ["DEFAULT_SOCKET", "RemoteConfig"]

DEFAULT_SOCKET = "/run/peerpod/hypervisor.sock"
"""Where cloud-api-adaptor listens, and Kata's file looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteConfig(SandboxSection, HostedSection):
    """Kernel, initrd and image are the service's: these keys must be empty."""

    remote_hypervisor_socket: str = DEFAULT_SOCKET

    # --- what it is told of the VM; each as an annotation
    machine_type: str = ""  # an instance type of the cloud's; "": by the size, or its default
    default_gpus: int = 0
    default_gpu_model: str = ""
    initdata: str = ""  # of a confidential guest; the annotation cc_init_data
