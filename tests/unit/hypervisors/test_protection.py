"""Confidential guests under QEMU: the arguments, held word by word, since few hosts can run them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from devices import protection
from devices.config import DeviceConfig, ProtectionConfig
from devices.errors import ConfigError
from devices.kinds import Kind, Op
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.abilities import abilities
from hypervisors.qemu.cmdline import arguments, kernel_command_line
from hypervisors.qemu.kvm import Accelerator
from hypervisors.qemu.plan import first_plan
from hypervisors.qemu.plugin import plugin
from hypervisors.qemu.recipes import Placed

SECTION = HypervisorConfig(path="/bin/true", kernel="/k", image="/i", default_memory=256)
AMD = {"id": "protection", "cbitpos": 51, "reduced-phys-bits": 5, "kernel-hashes": True}
TDX = {"qom-type": "tdx-guest", "id": "protection", "sept-ve-disable": True}


@pytest.mark.parametrize(
    ("device", "made", "machine", "cpu"),
    [
        (
            ProtectionConfig(technology="sev", c_bit=51, reduced_bits=5),
            {"qom-type": "sev-guest", **AMD},
            "q35,accel=kvm,confidential-guest-support=protection,memory-backend=mem0",
            "host",
        ),
        (
            ProtectionConfig(technology="snp", c_bit=51, reduced_bits=5, policy=0x30000),
            {"qom-type": "sev-snp-guest", **AMD, "policy": 0x30000},
            "q35,accel=kvm,kernel_irqchip=split,confidential-guest-support=protection,memory-backend=mem0",
            "EPYC-v4",
        ),
        (
            ProtectionConfig(technology="tdx", quote_port=4050),
            {**TDX, "quote-generation-socket": {"type": "vsock", "cid": "2", "port": "4050"}},
            "q35,accel=kvm,kernel_irqchip=split,confidential-guest-support=protection,memory-backend=mem0",
            "host",
        ),
        (
            ProtectionConfig(technology="tdx", quote_port=4050, quote_socket="/run/q,gs"),
            {**TDX, "quote-generation-socket": {"type": "unix", "path": "/run/q,gs"}},
            "q35,accel=kvm,kernel_irqchip=split,confidential-guest-support=protection,memory-backend=mem0",
            "host",
        ),
        (
            ProtectionConfig(technology="se"),
            {"qom-type": "s390-pv-guest", "id": "protection"},
            "q35,accel=kvm,confidential-guest-support=protection,memory-backend=mem0",
            "host",
        ),
    ],
    ids=["sev", "snp", "tdx-vsock", "tdx-unix", "se"],
)
def test_the_object_the_machine_and_the_cpu(
    device: DeviceConfig, made: dict[str, Any], machine: str, cpu: str
) -> None:
    section = dataclasses.replace(SECTION, firmware="/f/OVMF.fd")
    plan = first_plan(section, Accelerator.KVM, "s")
    plan = dataclasses.replace(plan, devices=[Placed(device=device)])
    argv = arguments(plan)
    options = dict(itertools.pairwise(argv))
    objects = [word for name, word in itertools.pairwise(argv) if name == "-object"]
    assert json.loads(objects[-1]) == made
    assert (options["-machine"], options["-cpu"], options["-bios"]) == (machine, cpu, "/f/OVMF.fd")
    assert "-device" not in argv
    # what the guest shares with the host goes through these pages
    assert "swiotlb=noforce" not in kernel_command_line(plan)
    assert "swiotlb=noforce" in kernel_command_line(dataclasses.replace(plan, devices=()))


def test_a_host_that_cannot_refuses_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "k").write_text("")
    files = {"kernel": str(tmp_path / "k"), "image": str(tmp_path / "k"), "shared_fs": "none"}
    base = dataclasses.replace(SECTION, **files)  # type: ignore[arg-type]
    monkeypatch.setattr(protection, "probe", lambda: dict.fromkeys(protection.NAMES, "it has none"))

    def check(**changes: object) -> None:
        plugin.validate_config(plugin.adjust_config(dataclasses.replace(base, **changes)))  # type: ignore[arg-type]

    check()
    with pytest.raises(ConfigError, match="this host cannot have one: no Intel TDX: it has none;") as caught:
        check(confidential_guest=True)
    assert (caught.value.key, caught.value.code) == ("confidential_guest", "FAILED_PRECONDITION")
    with pytest.raises(ConfigError, match="no AMD SEV-SNP: it has none"):
        check(confidential_guest=True, sev_snp_guest=True)
    with pytest.raises(ConfigError, match="needs confidential_guest = true"):
        check(sev_snp_guest=True)
    with pytest.raises(ConfigError, match="needs a machine other than microvm"):
        check(confidential_guest=True, machine_type="microvm")
    monkeypatch.setattr(protection, "probe", lambda: {**dict.fromkeys(protection.NAMES, "no"), "tdx": ""})
    check(confidential_guest=True)


def test_who_does_not_ask_gets_none() -> None:
    able = abilities(SECTION, first_plan(SECTION, Accelerator.KVM, "s"))
    assert able[Kind.PROTECTION].reason(Op.COLD) == "confidential_guest is false"
    section = dataclasses.replace(SECTION, confidential_guest=True)
    assert (
        abilities(section, first_plan(section, Accelerator.KVM, "s"))[Kind.PROTECTION].reason(Op.COLD) == ""
    )


def test_check_tells_what_this_host_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protection, "probe", lambda: {"sev": "", "snp": "", "tdx": "no", "se": "no"})
    (line,) = [result for result in plugin.check() if result.name == "confidential"]
    assert (line.ok, line.text) == (True, "AMD SEV, AMD SEV-SNP")
    monkeypatch.setattr(protection, "probe", lambda: dict.fromkeys(protection.NAMES, "the CPU has none"))
    (line,) = [result for result in plugin.check() if result.name == "confidential"]
    assert (line.ok, line.text) == (True, "no confidential guests: the CPU has none")
