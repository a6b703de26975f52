"""The programs of the building machine that the guest's build runs, and their failures as errors.

Invariants: a program that is missing or fails ends the build with one paragraph that names the package
or shows the program's last words.
"""

from __future__ import annotations

import os
import subprocess

from devices.errors import HostError

__all__ = ["PHASE", "run_tool"]

PHASE = "guest build"
_PACKAGES = {
    "apt-cache": "apt",
    "apt-get": "apt",
    "debugfs": "e2fsprogs",
    "dpkg-deb": "dpkg",
    "gcc": "gcc libc6-dev",
    "mkfs.ext4": "e2fsprogs",
    "strip": "binutils",
}


def run_tool(
    argv: list[str], *, cwd: str | None = None, env: dict[str, str] | None = None, hint: str = ""
) -> str:
    """What the program wrote, stdout first. Raises `HostError`; `hint` is for its failure."""
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, "LC_ALL": "C", **(env or {})},
        )
    except FileNotFoundError as error:
        package = _PACKAGES.get(argv[0], argv[0])
        raise HostError(
            f"there is no program {argv[0]}", phase=PHASE, hint=f"apt-get install {package}"
        ) from error
    if done.returncode != 0:
        words = " ".join((done.stderr or done.stdout).strip().splitlines()[-3:])[-400:]
        raise HostError(f"{argv[0]} failed: {words}", phase=PHASE, hint=hint)
    return done.stdout + done.stderr
