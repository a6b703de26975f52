"""The kernel that brings its own ACPI tables: their sums and addresses, and the file that holds them."""

from __future__ import annotations

import re
import struct

import pytest

from devices.errors import HostError
from guest.acpi import ADDRESS, CPUS, SLOTS, tables, with_tables

HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
PROGRAM = struct.Struct("<IIQQQQQQ")


def kernel(first: int = 0x200000, count: int = 2) -> bytes:
    """An ELF file of this many segments, the first of which is at this offset."""
    headers = [PROGRAM.pack(1, 5, first + index, 0, 0x1000000, 1, 1, 1) for index in range(count)]
    head = HEADER.pack(b"\x7fELF\x02\x01\x01", 2, 62, 1, 0x1000000, 64, 0, 0, 64, 56, count, 64, 0, 0)
    return (head + b"".join(headers)).ljust(first, b"\0") + b"kernel"


def at(address: int) -> bytes:
    """The table at this address, whole; its sum is right."""
    data = tables()[address - ADDRESS :]
    (length,) = struct.unpack_from("<I", data, 4)
    table = data[:length]
    assert sum(table) & 0xFF == 0
    return table


def test_linux_finds_every_table_from_the_first_on() -> None:
    rsdp = tables()[:36]
    assert rsdp.startswith(b"RSD PTR ")
    assert sum(rsdp[:20]) & 0xFF == sum(rsdp) & 0xFF == 0
    (xsdt,) = struct.unpack_from("<Q", rsdp, 24)
    fadt, madt = (at(address) for address in struct.unpack_from("<2Q", at(xsdt), 36))
    assert (fadt[:4], madt[:4], len(fadt)) == (b"FACP", b"APIC", 276)
    (dsdt,) = struct.unpack_from("<Q", fadt, 140)
    assert at(dsdt)[:4] == b"DSDT"
    assert struct.unpack_from("<I", fadt, 40)[0] == dsdt
    assert struct.unpack_from("<I", fadt, 112)[0] & 1 << 20  # reduced hardware
    assert ADDRESS + len(tables()) < 0xF0000  # the rest is not ours


def test_there_are_places_for_devices_and_numbers_for_cpus() -> None:
    text = tables()
    found = re.findall(rb"\x86\x09\x00\x01(....)\x00\x10\x00\x00", text, re.DOTALL)
    addresses = [struct.unpack("<I", address)[0] for address in found]
    assert addresses == [base + slot * 0x2000 for base in (0xC000_0000, 0xE000_0000) for slot in range(SLOTS)]
    assert text.count(b"LNRO0005") == 2 * SLOTS
    madt = text[text.index(b"APIC") :]
    entries = [madt[56 + 8 * number : 64 + 8 * number] for number in range(CPUS)]
    assert [entry[3] for entry in entries] == list(range(CPUS))
    assert {bytes((*entry[:2], entry[4])) for entry in entries} == {b"\x00\x08\x01"}


def test_the_file_gets_one_segment_more_and_is_the_same_otherwise() -> None:
    before = kernel()
    after = with_tables(before)
    assert (len(after), HEADER.unpack_from(after)[10]) == (len(before), 3)
    found = PROGRAM.unpack_from(after, 64 + 2 * 56)
    assert (found[0], found[4], found[5]) == (1, ADDRESS, len(tables()))
    assert after[found[2] : found[2] + found[5]] == tables()
    assert after[0x200000:] == before[0x200000:]
    assert after[64 : 64 + 2 * 56] == before[64 : 64 + 2 * 56]


@pytest.mark.parametrize("data", [b"MZ", kernel(first=0x1800), kernel(count=80)])
def test_a_file_without_room_is_told(data: bytes) -> None:
    with pytest.raises(HostError):
        with_tables(data)
