"""What QEMU may: the confinement that it runs in, and what is added to it while it runs.

What: `confinement` says it for one VM; `lend_nodes` and `take_back_nodes` give a running QEMU the nodes of a
device of VFIO, and take them again.
Why so little: QEMU carries out what a guest asks of its devices, so it is the first thing that a guest takes
over. It gets disks, taps, sockets and vhost devices as open descriptors; it sees its program and libraries,
the guest's kernel, and the nodes that only it can open itself.
Invariants: no path of the host that a container or a pod brings is in its view. It has no capability, whoever
it runs as; what it must lock is a limit.
Source: docs/system/security.rst of QEMU 7.2.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from devices.config import ProtectionConfig, RngConfig, VfioConfig
from devices.confine import Bind, Confinement, View
from devices.errors import HostError
from devices.vfio import CONTROL_NODES, device_node
from hypervisors.qemu.cmdline import Plan
from hypervisors.qemu.kvm import Accelerator
from hypervisors.qemu.recipes import Placed

__all__ = [
    "FILES",
    "READ_ONLY",
    "check_readable",
    "confinement",
    "lend_nodes",
    "meeting_place",
    "take_back_nodes",
]

READ_ONLY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "kata-readonly.so")
"""Built by `make setup` from readonly.c, which says why: what a VM from a template has QEMU load."""
FILES = 4096
"""Descriptors: two for each disk, one for each queue of a card, and some."""
_PLACES = "/sys/devices/system"  # of CPUs and memory: what its libraries ask
_SEV = "/dev/sev"


def meeting_place(state_dir: str) -> str:
    """The directory of the sockets that QEMU connects to by their paths."""
    return f"{state_dir}/m"


def confinement(
    plan: Plan, placed: Sequence[Placed], *, user: int, netns: str | None, state_dir: str, locked: int
) -> Confinement:
    """For one VM with these devices. `locked`: bytes that devices of VFIO pin. Raises HostError."""
    section = plan.section
    devices = [one.device for one in placed]
    passed = [device for device in devices if isinstance(device, VfioConfig)]
    protected = [device for device in devices if isinstance(device, ProtectionConfig)]
    later = section.hot_plug_vfio != "no-port"
    binds = [Bind(path=meeting_place(state_dir))]
    binds += [Bind(path=path) for path in _guest_files(plan) if path]
    binds += [Bind(path=READ_ONLY)] if section.boot_from_template else []
    binds.append(Bind(path="/sys" if passed or later else _PLACES))
    binds += [Bind(path=os.path.dirname(device.quote_socket)) for device in protected if device.quote_socket]
    nodes = ["/dev/kvm"] if plan.accelerator is Accelerator.KVM else []
    nodes += [device.source for device in devices if isinstance(device, RngConfig)]
    nodes += [_SEV] if any(device.technology in ("sev", "snp") for device in protected) else []
    nodes += [path for device in passed for path in _nodes(device)]
    return Confinement(
        user=user,
        network=netns,
        view=View(binds=tuple(binds), nodes=tuple(dict.fromkeys(nodes)), late_nodes=later),
        files=FILES,
        locked=max(locked, 64 << 10),
    )


def _guest_files(plan: Plan) -> tuple[str, ...]:
    section = plan.section
    return section.kernel, section.initrd, section.firmware


def check_readable(plan: Plan) -> None:
    """Raise HostError for a file of the guest's that only root may read, where QEMU is not root."""
    for path in _guest_files(plan):
        if path and os.path.exists(path) and not os.stat(path).st_mode & stat.S_IROTH:
            raise HostError(
                f"{path} cannot be read by the user that QEMU runs as",
                phase="vmm",
                hint=f"chmod o+r {path}; or rootless = false",
            )


def _nodes(device: VfioConfig) -> list[str]:
    """What QEMU opens for it."""
    control = CONTROL_NODES[1] if device.iommufd else CONTROL_NODES[0]
    return [control, device_node(device.address, iommufd=device.iommufd)]


def lend_nodes(pid: int, device: VfioConfig, user: int) -> None:
    """Make its nodes in the /dev of the running QEMU. Raises HostError, OSError. Blocks."""
    for path in _nodes(device):
        number = os.stat(path).st_rdev
        inside = _inside(pid, path)
        folder = os.path.dirname(inside)
        os.makedirs(folder, exist_ok=True)
        os.chmod(folder, 0o755)  # noqa: S103  (QEMU's user passes through)
        if os.path.lexists(inside):
            continue
        os.mknod(inside, 0o600 | stat.S_IFCHR, number)
        os.chown(inside, user, user, follow_symlinks=False)


def take_back_nodes(pid: int, device: VfioConfig) -> None:
    """Remove the node of the device; what all devices need stays. Raises OSError. Blocks."""
    path = _inside(pid, _nodes(device)[1])
    if os.path.lexists(path):
        os.unlink(path)


def _inside(pid: int, path: str) -> str:
    """The way to what QEMU sees at this path."""
    return f"/proc/{pid}/root{path}"
