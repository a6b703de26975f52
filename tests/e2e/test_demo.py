"""`make demo` shows containers in VMs, and leaves nothing behind, also when it is interrupted."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testing import leaks
from testing.guest import PROJECT

pytestmark = pytest.mark.kata_only


@pytest.fixture
def demo() -> Iterator[subprocess.Popen[str]]:
    """The demo, started."""
    with subprocess.Popen(
        [sys.executable, "-m", "scripts.demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        cwd=PROJECT,
    ) as process:
        yield process
        process.kill()


def _root(demo: subprocess.Popen[str]) -> tuple[str, str]:
    """The private containerd's directory and tag, which the demo says first."""
    assert demo.stdout is not None
    line = demo.stdout.readline()
    found = re.search(r"(/tmp/kata-(k[0-9a-f]{6})-\w+)", line)
    assert found, line
    return found[1], found[2]


def _left(root: str, tag: str) -> dict[str, set[str]]:
    return leaks.settle({}, lambda: {k: v for k, v in leaks.snapshot(tag=tag, root=root).items()
                                     if k != "network devices"})  # fmt: skip


def test_it_shows_two_kernels_and_cleans_up(demo: subprocess.Popen[str]) -> None:
    root, tag = _root(demo)
    out, _ = demo.communicate(timeout=200)
    assert demo.returncode == 0, out
    assert "guest's kernel" in out
    assert "vmm.boot" in out
    assert not Path(root).exists()
    assert not _left(root, tag)


def test_interrupted_it_cleans_up(demo: subprocess.Popen[str]) -> None:
    root, tag = _root(demo)
    deadline = time.monotonic() + 20
    while not list(Path("/run/kata").glob(f"{tag}-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    demo.send_signal(signal.SIGINT)
    out, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, out
    assert not Path(root).exists()
    assert not _left(root, tag)
