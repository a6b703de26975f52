"""`kata-ctl conformance`: does a VMM's driver keep its promises; asked of real VMs and their guests.

What: runs the suite of the package `conformance` with pytest against the plugin of that name, as its
configuration has it.
Why pytest is not among what kata-shim needs: a host that runs containers has no use for it.
Invariants: what is missing is told before a test runs; the exit code is 0 if all tests passed, else 1.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

import conformance
from devices.errors import HostError
from hypervisors.registry import get_plugin

__all__ = ["arguments", "run"]

_NEEDED = {"pytest": "pytest", "pytest_asyncio": "pytest-asyncio", "pytest_timeout": "pytest-timeout"}


def arguments(name: str, config: str, *, only: str = "", first: bool = False) -> list[str]:
    """pytest's command line, without the program."""
    (home,) = conformance.__path__
    place = ["-c", os.path.join(home, "pytest.ini"), "--rootdir", home, "-p", "conformance.plugin"]
    chosen = [f"--hypervisor={name}", f"--hypervisor-config={config}"]
    chosen += [*(["-k", only] if only else []), *(["-x"] if first else [])]
    return [*place, *chosen, "--pyargs", "conformance.test_vmm"]


def run(name: str, *, config: str = "", only: str = "", first: bool = False) -> int:
    """The command; returns its exit code. `only`: those that pytest's -k chooses; `first`: stop at a failure.
    Raises ConfigError for an unknown VMM, HostError."""
    missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
    if missing:
        raise HostError(
            f"the suite runs by pytest, and {', '.join(missing)} is not installed beside kata-shim",
            phase="conformance",
            hint=f"python3 -m pip --python {sys.executable} install {' '.join(missing)}; or, where kata-shim"
            " itself comes by pip: pip install 'kata-shim[conformance]'",
            code="FAILED_PRECONDITION",
        )
    if os.geteuid() != 0:
        raise HostError(
            "the suite starts VMs, with namespaces and daemons of their own",
            phase="conformance",
            hint="run it as root",
            code="FAILED_PRECONDITION",
        )
    get_plugin(name)
    import pytest

    return 1 if pytest.main(arguments(name, config, only=only, first=first)) else 0
