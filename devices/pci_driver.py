"""Which driver a PCI function of the host has: from its own to vfio-pci, and back.

What: `give_to_vfio` binds a function to vfio-pci and records first what it was bound to; `restore` undoes
that from the recorded facts alone, in the shim as in `delete` after a crash. `check_unused` refuses to take
what the host uses.
Why by driver_override: it names one function; `new_id` would give vfio-pci every device of a kind.
Invariants:
- The undo log knows function, driver and override before any of them is changed; `restore` is idempotent.
- A function whose driver is neither the recorded one nor vfio-pci is somebody else's by now: it is left.
- Nothing is polled: a write to sysfs returns when the kernel has bound or unbound, its nodes below /dev
  included (devtmpfs). A driver that does not let go keeps a thread, never the caller: `timeout`.
Source: Documentation/ABI/testing/sysfs-bus-pci (driver_override), drivers/base/bus.c.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping

from devices.errors import CallerError, HostError
from devices.in_use import users
from devices.threads import acquire, look, start
from devices.undo import Entry, UndoLog
from devices.vfio import PciFunction, read_function

__all__ = ["KIND", "VFIO_PCI", "check_unused", "give_to_vfio", "restore"]

KIND = "pci-driver"
"""Of the undo log's entries. Facts: address, driver ("" for none), override ("" for none)."""
VFIO_PCI = "vfio-pci"
TIMEOUT = 10.0  # seconds for a driver to let go: it may have to reset its device

_NAME = re.compile(r"[A-Za-z0-9_.-]{0,64}")
_MAX_TABLE = 1 << 20
_NETWORK = 0x02
_UP = 1  # IFF_UP
_PHASE = "devices"


async def give_to_vfio(function: PciFunction, undo: UndoLog, sysfs: str = "/sys") -> Entry:
    """Bind it to vfio-pci; the entry whose release gives it back.

    Raises CallerError when the host uses it (`check_unused`), HostError when the kernel refuses; its driver
    is the old one then.
    """
    await look(check_unused, function, sysfs)
    old = _text(f"{sysfs}/bus/pci/devices/{function.address}/driver_override").strip()
    facts = {
        "address": function.address,
        "driver": function.driver,
        "override": "" if old == "(null)" else old,
    }
    entry = undo.record(KIND, lambda: acquire(restore, facts, sysfs), **facts)
    try:
        await acquire(_bind, function, sysfs)
    except BaseException:
        await acquire(restore, facts, sysfs)
        undo.forget(entry)
        raise
    return entry


def _bind(function: PciFunction, sysfs: str) -> None:
    directory, address = f"{sysfs}/bus/pci/devices/{function.address}", function.address
    if not os.path.isdir(f"{sysfs}/bus/pci/drivers/{VFIO_PCI}"):
        _load_module()
    _write(f"{directory}/driver_override", VFIO_PCI)
    if function.driver:
        _bounded(lambda: _write(f"{directory}/driver/unbind", address), address)
    _bounded(lambda: _write(f"{sysfs}/bus/pci/drivers_probe", address), address)
    now = read_function(address, sysfs).driver
    if now != VFIO_PCI:
        raise HostError(
            f"the PCI device {address} did not come to vfio-pci but to {now or 'no driver'}",
            phase=_PHASE,
            hint="modprobe vfio-pci; see the kernel's log",
        )


def restore(facts: Mapping[str, str | int], sysfs: str = "/sys", timeout: float = TIMEOUT) -> None:
    """Give the function back to the driver that it had. Idempotent. Blocks, at most `timeout` seconds.

    Raises HostError, OSError; ValueError for facts that are none.
    """
    address, driver, override = (str(facts.get(key, "")) for key in ("address", "driver", "override"))
    if not _NAME.fullmatch(driver) or not _NAME.fullmatch(override):
        raise ValueError(f"no names of drivers: {driver!r}, {override!r}")
    try:
        now = read_function(address, sysfs).driver
    except HostError:
        return  # it was taken out: there is nothing to give back
    directory = f"{sysfs}/bus/pci/devices/{address}"
    if _text(f"{directory}/driver_override").strip() == VFIO_PCI:
        _write(f"{directory}/driver_override", override)
    if now == driver or now not in ("", VFIO_PCI):
        return
    if now:
        _bounded(lambda: _write(f"{directory}/driver/unbind", address), address, timeout)
    if not driver:
        return
    try:
        _bounded(lambda: _write(f"{sysfs}/bus/pci/drivers/{driver}/bind", address), address, timeout)
    except OSError as error:
        if read_function(address, sysfs).driver != driver:
            raise HostError(
                f"the PCI device {address} did not go back to its driver {driver}: {error.strerror}",
                phase=_PHASE,
                hint=f"echo {address} > /sys/bus/pci/drivers_probe; see the kernel's log",
            ) from error


def check_unused(function: PciFunction, sysfs: str = "/sys", dev: str = "/dev") -> None:
    """Raise CallerError if the host uses it: mounted or otherwise taken disks, network links that are up,
    the console, virtual functions."""
    directory = os.path.realpath(f"{sysfs}/bus/pci/devices/{function.address}")
    reason = next(_uses(function, directory, sysfs, dev), None)
    if reason is not None:
        raise CallerError(
            f"the PCI device {function.address} ({function.driver or 'no driver'}) is in use by the host:"
            f" {reason}",
            phase=_PHASE,
            hint="end that use first, or pass another device",
        )


def _uses(function: PciFunction, directory: str, sysfs: str, dev: str) -> Iterator[str]:
    if _text(f"{directory}/boot_vga").strip() == "1":
        yield "it is the display that the firmware started with"
    if _text(f"{directory}/sriov_numvfs").strip() not in ("", "0"):
        yield "it has virtual functions (sriov_numvfs)"
    for name in _below(f"{sysfs}/class/block", directory):
        major, _, minor = _text(f"{sysfs}/class/block/{name}/dev").strip().partition(":")
        yield from (f"{name} is {user}" for user in users(os.makedev(int(major or 0), int(minor or 0))))
        if _is_claimed(f"{dev}/{name}"):
            yield f"{name} is taken: mounted in another mount namespace, swap space, or open for one alone"
    links = _below(f"{sysfs}/class/net", directory)
    for name in links:
        if int(_text(f"{sysfs}/class/net/{name}/flags").strip() or "0", 16) & _UP:
            yield f"the network link {name} is up"
    if function.class_code >> 16 == _NETWORK and function.driver and not links:
        yield "its network link is not in this network namespace, so it may be somebody's"


def _is_claimed(node: str) -> bool:
    """The kernel gives a block device to one exclusive user; each mount is one, in whatever namespace."""
    try:
        os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def _below(folder: str, directory: str) -> list[str]:
    """The entries of a class that belong to the device in `directory`."""
    return [
        name for name in _names(folder) if os.path.realpath(f"{folder}/{name}").startswith(f"{directory}/")
    ]


def _load_module() -> None:
    """Ask for vfio-pci; whether it came shows when it is used."""
    subprocess.run(
        ["modprobe", VFIO_PCI],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=TIMEOUT,
    )


def _bounded(write: Callable[[], None], address: str, timeout: float = TIMEOUT) -> None:
    """Do it in a thread that may be left behind. Raises what it raises, HostError after `timeout` seconds."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            write()
        except BaseException as error:  # noqa: BLE001  (raised in the caller's thread)
            failed.append(error)

    thread = threading.Thread(target=run, name=f"driver of {address}", daemon=True)
    start(thread)
    thread.join(timeout)
    if thread.is_alive():
        raise HostError(
            f"the driver of the PCI device {address} did not let go of it within {timeout:g} s",
            phase=_PHASE,
            hint="see the kernel's log",
            code="DEADLINE_EXCEEDED",
        )
    if failed:
        raise failed[0]


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(f"{text}\n")


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_MAX_TABLE)
    except OSError:
        return ""
