"""The Firecracker that `make setup` fetched, made executable: in the bench host, and only there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from testing.guest import PROJECT, Value, guest_files
from tests.benchhost.conftest import KERNEL_PARAMS

__all__ = ["executables", "section"]


def executables(folder: Path) -> dict[str, str]:
    """Copies of firecracker and jailer, by name."""
    assert os.environ.get("KATA_BENCH_HOST"), "somebody else's build of Firecracker: not on the real machine"
    found = {}
    for name in ("firecracker", "jailer"):
        source = PROJECT / "build" / "firecracker" / name
        if not source.exists():
            pytest.fail(f"{source} is missing: run `make setup`", pytrace=False)
        found[name] = str(shutil.copy(source, folder / name))
        os.chmod(found[name], 0o755)
    return found


def section(folder: Path, *, jailed: bool) -> dict[str, Value | None]:
    """[hypervisor.firecracker]; with a jailer as user 1234."""
    programs = executables(folder)
    keys: dict[str, Value | None] = {
        "path": programs["firecracker"],
        **{key: str(file) for key, file in guest_files().items()},
        "default_vcpus": 1,
        "default_memory": 256,
        "kernel_params": KERNEL_PARAMS,
    }
    if jailed:
        keys |= {"jailer_path": programs["jailer"], "jailer_uid": 1234, "jailer_gid": 1234}
    return keys
