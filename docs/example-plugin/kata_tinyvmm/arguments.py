"""What QEMU is told of the machine, of a disk's file, and of a port that a disk can be plugged into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from devices.addresses import Port
from devices.config import BlockConfig
from hypervisors.rules import guest_words

if TYPE_CHECKING:
    from kata_tinyvmm.plugin import TinyConfig

__all__ = ["machine", "node", "root_port"]

_KERNEL = ("reboot=t", "panic=-1", "no_timer_check", "swiotlb=noforce", "console=ttyS0")


def machine(section: TinyConfig, sandbox_id: str, accelerator: str, home_port: int) -> list[str]:
    """The machine without its devices. `home_port`: the guest's agent calls it when it listens, so nobody has
    to poll it."""
    vcpus = max(1, -int(-section.default_vcpus // 1))  # a fraction is rounded up
    words = [*_KERNEL, *([] if section.enable_debug else ["quiet"])]
    words += guest_words(section.image, "ext4", home_port)
    # Shared, because virtiofsd and the vsock daemon map the guest's memory.
    memory = f"memory-backend-memfd,id=mem,size={section.default_memory}M,share=on"
    argv = ["-name", f"tiny-{sandbox_id},debug-threads=on", "-nodefaults", "-no-user-config", "-no-reboot"]
    argv += ["-display", "none", "-machine", f"q35,accel={accelerator},memory-backend=mem"]
    argv += ["-cpu", section.cpu_model, "-smp", str(vcpus), "-m", f"{section.default_memory}M"]
    argv += ["-object", memory, "-kernel", section.kernel]
    argv += ["-initrd", section.initrd] if section.initrd else []
    return [*argv, "-append", " ".join([*words, section.kernel_params]).strip()]


def node(device: BlockConfig, path: str) -> dict[str, Any]:
    """A disk's file, as QEMU calls it."""
    file = {"driver": "file", "filename": path, "read-only": device.read_only}
    return {"driver": "raw", "node-name": f"node-{device.id}", "read-only": device.read_only, "file": file}


def root_port(port: Port) -> str:
    """An empty seat for a disk."""
    at = f"bus={port.place.bus},addr={port.place.slot:#x}"
    return f"pcie-root-port,id={port.name},chassis={port.number + 1},{at}"
