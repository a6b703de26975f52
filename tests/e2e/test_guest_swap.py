"""A guest with `enable_guest_swap` has swap of the configured size, uses it, and leaves no file behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from testing.containerd import Containerd
from testing.guest import Value, write_configuration

pytestmark = pytest.mark.kata_only


def test_more_is_used_than_the_vm_has_memory(
    containerd: Containerd, tmp_path: Path, no_leaks: Callable[[], None]
) -> None:
    directory = tmp_path / "swap"
    overrides: dict[str, dict[str, Value | None]] = {
        "hypervisor.qemu": {
            "enable_guest_swap": True,
            "guest_swap_path": str(directory),
            "guest_swap_size_percent": 200,
            "default_memory": 128,
        }
    }
    configuration = write_configuration(tmp_path / "configuration.toml", overrides)
    # A tmpfs larger than the memory, filled: its pages go to swap.
    fill = "head -c 130000000 /dev/zero > /big/x"
    script = (
        f"grep -E 'MemTotal|SwapTotal' /proc/meminfo; {fill}; grep SwapFree /proc/meminfo; wc -c < /big/x"
    )
    mount = ("--mount", "type=tmpfs,src=tmpfs,dst=/big,options=size=200m")
    options = ("--runtime-config-path", str(configuration), *mount)
    done = containerd.run("local/busybox:1", "sh", "-c", script, options=options, timeout=120)

    *kib, size = done.text.splitlines()
    memory, total, free = (int(line.split()[1]) << 10 for line in kib)
    assert total == (256 << 20) - 4096
    assert memory < 130_000_000 == int(size)
    assert total - free > 10 << 20
    assert list(directory.iterdir()) == []
