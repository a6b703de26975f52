"""Pods whose shims a zygote forked are as any: their lives, log, trace, and their end by kill -9."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from testing.containerd import KATA, Containerd
from testing.guest import PROJECT
from testing.zygote import zygote_of
from tests.e2e.conftest import BUSYBOX

pytestmark = pytest.mark.kata_only


def shims_of(zygote: int, name: str) -> list[int]:
    """Its children that were started for this container."""
    found = []
    for word in Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split():
        with contextlib.suppress(OSError):
            if name.encode() in Path(f"/proc/{word}/cmdline").read_bytes().split(b"\0"):
                found.append(int(word))
    return found


def test_lives_of_pods_through_the_zygote(containerd: Containerd) -> None:
    """A run with its exit code and output; a detached one with an exec and a trace, whose zygote and then
    its shim is killed: nothing is left."""
    with zygote_of(containerd) as zygote:
        done = containerd.run(BUSYBOX, "sh", "-c", "echo out; exit 42", runtime=KATA, check=False)
        assert (done.text, done.code) == ("out", 42)
        name = containerd.new_id("zygote")
        containerd.ctr("run", "-d", "--runtime", KATA, BUSYBOX, name, "sleep", "1000", timeout=120)
        try:
            (shim,) = shims_of(zygote, name)
            traced = subprocess.run(
                [str(PROJECT / ".venv/bin/kata-ctl"), "trace", name],
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            assert traced.returncode == 0, traced.stderr
            phases = [line.split()[0] for line in traced.stdout.splitlines()[2:]]
            assert phases[0] == "daemon"
            assert "vmm.boot" in phases
            assert any(name in line and "serving" in line for line in containerd.log.read_text().splitlines())

            os.kill(zygote, signal.SIGKILL)
            assert (
                containerd.ctr("task", "exec", "--exec-id", "e", name, "echo", "lives", timeout=60).text
                == "lives"
            )

            os.kill(shim, signal.SIGKILL)
            until = time.monotonic() + 60
            while containerd.state_dir(name).exists():
                assert time.monotonic() < until
                time.sleep(0.05)
        finally:
            containerd.remove(name)
    assert [each for each in containerd.processes() if containerd.key(name) in str(each)] == []
