"""The program that tests run in containers for what busybox has no applet for (probe.c)."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["build_probe"]


def build_probe(directory: Path) -> Path:
    """Compile it to `directory`/probe, for any root file system; the directory."""
    source = Path(__file__).with_name("probe.c")
    command = ["gcc", "-static", "-pthread", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-o", str(directory / "probe"), str(source)], check=True)
    return directory
