"""`kata-ctl conformance`: does a VMM's driver keep its promises; asked of real VMs and their guests.

What: runs the suite of the package `conformance` with pytest against the plugin of that name, as its
configuration has it.
Why pytest is not among what kata-shim needs: a host that runs containers has no use for it.
Invariants: what is missing is told before a test runs; the exit code is 0 if all tests passed, else 1.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType

import conformance
from devices.errors import HostError
from hypervisors.config import HostedSection
from hypervisors.registry import get_plugin

__all__ = ["arguments", "in_bench_host", "run"]

_BENCH_LIMIT = 3600  # seconds
_NEEDED = {"pytest": "pytest", "pytest_asyncio": "pytest-asyncio", "pytest_timeout": "pytest-timeout"}


def arguments(name: str, config: str, *, only: str = "", first: bool = False) -> list[str]:
    """pytest's command line, without the program."""
    (home,) = conformance.__path__
    place = ["-c", os.path.join(home, "pytest.ini"), "--rootdir", home, "-p", "conformance.plugin"]
    chosen = [f"--hypervisor={name}", f"--hypervisor-config={config}"]
    chosen += [*(["-k", only] if only else []), *(["-x"] if first else [])]
    return [*place, *chosen, "--pyargs", "conformance.test_vmm"]


def in_bench_host(
    name: str, config: str, plugin: object, *, only: str = "", first: bool = False
) -> tuple[str, list[str]]:
    """The checkout, and the command that runs the suite in its bench host, with the directories of the plugin
    and of its configuration. Raises HostError where kata-shim is installed without its checkout."""
    (home,) = conformance.__path__
    checkout = os.path.dirname(os.path.realpath(home))
    if not os.path.isdir(os.path.join(checkout, "tests", "benchhost")):
        raise HostError(
            f"the bench host is part of kata-shim's checkout, and {checkout} is none",
            phase="conformance",
            hint="in a checkout: make setup, then .venv/bin/kata-ctl conformance NAME --bench-host; where"
            " there is a KVM the suite needs none: leave --bench-host out",
            code="FAILED_PRECONDITION",
        )
    module = sys.modules[type(plugin).__module__.partition(".")[0]]
    places = {os.path.dirname(os.path.realpath(path)) for path in [config, *_roots(module)] if path}
    shares = sorted(place for place in places if os.path.commonpath([place, checkout]) != checkout)
    paths = [place for place in sys.path if place and os.path.commonpath([place, checkout]) != checkout]
    words = ["env", f"PYTHONPATH={':'.join(map(os.path.realpath, paths))}"] if shares else []
    words += [sys.executable, "-m", "ctl", "conformance", name]
    words += ["--config", os.path.realpath(config)] if config else []
    words += [*(["-k", only] if only else []), *(["-x"] if first else [])]
    bench = [sys.executable, "-m", "tests.benchhost", f"--limit={_BENCH_LIMIT}"]
    return checkout, [*bench, *(f"--share={place}" for place in shares), "--", shlex.join(words)]


def _roots(module: ModuleType) -> list[str]:
    """The directories of a package, the file of a module."""
    places = list(getattr(module, "__path__", ()))
    return [os.path.join(place, "").rstrip("/") for place in places] or [str(module.__file__)]


def run(name: str, *, config: str = "", only: str = "", first: bool = False, bench_host: bool = False) -> int:
    """The command; returns its exit code. `only`: those that pytest's -k chooses; `first`: stop at a failure;
    `bench_host`: in a nested machine with KVM. Raises ConfigError for an unknown VMM, HostError."""
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
    plugin = get_plugin(name)
    if issubclass(plugin.section, HostedSection):
        raise HostError(
            f"VMs of {name} are somebody else's, and boot his image: the suite's probe cannot be in it",
            phase="conformance",
            hint="the driver is tried against a service: docs/remote.md",
            code="UNIMPLEMENTED",
        )
    if bench_host:
        checkout, command = in_bench_host(name, config, plugin, only=only, first=first)
        return 1 if subprocess.run(command, cwd=checkout, check=False).returncode else 0
    import pytest

    return 1 if pytest.main(arguments(name, config, only=only, first=first)) else 0
