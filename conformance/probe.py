"""The guest's first program under test: it answers questions about the machine that it finds itself in.

What: a file that runs as PID 1 of the guest, in place of the agent (`conformance.guest` puts it there). Like
the agent it listens on vsock port 1024 and calls home; then each line of JSON is a question, `{"number": n,
"ask": name, "with": {...}}`, and gets a line back, `{"of": n, "answer": ...}` or `{"of": n, "error": text}`.
Why not the agent: it would be told by the host where a device is, and the suite has to know what is there
whatever the host was told. And a probe may panic, reset and write where an agent must not.
Invariants: nothing but the standard library of the guest's Python, and of that what the image has; it never
returns, but by `end`. It trusts whoever asks: no guest with work to do runs it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

PORT = 1024
_HOST = 2
BEAT = 0.05  # seconds
_BLKROSET = 0x125D
_SHOWN = 64  # bytes of the beginning of a disk or a file
_FUNCTION = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:([0-9a-f]{2})\.[0-7]")
_NO_DISKS = ("loop", "ram", "zram", "nbd", "sr", "fd")
_REBOOT = {"reset": 0x01234567, "poweroff": 0x4321FEDC}  # reboot(2)

_beats = 0
_mounts = 0


def _text(path: str, most: int = -1) -> str:
    try:
        with open(path, encoding="latin-1") as file:
            return file.read(most).strip("\0 \n")
    except OSError:
        return ""


def _pci_path(sysfs: str) -> str:
    """The slots from the root bus, hexadecimal, of what is at this place of /sys; "" for none on PCI."""
    return "/".join(_FUNCTION.findall(os.path.realpath(sysfs)))


def disks() -> list[dict[str, Any]]:
    """All of them, with what each begins with and the addresses by which a host may call it."""
    found = []
    for name in sorted(os.listdir("/sys/block")):
        if name.startswith(_NO_DISKS):
            continue
        try:
            with open(f"/dev/{name}", "rb", buffering=0) as node:
                begins = node.read(_SHOWN) or b""
        except OSError as error:
            begins = f"unreadable: {error}".encode()
        found.append(
            {
                "node": f"/dev/{name}",
                "addresses": _addresses(name),
                "begins": begins.decode("latin-1").rstrip("\0"),
                "serial": _text(f"/sys/block/{name}/serial"),
                "size": 512 * int(_text(f"/sys/block/{name}/size") or 0),
            }
        )
    return found


def _addresses(name: str) -> list[str]:
    place = os.path.realpath(f"/sys/block/{name}")
    found = [f"/dev/{name}"]
    if scsi := re.search(r"/\d+:\d+:(\d+):(\d+)/", place):
        found.append(f"{scsi[1]}:{scsi[2]}")
    elif region := re.search(r"(.*/region\d+)/", place):  # memory: by its slot, one less than the firmware's
        dimm = _text(f"{region[1]}/mapping0").partition(",")[0]
        handle = _text(f"/sys/bus/nd/devices/{dimm}/nfit/handle")
        found += [f"/dev/pmem{int(handle, 0) - 1}"] if handle else []
    elif path := _pci_path(place):
        found.append(path)
    return found


def cards() -> list[dict[str, str]]:
    """Network cards, by hardware address."""
    base = "/sys/class/net"
    return [
        {"mac": _text(f"{base}/{name}/address"), "path": _pci_path(f"{base}/{name}")}
        for name in sorted(os.listdir(base))
        if os.path.exists(f"{base}/{name}/device")
    ]


def virtio() -> list[dict[str, Any]]:
    """Each virtio device: its type by the specification's number, and where it is."""
    base = "/sys/bus/virtio/devices"
    return [
        {"type": int(_text(f"{base}/{name}/device"), 16), "path": _pci_path(f"{base}/{name}")}
        for name in sorted(os.listdir(base))
    ]


def pci() -> dict[str, str]:
    """Path and "vendor:device" of each function."""
    base = "/sys/bus/pci/devices"
    found = {}
    for name in os.listdir(base) if os.path.isdir(base) else []:
        kind = ":".join(_text(f"{base}/{name}/{part}").removeprefix("0x") for part in ("vendor", "device"))
        found[_pci_path(f"{base}/{name}")] = kind
    return found


def write(node: str, offset: int, text: str) -> int:
    """Write to a disk as somebody who means it, and return when the disk has it. Raises OSError."""
    fd = os.open(node, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _BLKROSET, (0).to_bytes(4, "little"))
    except OSError:
        pass
    finally:
        os.close(fd)
    fd = os.open(node, os.O_RDWR)
    try:
        done = os.pwrite(fd, text.encode(), offset)
        os.fsync(fd)
        return done
    finally:
        os.close(fd)


def share(tag: str, write: str = "") -> dict[str, str]:
    """How the files in a shared directory begin; one called `write` is made there. Raises OSError."""
    global _mounts  # noqa: PLW0603
    _mounts += 1
    where = f"/run/share-{_mounts}"
    os.mkdir(where)
    subprocess.run(["/bin/mount", "-t", "virtiofs", tag, where], check=True, timeout=60)
    try:
        if write:
            with open(f"{where}/{write}", "w", encoding="ascii") as file:
                file.write("from the guest\n")
        return {name: _text(f"{where}/{name}", _SHOWN) for name in os.listdir(where)}
    finally:
        subprocess.run(["/bin/umount", where], check=True, timeout=60)


def modules(*, scsi: str = "", names: tuple[str, ...] = ()) -> None:
    """Load modules; then look at this SCSI address, "0:5", for which nobody else looks."""
    for name in names:
        words = ["scan=manual"] if name == "scsi_mod" else []
        subprocess.run(["/sbin/modprobe", name, *words], timeout=60, check=False)
    target, _, lun = scsi.partition(":")
    for host in os.listdir("/sys/class/scsi_host") if scsi else []:
        with open(f"/sys/class/scsi_host/{host}/scan", "w", encoding="ascii") as file:
            file.write(f"0 {int(target)} {int(lun)}")


def cpus(wanted: int = 0) -> int:
    """How many are online, after bringing as many online as `wanted` and possible."""
    base = "/sys/devices/system/cpu"
    for number in range(1, len(os.listdir(base))):
        path = f"{base}/cpu{number}/online"
        if os.sysconf("SC_NPROCESSORS_ONLN") < wanted and _text(path) == "0":
            _set(path, "1")
    return os.sysconf("SC_NPROCESSORS_ONLN")


def memory() -> dict[str, int]:
    """MiB: `ram` as the firmware tells it and as it was plugged, `total` what the kernel can give away."""
    base = "/sys/devices/system/memory"
    for name in os.listdir(base):
        if name.startswith("memory") and _text(f"{base}/{name}/state") == "offline":
            _set(f"{base}/{name}/state", "online")
    ram = 0
    with open("/proc/iomem", encoding="ascii") as file:
        for line in file:
            place, _, what = line.partition(" : ")
            if what.startswith("System RAM"):
                first, _, last = place.strip().partition("-")
                ram += int(last, 16) + 1 - int(first, 16)
    total = next(int(line.split()[1]) for line in _text("/proc/meminfo").splitlines() if "MemTotal" in line)
    return {"ram": (ram + (1 << 19)) >> 20, "total": total >> 10}


def _set(path: str, value: str) -> None:
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(value)
    except OSError:
        pass  # what is counted afterwards tells


def entropy() -> dict[str, str]:
    """Where the guest has it from, and 16 bytes of it."""
    with open("/dev/hwrng", "rb", buffering=0) as source:
        return {"source": _text("/sys/class/misc/hw_random/rng_current"), "bytes": source.read(16).hex()}


def say(text: str) -> None:
    """A line on the console."""
    with open("/dev/console", "w", encoding="ascii") as console:
        console.write(f"\n{text}\n")


def log() -> list[str]:
    """The kernel's last lines."""
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    lines: list[str] = []
    try:
        while record := os.read(fd, 8192):
            lines.append(record.decode("latin-1").partition(";")[2].partition("\n")[0])
    except BlockingIOError:
        pass
    finally:
        os.close(fd)
    return lines[-20:]


def beats() -> int:
    """How often this guest's heart has beaten: twenty times a second, while it runs."""
    return _beats


def spin(seconds: float) -> int:
    """Keep a vCPU busy. The rounds that it made."""
    until, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        rounds += 1
    return rounds


def keep(name: str, text: str) -> None:
    """A file in memory."""
    with open(f"/run/{name}", "w", encoding="ascii") as file:
        file.write(text)


def kept(name: str) -> str:
    """What `keep` kept, "" for nothing."""
    return _text(f"/run/{name}")


def end(how: str) -> None:
    """ "panic", "reset" or "poweroff"."""
    if how == "panic":
        _set("/proc/sysrq-trigger", "c")
    ctypes.CDLL(None).reboot(_REBOOT[how])


_NAMES = "disks cards virtio pci write share modules cpus memory entropy say log beats spin keep kept end"
QUESTIONS: dict[str, Callable[..., Any]] = {name: globals()[name] for name in _NAMES.split()}


def answer(line: bytes) -> bytes:
    """The line that answers this one."""
    said: dict[str, Any] = {"of": 0}
    try:
        asked = json.loads(line)
        said["of"] = asked["number"]
        said["answer"] = QUESTIONS[asked["ask"]](**asked["with"])
    except Exception as error:  # noqa: BLE001  (the host judges it)
        said["error"] = f"{type(error).__name__}: {error}"
    return json.dumps(said).encode() + b"\n"


def _serve(connection: socket.socket) -> None:
    with contextlib.suppress(ConnectionError), connection, connection.makefile("rb") as lines:
        for line in lines:
            connection.sendall(answer(line))


def _beat() -> None:
    global _beats  # noqa: PLW0603
    while True:
        time.sleep(BEAT)
        _beats += 1


def _call_home() -> None:
    for word in _text("/proc/cmdline").split():
        name, _, value = word.partition("=")
        if name == "agent.home_vport" and value.isdigit():
            with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as caller:
                caller.connect((_HOST, int(value)))


def main() -> None:
    """Serve for ever, each connection in a thread of its own."""
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((socket.VMADDR_CID_ANY, PORT))
    listener.listen(16)
    threading.Thread(target=_beat, daemon=True).start()
    _call_home()
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main()
