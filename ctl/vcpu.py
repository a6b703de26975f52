"""Is /dev/kvm a useful one? A short loop on a vCPU, timed against the same loop on the host (design D8).

What: `measure` makes a VM of one page and one vCPU by ioctls, runs a counting loop in it in real mode, runs
the same loop natively, and compares. `judge` says the result in words.
Why: on some hosts /dev/kvm opens and makes VMs, but is emulated itself; guests then run a hundred times
slower than under QEMU's TCG, and nothing but a clock shows it.
Invariants: all of it happens in a child that is killed after LIMIT seconds, so that a vCPU which never
comes back costs no more; nothing is left. Only `kata-ctl check` does this, the shim never.
Source: linux/kvm.h (ioctl numbers and structures), Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import platform
import select
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

__all__ = ["LIMIT", "USEFUL", "Measured", "judge", "measure"]

LIMIT = 2.0
"""Seconds that the whole measurement may take."""
USEFUL = 5.0
"""Up to this many times the host's time it is a CPU that runs; emulation takes hundreds and more."""
_ROUNDS = 2_000_000  # about a millisecond on a host
_FEW = 20_000  # first, to see whether _ROUNDS would ever end

_GET_API_VERSION, _CREATE_VM, _GET_VCPU_MMAP_SIZE = 0xAE00, 0xAE01, 0xAE04
_CREATE_VCPU, _SET_TSS_ADDR, _RUN = 0xAE41, 0xAE47, 0xAE80
_SET_USER_MEMORY_REGION = 0x4020AE46
_GET_SREGS, _SET_SREGS, _SET_REGS = 0x8138AE83, 0x4138AE84, 0x4090AE82
_API_VERSION = 12
_EXIT_HLT = 5
_PAGE = 4096
_CODE_AT = 0x1000  # guest physical address
_SREGS_SIZE = 0x138  # its first 24 bytes are the code segment: base u64, limit u32, selector u16, ...


@dataclass(frozen=True, slots=True)
class Measured:
    """`ratio`: the vCPU's time by the host's; 0: not measured, because of `problem`."""

    ratio: float = 0.0
    problem: str = ""
    timed_out: bool = False


def judge(measured: Measured, device: str = "/dev/kvm") -> tuple[bool, str]:
    """(whether KVM is worth using, the reason in words)."""
    if measured.timed_out:
        return False, f"{device} opens, but a short loop on a vCPU did not end within {LIMIT:g} s"
    if measured.problem:
        return False, measured.problem
    ratio = f"{measured.ratio:.1f}" if measured.ratio < 10 else f"{float(f'{measured.ratio:.1g}'):.0f}"
    if measured.ratio <= USEFUL:
        return True, f"{device} works: a loop on a vCPU takes {ratio} times as long as on the host"
    what = f"a loop on a vCPU takes about {ratio} times as long as on the host"
    return False, f"{device} opens but emulates the CPU: {what}; TCG is faster"


def measure(device: str = "/dev/kvm", *, work: Callable[[str], float] | None = None) -> Measured:
    """Measure in a child. `work` is for tests; it takes the device and returns the ratio."""
    work = work or _ratio
    if work is _ratio and platform.machine() != "x86_64":
        return Measured(problem=f"{device} is not measured on {platform.machine()}")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(device, work, writer)
    os.close(writer)
    try:
        ready, _, _ = select.select([reader], [], [], LIMIT)
        data = os.read(reader, 4096) if ready else b""
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if not ready:
        return Measured(timed_out=True)
    if not data:
        return Measured(problem=f"{device}: the measurement ended without a word")
    result = json.loads(data)
    return Measured(ratio=result.get("ratio", 0.0), problem=result.get("problem", ""))


def _child(device: str, work: Callable[[str], float], writer: int) -> None:
    try:
        try:
            result = {"ratio": work(device)}
        except OSError as error:
            where = f"{error.filename}: " if error.filename else f"{device}: "
            result = {"problem": where + (error.strerror or str(error))}  # type: ignore[dict-item]
        os.write(writer, json.dumps(result).encode())
    finally:
        os._exit(0)


def _ratio(device: str) -> float:
    with _Vcpu(device) as vcpu:
        vcpu.run(_FEW)  # the first run pays for page tables
        few = vcpu.run(_FEW) / _FEW
        host = min(_host_loop(_ROUNDS) for _ in range(3)) / _ROUNDS
        if few > 100 * host:  # long enough to tell, and many rounds would not end in time
            return few / host
        return min(vcpu.run(_ROUNDS) for _ in range(3)) / _ROUNDS / host


def _host_loop(rounds: int) -> float:
    """Seconds of `dec ecx; jnz` on this CPU."""
    code = b"\xb9" + struct.pack("<I", rounds) + b"\xff\xc9\x75\xfc\xc3"
    with mmap.mmap(-1, _PAGE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(code)
        pointer = ctypes.c_char.from_buffer(page)
        function = ctypes.CFUNCTYPE(None)(ctypes.addressof(pointer))
        begin = time.perf_counter()
        function()
        took = time.perf_counter() - begin
        del pointer, function  # the page cannot be unmapped while it is referred to
    return took


class _Vcpu:
    """A VM of one page that counts down in real mode and halts."""

    def __init__(self, device: str) -> None:
        self._fds: list[int] = []
        self._maps: list[mmap.mmap] = []
        try:
            self._build(device)
        except BaseException:
            self.close()
            raise

    def _build(self, device: str) -> None:
        kvm = self._own(os.open(device, os.O_RDWR | os.O_CLOEXEC))
        version = fcntl.ioctl(kvm, _GET_API_VERSION)
        if version != _API_VERSION:
            raise OSError(0, f"has API version {version}, not {_API_VERSION}", device)
        machine = self._own(fcntl.ioctl(kvm, _CREATE_VM, 0))
        fcntl.ioctl(machine, _SET_TSS_ADDR, 0x7FFBD000)  # older Intel CPUs run real mode by a task
        self._memory = self._map(mmap.mmap(-1, _PAGE))
        pointer = ctypes.c_char.from_buffer(self._memory)
        region = struct.pack("<IIQQQ", 0, 0, _CODE_AT, _PAGE, ctypes.addressof(pointer))
        del pointer
        fcntl.ioctl(machine, _SET_USER_MEMORY_REGION, region)
        self._cpu = self._own(fcntl.ioctl(machine, _CREATE_VCPU, 0))
        self._state = self._map(mmap.mmap(self._cpu, fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE)))
        sregs = bytearray(_SREGS_SIZE)
        fcntl.ioctl(self._cpu, _GET_SREGS, sregs)
        struct.pack_into("<Q", sregs, 0, 0)  # cs.base
        struct.pack_into("<H", sregs, 12, 0)  # cs.selector
        fcntl.ioctl(self._cpu, _SET_SREGS, bytes(sregs))

    def run(self, rounds: int) -> float:
        """Seconds of the loop. Raises OSError when the vCPU does something else than halt."""
        code = b"\x66\xb9" + struct.pack("<I", rounds) + b"\x66\x49\x75\xfc\xf4"  # mov; dec; jnz; hlt
        self._memory[: len(code)] = code
        registers = [0] * 18
        registers[16], registers[17] = _CODE_AT, 2  # rip, rflags
        fcntl.ioctl(self._cpu, _SET_REGS, struct.pack("<18Q", *registers))
        begin = time.perf_counter()
        fcntl.ioctl(self._cpu, _RUN, 0)
        took = time.perf_counter() - begin
        (reason,) = struct.unpack_from("<I", self._state, 8)
        if reason != _EXIT_HLT:
            raise OSError(0, f"a vCPU stopped with reason {reason} instead of halting")
        return took

    def _own(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _map(self, memory: mmap.mmap) -> mmap.mmap:
        self._maps.append(memory)
        return memory

    def close(self) -> None:
        """Let go of the VM."""
        for fd in reversed(self._fds):
            os.close(fd)
        self._fds.clear()
        for memory in self._maps:
            memory.close()
        self._maps.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
