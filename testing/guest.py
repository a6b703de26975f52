"""The configuration under which the demo, the tests and the bench run the shim from this checkout.

What: writes a `configuration.toml` that names the guest in build/guest and the vsock daemon in
build/vsock, small and fast rather than roomy. `overrides` change single keys, to break things on purpose.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["GUEST", "PROJECT", "Value", "guest_files", "write_configuration"]

PROJECT = Path(__file__).resolve().parent.parent
GUEST = PROJECT / "build" / "guest"

Value = str | int | float | bool | list[str]


def guest_files() -> dict[str, Path]:
    """Kernel, initrd and image of the built guest, by configuration key. They may not exist yet."""
    return {
        "kernel": GUEST / "vmlinux",
        "initrd": GUEST / "initrd.img",
        "image": GUEST / "rootfs.img",
    }


def _toml(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def write_configuration(
    path: Path, overrides: Mapping[str, Mapping[str, Value | None]] | None = None
) -> Path:
    """Write the configuration to `path`; `overrides` is {section: {key: value}}, None takes a key away."""
    sections: dict[str, dict[str, Value]] = {
        "hypervisor.qemu": {
            "path": "/usr/bin/qemu-system-x86_64",
            **{key: str(file) for key, file in guest_files().items()},
            "default_vcpus": 1,
            "default_memory": 256,
            "shared_fs": "virtio-fs",
        },
        "runtime": {"hypervisor_name": "qemu", "agent_name": "kata"},
        # A guest under TCG on a busy machine takes its time.
        "agent.kata": {"reconnect_timeout_ms": 120000, "create_container_timeout": 120},
    }
    daemon = PROJECT / "build" / "vsock" / "usr" / "bin" / "vhost-device-vsock"
    if daemon.exists():
        sections["hypervisor.qemu"]["vsock_daemon"] = str(daemon)
    for section, values in (overrides or {}).items():
        target = sections.setdefault(section, {})
        for key, value in values.items():
            if value is None:
                target.pop(key, None)
            else:
                target[key] = value
    lines = [
        line
        for section, values in sections.items()
        for line in (f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items()), "")
    ]
    path.write_text("\n".join(lines))
    return path
