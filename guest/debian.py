"""Debian packages as build inputs: which version apt offers, the file, its contents. Nothing is installed.

What: `candidates` asks apt for versions, `download` fetches exactly those into a directory,
`unpack` extracts them below one root.
Why apt: it checks the archive's signatures and hashes, and every Debian machine has its sources.
Invariants: a file in the download directory is complete (it got its name by a rename); the host's
package database is only read.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping

from devices.errors import HostError

from .tools import PHASE, run_tool

__all__ = ["apt_state", "candidates", "deb_name", "download", "kernel_package", "unpack"]

_UPDATE = "have Debian 12's sources in apt, run `apt-get update`, and try again"
_APT_STATE = ("/var/lib/apt/lists", "/var/lib/dpkg/status", "/etc/apt/sources.list", "/etc/apt/preferences")
_APT = ("-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3")


def apt_state() -> list[tuple[str, int]]:
    """What apt's answers depend on, as modification times: while it is the same, so are they."""
    watched = [*_APT_STATE, *sorted(glob.glob("/etc/apt/*.d/*"))]
    return [(path, os.stat(path).st_mtime_ns) for path in watched if os.path.exists(path)]


def kernel_package(meta: str) -> str:
    """The package with the newest kernel that the meta package depends on. Raises `HostError`."""
    output = run_tool(["apt-cache", "depends", "--important", meta], hint=_UPDATE)
    found = re.search(r"Depends: (linux-image-\d[\w.+-]*)", output)
    if found is None:
        raise _unknown([meta])
    return found.group(1)


def candidates(names: Iterable[str]) -> dict[str, str]:
    """The version that apt would install now, for each package. Raises `HostError` naming the unknown."""
    wanted = list(names)
    output = run_tool(["apt-cache", "policy", *wanted], hint=_UPDATE)
    found = dict(re.findall(r"^(\S+):\n(?:  .*\n)*?  Candidate: (\S+)", output, re.MULTILINE))
    missing = [name for name in wanted if found.get(name, "(none)") == "(none)"]
    if missing:
        raise _unknown(missing)
    return {name: found[name] for name in wanted}


def _unknown(names: list[str]) -> HostError:
    return HostError(
        f"apt does not know the package{'s' if len(names) > 1 else ''} {', '.join(names)}",
        phase=PHASE,
        hint="the guest is built from Debian 12 (bookworm): have its sources in apt and run `apt-get update`",
    )


def deb_name(package: str, version: str) -> str:
    """Our name for the file: unlike apt's it does not depend on the architecture field."""
    return f"{package}_{version.replace(':', '%3a')}.deb"


def download(versions: Mapping[str, str], directory: str) -> list[str]:
    """Have each package's file in `directory`; return those that had to be fetched. Raises `HostError`."""
    os.makedirs(directory, exist_ok=True)
    missing = [
        name
        for name, version in versions.items()
        if not os.path.exists(f"{directory}/{deb_name(name, version)}")
    ]
    if missing:
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            exact = [f"{name}={versions[name]}" for name in missing]
            run_tool(["apt-get", *_APT, "download", *exact], cwd=scratch, hint=_UPDATE)
            for name in missing:
                final = deb_name(name, versions[name])
                (fetched,) = glob.glob(f"{glob.escape(scratch)}/{final.removesuffix('.deb')}_*.deb")
                os.replace(fetched, f"{directory}/{final}")
    return missing


def unpack(versions: Mapping[str, str], directory: str, root: str) -> None:
    """Extract the packages into `root`, which must not exist. Raises `HostError`."""
    shutil.rmtree(root, ignore_errors=True)
    for name, version in versions.items():
        run_tool(
            ["dpkg-deb", "-x", f"{directory}/{deb_name(name, version)}", root],
            hint=f"remove {directory} and build again",
        )
