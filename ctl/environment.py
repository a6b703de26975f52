"""`kata-ctl env`: versions and paths in one place, for a bug report.

Invariants: only reads and asks programs for their version, each with a deadline; what cannot be had is
"" and never an error, for a report is most wanted where something is broken.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from importlib import metadata
from typing import Any

from devices.errors import KataError
from devices.plain import plain
from shim.config import Config, load_config

__all__ = ["first_line", "gather", "run"]

VERSION_TIMEOUT = 5.0
"""Seconds that a program may take to tell its version."""


def first_line(argv: list[str]) -> str:
    """The first line that a program prints, "" if it cannot be run or takes too long."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=VERSION_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace").strip().partition("\n")[0][:200]


def _field(path: str, pattern: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            match = re.search(pattern, file.read(1 << 20), re.MULTILINE)
    except OSError:
        return ""
    return match[1] if match else ""


def _package(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _host() -> dict[str, Any]:
    flags = _field("/proc/cpuinfo", r"^flags\s*: (.*)$").split()
    memory = _field("/proc/meminfo", r"^MemTotal:\s+(\d+)")
    return {
        "distribution": _field("/etc/os-release", r'^PRETTY_NAME="?([^"\n]*)'),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpu": _field("/proc/cpuinfo", r"^model name\s*: (.*)$"),
        "cpus": os.cpu_count() or 0,
        "virtualization": next((flag for flag in ("vmx", "svm") if flag in flags), "none"),
        "memory_mib": int(memory) // 1024 if memory else 0,
        "devices": [
            path for path in ("/dev/kvm", "/dev/vhost-vsock", "/dev/vhost-net") if os.path.exists(path)
        ],
    }


def _programs(config: Config | None) -> dict[str, dict[str, str]]:
    section = config.hypervisor if config else None
    paths = {
        "hypervisor": getattr(section, "path", ""),
        "virtiofsd": getattr(section, "virtio_fs_daemon", ""),
        "vsock": getattr(section, "vsock_daemon", ""),
        "containerd": "containerd",
    }
    from devices.share_fs import find_virtiofsd
    from devices.vsock_daemon import find_vsock_daemon

    for name, find in (("virtiofsd", find_virtiofsd), ("vsock", find_vsock_daemon)):
        try:
            paths[name] = find(paths[name])
        except KataError:
            continue
    return {
        name: {"path": path, "version": first_line([path, "--version"])}
        for name, path in paths.items()
        if path
    }


def _guest(config: Config | None) -> dict[str, Any]:
    if config is None:
        return {}
    section = config.hypervisor
    found: dict[str, Any] = {key: getattr(section, key, "") for key in ("kernel", "initrd", "image")}
    found["kernel_params"] = getattr(section, "kernel_params", "")
    manifest = os.path.join(os.path.dirname(found["kernel"]), "manifest.json")
    try:
        with open(manifest, encoding="utf-8") as file:
            found["manifest"] = json.load(file)
    except (OSError, ValueError):
        pass  # a guest that our build did not make has none
    return found


def gather(config_path: str | None = None) -> dict[str, Any]:
    """Everything, as one JSON-able table of tables."""
    config: Config | None = None
    problem = ""
    try:
        config = load_config(config_path, env=os.environ)
    except KataError as error:
        problem = str(error)
    return {
        "shim": {
            "version": _package("kata-shim"),
            "python": platform.python_version(),
            "protobuf": _package("protobuf"),
            "structlog": _package("structlog"),
        },
        "config": {
            "path": config.path if config else "",
            "files": list(config.files) if config else [],
            "hypervisor": config.hypervisor_name if config else "",
            "agent": config.agent.name if config else "",
            "keys_without_effect": [
                f"{each.section}.{each.key}"
                for each in (config.inactive if config else ())
                if not each.harmless
            ],
            "problem": problem,
        },
        "host": _host(),
        "programs": _programs(config),
        "guest": _guest(config),
    }


def _lines(value: Any, indent: str = "") -> list[str]:
    lines = []
    for key, each in value.items():
        if isinstance(each, dict):
            lines += [f"{indent}{key}:", *_lines(each, indent + "  ")]
        else:
            shown = ", ".join(str(part) for part in each) if isinstance(each, list) else str(each)
            lines.append(f"{indent}{key}: {plain(shown)}".rstrip())
    return lines


def run(config_path: str | None = None, *, as_json: bool = False) -> int:
    """The command; returns its exit code."""
    facts = gather(os.path.abspath(config_path) if config_path else None)
    print(json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts)))
    return 0
