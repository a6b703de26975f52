"""Tap devices: the network namespace's end of a VM's card, opened as descriptors.

What: `open_tap` makes one, with a descriptor for each queue; `open_vhost` gives the kernel's own backend for
each; `open_macvtap` opens those of a macvtap link, whose device node it has to find first.
Why macvtap is odd: its node is called after an interface index, which is counted in each namespace anew, so
/dev/tap5 may be another pod's. The number of the right one is in the sysfs of the right namespace: the thread
mounts that where only it sees it, and makes a node of its own, which goes with the thread.
Invariants: for threads in the pod's namespace (`Netns.run`). What was opened is closed if the rest fails. A
tap that exists already is never taken over; one that is not `persistent` goes with its last descriptor.
Source: linux/if_tun.h, Documentation/networking/tuntap.rst.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct

from devices.errors import HostError
from devices.syscalls import CLONE_FS, CLONE_NEWNS, mount, unshare

__all__ = ["open_macvtap", "open_tap", "open_vhost"]

_TUN = "/dev/net/tun"
_VHOST = "/dev/vhost-net"

_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE, _IFF_TUN_EXCL = 0x2, 0x1000, 0x4000, 0x100, 0x8000
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER, _TUNSETGROUP = 0x400454CA, 0x400454CB, 0x400454CC, 0x400454CE
_ifreq = struct.Struct("16sH22x")

_MS_REC, _MS_PRIVATE, _MS_RDONLY = 0x4000, 0x40000, 0x1


def open_tap(
    name: str,
    *,
    queues: int = 1,
    persistent: bool = False,
    existing: bool = False,
    owner: tuple[int, int] = (0, 0),
) -> list[int]:
    """A new tap called `name`, or one that is there already; its descriptors, one for each queue, none of a
    `persistent` one.

    `owner`: user and group that may open a persistent one by its name. Raises HostError.
    """
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if queues > 1 else 0)
    fds: list[int] = []
    try:
        if existing:
            socket.if_nametoindex(name)
        for number in range(queues):
            fds.append(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC))
            exclusive = 0 if number or existing else _IFF_TUN_EXCL
            fcntl.ioctl(fds[-1], _TUNSETIFF, _ifreq.pack(name.encode(), flags | exclusive))
        if persistent:
            if any(owner):
                fcntl.ioctl(fds[0], _TUNSETOWNER, owner[0])
                fcntl.ioctl(fds[0], _TUNSETGROUP, owner[1])
            fcntl.ioctl(fds[0], _TUNSETPERSIST, 1)
    except OSError as error:
        _close(fds)
        raise HostError(
            f"the tap device {name} cannot be {'opened' if existing else 'made'}: {error.strerror}",
            phase="network",
            hint=f"the shim needs {_TUN} (modprobe tun) and root's rights",
        ) from error
    if persistent:
        _close(fds)
        return []
    return fds


def open_vhost(queues: int) -> list[int]:
    """vhost-net's descriptors, one for each queue; none where the kernel has no vhost-net."""
    fds: list[int] = []
    try:
        for _ in range(queues):
            fds.append(os.open(_VHOST, os.O_RDWR | os.O_CLOEXEC))  # noqa: PERF401  (half of them are closed)
    except OSError:
        _close(fds)
        return []
    return fds


def open_macvtap(name: str, queues: int) -> list[int]:
    """The descriptors of a macvtap link of the calling thread's namespace. Raises HostError.

    The thread has a mount namespace of its own afterwards.
    """
    fds: list[int] = []
    try:
        unshare(CLONE_FS | CLONE_NEWNS)
        mount("", "/", "", _MS_REC | _MS_PRIVATE, "")
        mount("sysfs", "/sys", "sysfs", _MS_RDONLY, "")
        mount("tmpfs", "/dev", "tmpfs", 0, "size=64k,mode=0700")
        numbers = _device_numbers(name)
        os.mknod("/dev/macvtap", 0o600 | 0o020000, os.makedev(*numbers))
        for _ in range(queues):
            fds.append(os.open("/dev/macvtap", os.O_RDWR | os.O_CLOEXEC))  # noqa: PERF401
    except OSError as error:
        _close(fds)
        raise HostError(
            f"the device of the macvtap link {name} cannot be opened: {error.strerror}", phase="network"
        ) from error
    return fds


def _device_numbers(name: str) -> tuple[int, int]:
    base = f"/sys/class/net/{name}"
    for below in os.listdir(base):
        if below.startswith("tap"):
            with open(f"{base}/{below}/dev", encoding="ascii") as file:
                major, minor = file.read().split(":")
            return int(major), int(minor)
    raise FileNotFoundError(2, "it has no tap device in sysfs")


def _close(fds: list[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
