"""The little of ELF that the image builder asks: sections, needed libraries, a module's facts.

What: `Elf` reads a 64-bit little-endian ELF file held in memory.
Why: the closure of shared libraries and the order of kernel modules follow from the files themselves;
neither `ldd` (which runs them) nor `kmod` (which a fresh machine lacks) is needed.
Invariants: nothing outside the given bytes is read; a file that is not what it claims raises `ElfError`.

Source: the ELF-64 object file format; for `.modinfo`, include/linux/moduleinfo.h's strings in a built module.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

__all__ = ["MAGIC", "Elf", "ElfError", "Section"]

MAGIC = b"\x7fELF"
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_NOTE = struct.Struct("<III")
_DYNAMIC = struct.Struct("<qQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SHT_NOBITS = 8
_DT_NEEDED = 1


class ElfError(ValueError):
    """The bytes are not a 64-bit little-endian ELF file, or are cut short."""


@dataclass(frozen=True, slots=True)
class Section:
    """One entry of the section table; offsets and sizes in bytes, `link` an index into the table."""

    name: str
    kind: int
    offset: int
    size: int
    link: int


class Elf:
    """A parsed ELF file. Raises `ElfError` when constructed from something else."""

    def __init__(self, data: bytes) -> None:
        if data[:4] != MAGIC or len(data) < _HEADER.size or data[4:6] != b"\x02\x01":
            raise ElfError("not a 64-bit little-endian ELF file")
        self.data = data
        header = _HEADER.unpack_from(data)
        table, entry_size, count, names_index = header[6], header[11], header[12], header[13]
        try:
            raw = [_SECTION.unpack_from(data, table + i * entry_size) for i in range(count)]
            names_at = raw[names_index][4] if raw else 0
            self.sections = [Section(self._string(names_at + r[0]), r[1], r[4], r[5], r[6]) for r in raw]
        except (struct.error, IndexError) as error:
            raise ElfError(f"the section table is cut short: {error}") from error

    def _string(self, offset: int) -> str:
        end = self.data.find(b"\0", offset)
        if end < 0:
            raise ElfError("a string has no end")
        return self.data[offset:end].decode("utf-8", "replace")

    def section(self, name: str) -> bytes | None:
        """The contents of the first section of that name, or None."""
        for section in self.sections:
            if section.name == name and section.kind != _SHT_NOBITS:
                return self.data[section.offset : section.offset + section.size]
        return None

    def needed(self) -> list[str]:
        """The DT_NEEDED entries: the sonames of the libraries that this file is linked to."""
        names = []
        for section in self.sections:
            if section.name != ".dynamic":
                continue
            strings = self.sections[section.link].offset
            raw = self.data[section.offset : section.offset + section.size]
            for tag, value in _DYNAMIC.iter_unpack(raw[: len(raw) - len(raw) % _DYNAMIC.size]):
                if tag == _DT_NEEDED:
                    names.append(self._string(strings + value))
        return names

    def dynamic_symbols(self) -> tuple[set[str], set[str]]:
        """The names in `.dynsym`: those that this file defines, and those that it wants from others."""
        defined: set[str] = set()
        wanted: set[str] = set()
        for section in self.sections:
            if section.name != ".dynsym":
                continue
            strings = self.sections[section.link].offset
            raw = self.data[section.offset : section.offset + section.size]
            for name, _, _, index, _, _ in _SYMBOL.iter_unpack(raw[: len(raw) - len(raw) % _SYMBOL.size]):
                (defined if index else wanted).add(self._string(strings + name))
        return defined - {""}, wanted - {""}

    def modinfo(self) -> dict[str, list[str]]:
        """A kernel module's `.modinfo`: each key with its values ("depends", "alias", "softdep", ...)."""
        facts: dict[str, list[str]] = {}
        for item in (self.section(".modinfo") or b"").split(b"\0"):
            key, sign, value = item.decode("utf-8", "replace").partition("=")
            if sign:
                facts.setdefault(key, []).append(value)
        return facts

    def notes(self) -> set[tuple[str, int]]:
        """(owner, type) of each entry of the section `.notes`."""
        raw, found, at = self.section(".notes") or b"", set(), 0
        while at + _NOTE.size <= len(raw):
            name_size, size, kind = _NOTE.unpack_from(raw, at)
            at += _NOTE.size
            owner = raw[at : at + name_size].rstrip(b"\0").decode("ascii", "replace")
            found.add((owner, kind))
            at += -(-name_size // 4) * 4 + -(-size // 4) * 4
        return found
