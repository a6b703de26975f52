"""The guest machine itself: what it can do, its vCPUs and memory, its clock and random generator.

Invariants: vCPUs are only ever brought online up to the number asked for, never taken away; memory goes
online in the zone that the kernel chooses (our kernel parameters have it keep most of it movable); the
clock is set only to a time that the kernel accepts; every file is one of sysfs' own.
"""

from __future__ import annotations

import asyncio
import fcntl
import functools
import os
import struct
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from agent import deadlines
from agent.fit import LOOPBACK, METADATA, NETWORK
from agent.memory_limits import follow, memory
from agent.storage.storages import DRIVERS
from agent.threads import in_thread
from proto import agent_pb2
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from agent.container import Container

__all__ = ["details", "metrics", "online", "probe_memory", "reseed", "set_clock", "termination_log"]

_MEMORY = "/sys/devices/system/memory"
_CPUS = "/sys/devices/system/cpu"
_RNDADDENTROPY = 0x40085203  # random(4)
_RNDRESEEDCRNG = 0x5207
HOTPLUG_DEADLINE = deadlines.HOTPLUG  # seconds for announced vCPUs to appear
TERMINATION_LOG_MAX = 4096


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def details(request: agent_pb2.GuestDetailsRequest, version: str) -> agent_pb2.GuestDetailsResponse:
    """GetGuestDetails."""
    response = agent_pb2.GuestDetailsResponse()
    if request.mem_block_size:
        response.mem_block_size_bytes = int(_read(f"{_MEMORY}/block_size_bytes") or "0", 16)
    if request.mem_hotplug_probe:
        response.support_mem_hotplug_probe = os.path.exists(f"{_MEMORY}/probe")
    agent = response.agent_details
    agent.version = version
    agent.init_daemon = os.getpid() == 1
    agent.device_handlers.extend(("blk", "mmioblk", "scsi", "nvdimm"))
    agent.storage_handlers.extend(DRIVERS)
    agent.supports_seccomp = os.path.exists("/proc/sys/kernel/seccomp")
    agent.extra_features.extend((METADATA, NETWORK, LOOPBACK))
    return response


def _offline(directory: str, prefix: str) -> list[str]:
    """The `online` files that say 0, in the order of their numbers."""
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    numbered = sorted(
        int(n[len(prefix) :]) for n in names if n.startswith(prefix) and n[len(prefix) :].isdigit()
    )
    files = [f"{directory}/{prefix}{number}/online" for number in numbered]
    return [file for file in files if _read(file) == "0"]


def _online_count() -> int:
    return os.sysconf("SC_NPROCESSORS_ONLN")


async def online(request: agent_pb2.OnlineCPUMemRequest) -> None:
    """OnlineCPUMem: `nb_cpus` is the total wanted; `wait`: until they have appeared.

    Raises RpcError(DEADLINE_EXCEEDED) if the host announced more than it plugged.
    """
    if not request.cpu_only:
        for file in _offline(_MEMORY, "memory"):
            state = f"{os.path.dirname(file)}/state"
            await in_thread("onlining memory", functools.partial(_write, state, "online"))
        follow(memory())
    loop = asyncio.get_running_loop()
    end = loop.time() + HOTPLUG_DEADLINE
    while _online_count() < request.nb_cpus:
        files = _offline(_CPUS, "cpu")[: request.nb_cpus - _online_count()]
        for file in files:
            await in_thread("onlining a vCPU", functools.partial(_write, file, "1"))
        if files:
            continue
        if not request.wait or loop.time() > end:
            raise RpcError(
                Code.DEADLINE_EXCEEDED,
                f"{_online_count()} vCPUs are online; {request.nb_cpus} were announced but did not appear",
            )
        await asyncio.sleep(0.02)  # ACPI hot-plug announces nothing that could be awaited more cheaply


def probe_memory(addresses: Iterable[int]) -> None:
    """MemHotplugByProbe."""
    for address in addresses:
        try:
            _write(f"{_MEMORY}/probe", f"{address:#x}")
        except OSError as error:
            raise RpcError(Code.INTERNAL, f"probing memory at {address:#x}: {error.strerror}") from None


def reseed(data: bytes) -> None:
    """Credit the host's bytes to the pool and have the generator use them at once; random(4)."""
    if not 0 < len(data) <= 4096:
        raise RpcError(Code.INVALID_ARGUMENT, f"{len(data)} bytes of entropy; 1 to 4096 are accepted")
    fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _RNDADDENTROPY, struct.pack("ii", len(data) * 8, len(data)) + data)
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    except OSError as error:
        raise RpcError(Code.INTERNAL, f"reseeding: {error.strerror}") from None
    finally:
        os.close(fd)


def set_clock(seconds: int, microseconds: int) -> None:
    """Set CLOCK_REALTIME."""
    try:
        time.clock_settime_ns(time.CLOCK_REALTIME, seconds * 10**9 + microseconds * 1000)
    except (OSError, OverflowError) as error:
        raise RpcError(Code.INVALID_ARGUMENT, f"setting the clock to {seconds}: {error}") from None


def metrics(containers: int) -> str:
    """GetMetrics: a little Prometheus text about the guest."""
    lines = []
    for line in _read("/proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        number = value.split()[:1]
        if key in ("MemTotal", "MemFree", "MemAvailable", "Cached") and number:
            lines.append(f'kata_guest_meminfo_bytes{{item="{key}"}} {int(number[0]) * 1024}')
    load = _read("/proc/loadavg").split()
    if load:
        lines.append(f"kata_guest_load1 {load[0]}")
    with open("/proc/self/statm", encoding="ascii") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    lines.append(f"kata_agent_resident_bytes {resident}")
    lines.append(f"kata_agent_containers {containers}")
    return "\n".join(lines) + "\n"


def termination_log(container: Container) -> str:
    """What the container wrote to its termination message path (a bind mount of the host's)."""
    path = container.config.get("annotations", {}).get("io.kubernetes.container.terminationMessagePath", "")
    source = next((m.get("source", "") for m in container.config["mounts"] if m["destination"] == path), "")
    if not path or not source:
        return ""
    try:
        with open(source, "rb") as file:
            return file.read(TERMINATION_LOG_MAX).decode(errors="replace")
    except OSError as error:
        raise RpcError(Code.NOT_FOUND, f"termination log of {container.id}: {error.strerror}") from None
