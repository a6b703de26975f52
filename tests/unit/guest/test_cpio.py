"""The initramfs is a valid newc archive, and the same bytes for the same entries in any order."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from guest import cpio

ENTRIES = [
    cpio.file("init", b"#!/bin/sh\n", 0o755),
    cpio.directory("modules"),
    cpio.file("modules/b.ko", b"x" * 4097),
    cpio.file("modules/a", b""),
]


def test_cpio_lists_what_was_written(tmp_path: Path) -> None:
    """cpio(1) reads names, sizes and contents back."""
    data = cpio.archive(ENTRIES, time=1_000_000_000)
    listing = subprocess.run(["cpio", "-t", "--quiet"], input=data, capture_output=True, check=True)
    subprocess.run(["cpio", "-i", "--quiet"], input=data, cwd=tmp_path, check=True)

    assert listing.stdout.decode().split() == ["init", "modules", "modules/a", "modules/b.ko"]
    assert (tmp_path / "modules/b.ko").read_bytes() == b"x" * 4097
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755


def test_order_of_entries_does_not_matter() -> None:
    """Two orders, one archive."""
    assert cpio.archive(ENTRIES, time=1) == cpio.archive(reversed(ENTRIES), time=1)


def test_a_name_cannot_occur_twice() -> None:
    """The kernel would silently take the last."""
    with pytest.raises(ValueError, match="twice"):
        cpio.archive([cpio.directory("dev"), cpio.directory("dev")], time=1)
