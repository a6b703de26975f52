"""Confidential guests: what this host can keep a guest's memory from, itself included.

What: `probe` tells which technologies the host offers, each with the reason if not; `choose` picks the one
that a configuration asks for.
Why beforehand: a VMM on a host without ends with an error of its own, after everything else was made.
Invariants: reads sysfs, /proc/cpuinfo and, for the position of AMD's C-bit, the CPUID device; no more.
Source: AMD's APM volume 2, 15.34, and CPUID 8000_001F; Documentation/arch/x86/tdx.rst; s390's
/sys/firmware/uv; kata.md 6.2.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping

from devices.config import ProtectionConfig
from devices.errors import HostError

__all__ = ["NAMES", "choose", "probe"]

NAMES = {"sev": "AMD SEV", "snp": "AMD SEV-SNP", "tdx": "Intel TDX", "se": "IBM Secure Execution"}
_PARAMETERS = {  # the kernel module's parameter, and the CPU's flag
    "sev": ("kvm_amd", "sev", "sev"),
    "snp": ("kvm_amd", "sev_snp", "sev_snp"),
    "tdx": ("kvm_intel", "tdx", "tdx_host_platform"),
}
_ENCRYPTION = 0x8000001F
QUOTE_SOCKET = "/var/run/tdx-qgs/qgs.socket"


def probe(sysfs: str = "/sys", cpuinfo: str = "/proc/cpuinfo") -> dict[str, str]:
    """Technology -> "" if this host has it, else why not."""
    flags = _flags(cpuinfo)
    found = {}
    for name, (module, parameter, flag) in _PARAMETERS.items():
        path = f"{sysfs}/module/{module}/parameters/{parameter}"
        value = _text(path)
        if value in ("Y", "y", "1"):
            found[name] = ""
        elif flag not in flags:
            found[name] = f"the CPU has no {flag}"
        else:
            found[name] = f"{path} is {value!r}" if value else f"there is no {path}"
    host = _text(f"{sysfs}/firmware/uv/prot_virt_host")
    found["se"] = "" if host == "1" else "there is no ultravisor (/sys/firmware/uv/prot_virt_host)"
    return found


def choose(
    *,
    snp: bool,
    policy: int,
    quote_port: int,
    found: Mapping[str, str],
    cpuid: str = "/dev/cpu/0/cpuid",
    quote_socket: str = QUOTE_SOCKET,
) -> ProtectionConfig:
    """The technology for a guest on this host. `snp`: of AMD's, the one that also keeps integrity.

    Raises HostError that tells for each technology why it is not there.
    """
    wanted = ("snp",) if snp else ("tdx", "sev", "se")
    name = next((name for name in wanted if not found[name]), None)
    if name is None:
        reasons = "; ".join(f"no {NAMES[name]}: {found[name]}" for name in wanted)
        raise HostError(
            f"a confidential guest is asked for, and this host cannot have one: {reasons}",
            phase="config",
            hint="confidential_guest = false, or a host that has it (kata-ctl check tells)",
        )
    if name == "tdx":
        socket = quote_socket if quote_port == 0 and os.path.exists(quote_socket) else ""
        return ProtectionConfig(technology=name, quote_port=quote_port or 4050, quote_socket=socket)
    if name == "se":
        return ProtectionConfig(technology=name)
    bit, reduced = _encryption_bit(cpuid)
    return ProtectionConfig(
        technology=name, c_bit=bit, reduced_bits=reduced, policy=policy if name == "snp" else 0
    )


def _encryption_bit(path: str) -> tuple[int, int]:
    """The C-bit's position in an address, and by how many bits addresses are shorter."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _, ebx, _, _ = struct.unpack("<4I", os.pread(fd, 16, _ENCRYPTION))
        finally:
            os.close(fd)
    except (OSError, struct.error) as error:
        raise HostError(
            f"cannot read the position of the C-bit from {path}: {error}",
            phase="config",
            hint="modprobe cpuid",
        ) from error
    return ebx & 0x3F, ebx >> 6 & 0x3F


def _flags(path: str) -> set[str]:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith(("flags", "features")):
                    return set(line.split())
    except OSError:
        pass
    return set()


def _text(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(64).strip()
    except OSError:
        return ""
