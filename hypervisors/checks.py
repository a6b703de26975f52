"""What plugins' `check` has in common: is the program there, does KVM open, is there a virtiofsd."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

from devices.errors import KataError
from hypervisors.base import CheckResult

__all__ = ["found", "kvm", "on_path"]


def on_path(name: str, program: str, hint: str) -> CheckResult:
    """A program by its name."""
    path = shutil.which(program) or ""
    return CheckResult(name, bool(path), path or f"{program} is not on PATH", hint)


def kvm() -> CheckResult:
    """For a VMM that has no other accelerator."""
    opens = os.access("/dev/kvm", os.R_OK | os.W_OK)
    text = "/dev/kvm" if opens else "/dev/kvm cannot be opened"
    return CheckResult("kvm", opens, text, "modprobe kvm_intel or kvm_amd")


def found(name: str, find: Callable[[], str]) -> CheckResult:
    """What `find` looks for; it raises KataError."""
    try:
        return CheckResult(name, True, find())
    except KataError as error:
        return CheckResult(name, False, error.cause, error.hint)
