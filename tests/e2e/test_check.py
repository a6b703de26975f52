"""`kata-ctl check` on the machine at hand: every line is true of it, in bounded time."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from testing.containerd import Containerd
from testing.guest import PROJECT

pytestmark = pytest.mark.kata_only


def test_this_host_can_run_it_and_kvm_is_timed(containerd: Containerd) -> None:
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "ctl", "check", "--json", "--config", str(containerd.configuration)],
        cwd=PROJECT,
        env=containerd.environment,
        capture_output=True,
        check=False,
        timeout=60,
    )
    told = json.loads(done.stdout)
    lines = {each["name"]: each for each in told["findings"]}
    assert (done.returncode, told["ok"]) == (0, True), lines
    assert time.monotonic() - begin < 60
    assert {"config", "kernel", "image", "qemu", "cpu", "kvm", "vsock", "virtiofsd", "netns"} <= lines.keys()
    assert "QEMU emulator version" in lines["qemu"]["text"]
    assert "virtiofsd" in lines["virtiofsd"]["text"]
    # Whether KVM is of use here is this machine's matter; that it was measured is ours.
    if not os.path.exists("/dev/kvm"):
        assert lines["kvm"]["text"] == "/dev/kvm does not exist"
    elif platform.machine() == "x86_64" and os.access("/dev/kvm", os.R_OK | os.W_OK):
        assert "times as long as on the host" in lines["kvm"]["text"] or "within 2 s" in lines["kvm"]["text"]
        slow = "emulates the CPU" in lines["kvm"]["text"] or "within 2 s" in lines["kvm"]["text"]
        assert (lines["kvm"]["level"] == "warn") is slow
    assert Path(lines["kernel"]["text"].partition(",")[0]).exists()
