"""A confidential guest is had where the host has what it needs, and else refused with each reason."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from devices.config import ProtectionConfig
from devices.errors import HostError
from devices.protection import choose, probe


def host(root: Path, flags: str = "", **parameters: str) -> dict[str, str]:
    (root / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags} avx\n")
    for name, value in parameters.items():
        module = "kvm_intel" if name == "tdx" else "kvm_amd"
        path = root / f"sys/module/{module}/parameters/{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return probe(str(root / "sys"), str(root / "cpuinfo"))


def pick(root: Path, found: dict[str, str], *, snp: bool = False, port: int = 0) -> ProtectionConfig:
    (root / "cpuid").write_bytes(b"")
    fd = os.open(root / "cpuid", os.O_WRONLY)
    os.pwrite(fd, struct.pack("<4I", 1, 51 | 5 << 6, 0, 0), 0x8000001F)
    os.close(fd)
    return choose(
        snp=snp,
        policy=0x30000,
        quote_port=port,
        found=found,
        cpuid=str(root / "cpuid"),
        quote_socket=str(root / "qgs"),
    )


def test_a_host_without_says_why_for_each(tmp_path: Path) -> None:
    found = host(tmp_path, "sev", sev="N", tdx="Y")
    assert found["tdx"] == ""
    assert found["sev"].endswith("/parameters/sev is 'N'")
    assert found["snp"] == "the CPU has no sev_snp"
    assert found["se"].startswith("there is no ultravisor")
    assert host(tmp_path, "sev_snp")["snp"].startswith("there is no ")
    with pytest.raises(HostError, match="no AMD SEV-SNP: there is no ") as caught:
        pick(tmp_path, host(tmp_path, "sev_snp"), snp=True)
    assert "Intel" not in caught.value.cause
    (tmp_path / "sys/module/kvm_intel/parameters/tdx").write_text("N")
    with pytest.raises(HostError, match=r"no Intel TDX: .*; no AMD SEV: .*; no IBM Secure Execution: "):
        pick(tmp_path, host(tmp_path))


def test_amds_have_the_position_of_their_bit_from_the_cpu(tmp_path: Path) -> None:
    found = host(tmp_path, "sev sev_snp", sev="Y", sev_snp="Y")
    assert pick(tmp_path, found) == ProtectionConfig(technology="sev", c_bit=51, reduced_bits=5)
    snp = pick(tmp_path, found, snp=True)
    assert (snp.technology, snp.c_bit, snp.policy) == ("snp", 51, 0x30000)
    with pytest.raises(HostError, match="cannot read the position of the C-bit") as caught:
        choose(snp=True, policy=0, quote_port=0, found=found, cpuid=str(tmp_path / "none"))
    assert caught.value.hint == "modprobe cpuid"


def test_intels_has_its_quotes_from_a_socket_or_a_port(tmp_path: Path) -> None:
    found = host(tmp_path, "tdx_host_platform", tdx="Y")
    assert pick(tmp_path, found) == ProtectionConfig(technology="tdx", quote_port=4050)
    (tmp_path / "qgs").touch()
    assert pick(tmp_path, found).quote_socket == str(tmp_path / "qgs")
    assert pick(tmp_path, found, port=7) == ProtectionConfig(technology="tdx", quote_port=7)


def test_ibms(tmp_path: Path) -> None:
    (tmp_path / "sys/firmware/uv").mkdir(parents=True)
    (tmp_path / "sys/firmware/uv/prot_virt_host").write_text("1\n")
    assert pick(tmp_path, host(tmp_path)) == ProtectionConfig(technology="se")
