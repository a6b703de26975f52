"""Which accelerator QEMU shall use: probed, not guessed (design D8).

What: `choose_accelerator` gives kvm or tcg, with the reason in words.
Why: /dev/kvm may open and create VMs on a host whose CPU cannot virtualise; guests on it run a
hundred times slower than under TCG.
Invariants: never raises for a host without KVM unless the configuration forces it; costs well under
a millisecond.
"""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import dataclass
from enum import Enum

from devices.errors import ConfigError, HostError

__all__ = ["Accelerator", "Choice", "choose_accelerator", "host_khz"]

_CPUINFO_BYTES = 16 << 10  # the first CPU's paragraph; the whole file costs milliseconds on large hosts


class Accelerator(Enum):
    """QEMU's names."""

    KVM = "kvm"
    TCG = "tcg"


@dataclass(frozen=True, slots=True)
class Choice:
    """`reason` is one clause for the log; empty when there is nothing to tell."""

    accelerator: Accelerator
    reason: str = ""


def choose_accelerator(
    wanted: str, *, kvm: str = "/dev/kvm", cpuinfo: str = "/proc/cpuinfo", machine: str = ""
) -> Choice:
    """The accelerator for `wanted` ("auto", "kvm", "tcg").

    Raises ConfigError for another word, HostError when kvm is forced and /dev/kvm does not open.
    """
    if wanted == Accelerator.TCG.value:
        return Choice(Accelerator.TCG, "the configuration says so")
    problem = _open_problem(kvm)
    if wanted == Accelerator.KVM.value:
        if problem:
            raise HostError(
                f"the configuration forces KVM, but {problem}",
                phase="config",
                hint='load the kvm module or set accelerator = "auto"',
            )
        return Choice(Accelerator.KVM, "the configuration says so")
    if wanted != "auto":
        raise ConfigError(f'accelerator = "{wanted}" is none of "auto", "kvm", "tcg"', phase="config")
    if problem:
        return Choice(Accelerator.TCG, problem)
    if (machine or platform.machine()) in ("x86_64", "i686") and not _virtualises(cpuinfo):
        return Choice(Accelerator.TCG, f"{kvm} opens, but the CPU advertises neither vmx nor svm")
    return Choice(Accelerator.KVM)


def host_khz(cpuinfo: str = "/proc/cpuinfo") -> int:
    """The frequency of the host's first CPU in kHz, which TCG's guests have as their TSC's; 0: not told."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open(cpuinfo, "rb") as file:
            head = file.read(_CPUINFO_BYTES)
        line = next(line for line in head.split(b"\n") if line.startswith(b"cpu MHz"))
        return int(float(line.partition(b":")[2]) * 1000)
    return 0


def _open_problem(path: str) -> str:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{path} does not open ({error.strerror})"
    return ""


def _virtualises(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            head = file.read(_CPUINFO_BYTES)
    except OSError:
        return False
    flags = next((line for line in head.split(b"\n") if line.startswith(b"flags")), b"").split()
    return b"vmx" in flags or b"svm" in flags
