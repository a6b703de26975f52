"""What Firecracker and its jailer may.

What: `jailer_confinement` for the jailer, which confines Firecracker further (root, user, cgroup, devices)
and becomes it; `plain_confinement` for a Firecracker without one.
Why not a view: the jailer makes its own out of the host's, and without it Firecracker opens its files itself.
Invariants: what Firecracker has after the jailer is never more than this: the jailer changes the user to one
without rights, and no program can get back what it lost (NoNewPrivs).
Source: Firecracker's docs/jailer.md, v1.12.
"""

from __future__ import annotations

from devices.confine import Confinement

__all__ = ["jailer_confinement", "plain_confinement"]

_FILES = 4096
# Namespaces, mounts and root; nodes, and whose they are; the user at the end.
_JAILER = ("sys_admin", "mknod", "chown", "dac_override", "fowner", "setuid", "setgid")


def jailer_confinement(netns: str | None) -> Confinement:
    """It starts in the pod's network namespace. Its own `--netns` would not do: the path is often one below
    the shim's /proc entry, which a process with fewer rights than the shim's may not open."""
    return Confinement(capabilities=_JAILER, network=netns, view=None, files=_FILES)


def plain_confinement(netns: str | None) -> Confinement:
    """`dac_override`: disks may belong to anybody."""
    return Confinement(capabilities=("dac_override",), network=netns, view=None, files=_FILES)
