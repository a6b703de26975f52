"""The ELF reader tells needed libraries, symbols, notes and module facts, and refuses what is no ELF."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from guest.elf import Elf, ElfError

SOURCE = """
#include <math.h>
#include <stdlib.h>
__attribute__((section(".modinfo"), used)) static const char facts[] = "depends=a,b\\0alias=x:1\\0alias=x:2";
int mine(void) { return 0; }
double other(double x) { return sin(x) + abs((int)x); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A shared library of ours."""
    folder = tmp_path_factory.mktemp("elf")
    (folder / "x.c").write_text(SOURCE)
    command = ["gcc", "-shared", "-fPIC", "-Wl,--no-as-needed", "-o", "x.so", "x.c", "-lm"]
    subprocess.run(command, cwd=folder, check=True)
    return (folder / "x.so").read_bytes()


def test_needed_libraries(library: bytes) -> None:
    """DT_NEEDED, in its order."""
    assert Elf(library).needed() == ["libm.so.6", "libc.so.6"]


def test_symbols(library: bytes) -> None:
    """What it defines and what it wants are told apart."""
    defined, wanted = Elf(library).dynamic_symbols()

    assert {"mine", "other"} <= defined
    assert "sin" in wanted - defined


def test_module_facts(library: bytes) -> None:
    """A key may have several values."""
    assert Elf(library).modinfo() == {"depends": ["a,b"], "alias": ["x:1", "x:2"]}


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"#!/bin/sh\n" * 20, b"\x7fELF\x01\x01" + bytes(100)])
def test_not_an_elf_file(data: bytes) -> None:
    """Scripts, stumps and 32-bit files are refused."""
    with pytest.raises(ElfError):
        Elf(data)


def test_cut_short() -> None:
    """A section table beyond the end is an error and not garbage."""
    data = Path(sys.executable).resolve().read_bytes()
    with pytest.raises(ElfError, match="cut short"):
        Elf(data[: len(data) // 2])
