"""ACPI tables inside the kernel's file, for a VMM that has none: Dragonball.

What: `with_tables` adds one segment to an ELF kernel, which every loader of ELF puts where Linux looks for
ACPI. They describe the first serial port and, in each of two windows, `SLOTS` places where a virtio-mmio
device may be; the driver looks there for its magic number, and passes over what has none. `CPUS` processors
are listed, of which `nr_cpus=` on the command line says how many there are.
Why: Dragonball tells its devices by `virtio_mmio.device=` and its CPUs by an MP table, and Debian's kernels
are built without either (CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES, CONFIG_X86_MPPARSE). To rebuild the one module
takes 140 MB of kernel source at each set-up, and the guest would still have one CPU.
Why no method that looks whether a device is there (_STA): ACPI's interpreter maps what it reads as cached
memory, and the driver, which needs it uncached, is refused the mapping from then on.
Invariants: everything else in the file stays; a kernel without room in its header raises HostError.
Source: ACPI 6.4 (5.2 the tables, 6.4 resources, 20.2 AML; the RSDP is looked for from 0xE0000 to 0xFFFFF).
Dragonball 4.1.0: places of 8 KiB from 3 GiB upwards, behind the 512 MiB of its PCI bus if it is built with
one, all on interrupt 5.
"""

from __future__ import annotations

import struct

from devices.errors import HostError

from .elf import MAGIC

__all__ = ["ADDRESS", "CPUS", "SLOTS", "tables", "with_tables"]

ADDRESS = 0xE0000  # physical; the RSDP is its first bytes
SLOTS = 16
CPUS = 32
_WINDOWS = (0xC000_0000, 0xE000_0000)
_SLOT_SIZE, _USED_SIZE, _IRQ = 0x2000, 0x1000, 5
_COM1, _COM1_IRQ = 0x3F8, 4
_LOCAL_APIC, _IO_APIC = 0xFEE0_0000, 0xFEC0_0000
_OEM = (b"KATA  ", b"KATASHIM", 1, b"KATA", 1)
# HW_REDUCED_ACPI, and no power nor sleep button; no VGA, no RTC in CMOS.
_FADT_FLAGS, _BOOT_FLAGS = 1 << 20 | 1 << 5 | 1 << 4, 1 << 5 | 1 << 2
_HEADER = struct.Struct("<4sIBB6s8sI4sI")
_PROGRAM = struct.Struct("<IIQQQQQQ")
_PLACE = 0x1000  # in the file: between the program headers and the first segment
_LOAD, _READABLE = 1, 4


def with_tables(kernel: bytes) -> bytes:
    """The ELF kernel with one segment more. Raises HostError."""
    data = tables()
    if kernel[:4] != MAGIC:
        raise HostError("no ELF kernel to put ACPI tables into", phase="guest build")
    (start,) = struct.unpack_from("<Q", kernel, 0x20)
    size, count = struct.unpack_from("<HH", kernel, 0x36)
    headers = [_PROGRAM.unpack_from(kernel, start + index * size) for index in range(count)]
    end = start + count * size
    if size != _PROGRAM.size or end + size > _PLACE or min(h[2] for h in headers) < _PLACE + len(data):
        raise HostError("the kernel's file has no room for ACPI tables in front of it", phase="guest build")
    made = bytearray(kernel)
    _PROGRAM.pack_into(made, end, _LOAD, _READABLE, _PLACE, 0, ADDRESS, len(data), len(data), 0x1000)
    struct.pack_into("<H", made, 0x38, count + 1)
    made[_PLACE : _PLACE + len(data)] = data
    return bytes(made)


def tables() -> bytes:
    """RSDP, XSDT, FADT, MADT and DSDT, as they lie from ADDRESS on."""
    xsdt_at = ADDRESS + 64
    fadt_at = xsdt_at + 64
    madt = _madt()
    madt_at = fadt_at + 320
    dsdt_at = madt_at + (len(madt) + 63) // 64 * 64
    parts = {
        xsdt_at: _table(b"XSDT", 1, struct.pack("<2Q", fadt_at, madt_at)),
        fadt_at: _fadt(dsdt_at),
        madt_at: madt,
        dsdt_at: _table(b"DSDT", 2, _dsdt()),
    }
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM[0], 2, 0, 36, xsdt_at, 0))
    rsdp[8] = -sum(rsdp[:20]) & 0xFF
    rsdp[32] = -sum(rsdp) & 0xFF
    made = bytearray(rsdp)
    for address, part in parts.items():
        made += bytes(address - ADDRESS - len(made)) + part
    return bytes(made)


def _table(name: bytes, revision: int, content: bytes) -> bytes:
    made = bytearray(_HEADER.pack(name, _HEADER.size + len(content), revision, 0, *_OEM) + content)
    made[9] = -sum(made) & 0xFF
    return bytes(made)


def _fadt(dsdt: int) -> bytes:
    content = bytearray(276 - _HEADER.size)
    for offset, layout, value in (
        (40, "<I", dsdt),
        (109, "<H", _BOOT_FLAGS),
        (112, "<I", _FADT_FLAGS),
        (131, "<B", 5),  # the minor revision
        (140, "<Q", dsdt),
    ):
        struct.pack_into(layout, content, offset - _HEADER.size, value)
    return _table(b"FACP", 6, bytes(content))


def _madt() -> bytes:
    content = struct.pack("<II", _LOCAL_APIC, 0)
    content += struct.pack("<BBBBII", 1, 12, 0, 0, _IO_APIC, 0)
    for number in range(CPUS):
        content += struct.pack("<BBBBI", 0, 8, number, number, 1)  # enabled
    return _table(b"APIC", 4, content)


# --- AML


def _dsdt() -> bytes:
    devices = [_serial()]
    for window in _WINDOWS:
        for slot in range(SLOTS):
            devices.append(_virtio(len(devices) - 1, window + slot * _SLOT_SIZE))
    return b"\x10" + _sized(b"\\_SB_" + b"".join(devices))


def _serial() -> bytes:
    port = struct.pack("<BBHHBB", 0x47, 1, _COM1, _COM1, 1, 8)
    return _device(b"COM1", b"PNP0501", 0, port + _interrupt(_COM1_IRQ, shared=False))


def _virtio(number: int, address: int) -> bytes:
    memory = struct.pack("<BHBII", 0x86, 9, 1, address, _USED_SIZE)
    name = f"V{number:03d}".encode()
    return _device(name, b"LNRO0005", number, memory + _interrupt(_IRQ, shared=True))


def _device(name: bytes, kind: bytes, number: int, resources: bytes) -> bytes:
    template = resources + b"\x79\x00"
    content = name + b"\x08_HID\x0d" + kind + b"\x00" + b"\x08_UID\x0a" + bytes([number]) + b"\x08_CCA\x01"
    content += b"\x08_CRS\x11" + _sized(b"\x0a" + bytes([len(template)]) + template)
    return b"\x5b\x82" + _sized(content)


def _interrupt(number: int, *, shared: bool) -> bytes:
    """A consumer of an edge, active high."""
    return struct.pack("<BHBBI", 0x89, 6, 0b11 | shared << 3, 1, number)


def _sized(content: bytes) -> bytes:
    """With its length in front, which counts itself."""
    if len(content) + 1 < 1 << 6:
        return bytes([len(content) + 1]) + content
    for more in (1, 2, 3):
        total = len(content) + 1 + more
        if total < 1 << (4 + 8 * more):
            high = total >> 4
            return bytes([more << 6 | total & 0xF]) + high.to_bytes(more, "little") + content
    raise ValueError("too long")  # pragma: no cover  (a DSDT of 256 MiB)
