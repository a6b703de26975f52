"""A sysfs for tests: PCI functions in IOMMU groups, and a kernel that reacts to what is written."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["Sysfs"]


class Sysfs:
    """A tree below `root`. `write` is what stands for the kernel: it takes the place of writing a file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.refuses: set[str] = set()  # drivers that do not bind
        self.log: list[str] = []
        for name in ("bus/pci/devices", "kernel/iommu_groups", "class/block", "class/net", "class/vfio-dev"):
            (root / name).mkdir(parents=True)
        self.driver("vfio-pci")

    def __str__(self) -> str:
        return str(self.root)

    def driver(self, name: str) -> Path:
        path = self.root / "bus/pci/drivers" / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def function(
        self,
        address: str,
        group: int | None,
        *,
        ids: tuple[int, int] = (0x8086, 0x10FB),
        code: int = 0x020000,
        driver: str = "",
        express: bool = True,
        bus: str = "pci",
        below: str = "pci0000:00",
    ) -> Path:
        """Make one; answers its directory."""
        device = self.root / "devices" / below / address
        device.mkdir(parents=True)
        for name, value in (("vendor", ids[0]), ("device", ids[1]), ("class", code)):
            (device / name).write_text(f"{value:#06x}\n")
        (device / "config").write_bytes(bytes(4096 if express else 256))
        (device / "driver_override").write_text("(null)\n")
        (self.root / "bus" / bus).mkdir(parents=True, exist_ok=True)
        (device / "subsystem").symlink_to(self.root / "bus" / bus)
        if bus == "pci":
            (self.root / "bus/pci/devices" / address).symlink_to(device)
        if group is not None:
            members = self.root / f"kernel/iommu_groups/{group}/devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / address).symlink_to(device)
            (device / "iommu_group").symlink_to(members.parent)
        if driver:
            (device / "driver").symlink_to(self.driver(driver))
        return device

    def child(self, kind: str, device: Path, name: str, **files: str) -> Path:
        """A disk ("block") or link ("net") of a function."""
        path = device / kind / name
        path.mkdir(parents=True)
        for file, text in files.items():
            (path / file).write_text(text)
        (self.root / "class" / kind / name).symlink_to(path)
        return path

    def bound(self, address: str) -> str:
        """The driver of a function."""
        path = self.root / "bus/pci/devices" / address / "driver"
        return os.path.basename(os.readlink(path)) if path.is_symlink() else ""

    def override(self, address: str) -> str:
        return (self.root / "bus/pci/devices" / address / "driver_override").read_text().strip()

    def write(self, path: str, text: str) -> None:
        """What a kernel does with it."""
        self.log.append(f"{Path(path).relative_to(self.root)} {text}")
        name = os.path.basename(path)
        if name == "driver_override":
            Path(path).write_text(f"{text or '(null)'}\n")
            return
        link = self.root / "bus/pci/devices" / text / "driver"
        if name == "unbind":
            link.unlink()
        elif name == "bind":
            self._bind(text, os.path.basename(os.path.dirname(path)))
        elif name == "drivers_probe":
            override = self.override(text)
            if override != "(null)" and not link.is_symlink():
                self._bind(text, override)

    def _bind(self, address: str, driver: str) -> None:
        if driver in self.refuses:
            raise OSError(19, "No such device")
        (self.root / "bus/pci/devices" / address / "driver").symlink_to(self.driver(driver))
