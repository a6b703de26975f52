"""A VM that begins with a template is a machine of its own and leaves the template as it was; and where there
can be none, it boots.

`make test-templates` (KATA_TEMPLATES=all) runs those that take long, too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from testing import leaks
from testing.containerd import KATA, Containerd
from testing.guest import Value
from testing.images import busybox_image
from tests.netlab import GUEST4, HOST4, NetLab

pytestmark = pytest.mark.kata_only

BUSYBOX = "local/busybox:1"
# In a process that the guest starts afterwards: what it draws, what it is given, and what it is called.
SECRETS = (
    "head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id;"
    " mktemp -u; grep stack /proc/self/maps; date +%s"
)
STARTS = int(os.environ.get("KATA_TEMPLATE_STARTS", "200"))
_long = pytest.mark.skipif(
    os.environ.get("KATA_TEMPLATES") != "all", reason="takes long: make test-templates"
)


class Templates:
    """A containerd whose pods begin with templates, in a store of its own."""

    def __init__(self, containerd: Containerd, store: Path) -> None:
        self.containerd = containerd
        self.store = store

    def ctl(self, action: str, *more: str) -> subprocess.CompletedProcess[str]:
        """`kata-ctl factory`."""
        argv = [sys.executable, "-m", "ctl", "factory", action, *more]
        argv += ["--config", str(self.containerd.configuration)]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    def digest(self) -> str:
        """Of the one template's memory."""
        (found,) = [entry for entry in self.store.iterdir() if entry.is_dir()]
        with (found / "memory").open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def log(self, since: int = 0) -> str:
        """What containerd and its shims said, from this byte on."""
        return self.containerd.log.read_text(errors="replace")[since:]

    def detached(self, name: str, *options: str) -> str:
        """A container that sleeps; its name."""
        words = ("run", "-d", "--runtime", KATA, *options, BUSYBOX, name, "sleep", "1000")
        self.containerd.ctr(*words, timeout=900)  # twenty at once, on two cores
        return name

    def ask(self, name: str, script: str) -> list[str]:
        """The lines of a script that a running container executes."""
        words = ("task", "exec", "--exec-id", f"x{time.monotonic_ns()}", name, "sh", "-c", script)
        return self.containerd.ctr(*words, timeout=900).text.splitlines()


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Templates]:
    archive = tmp_path_factory.mktemp("images") / "busybox.tar"
    busybox_image(archive, BUSYBOX)
    store = tmp_path_factory.mktemp("templates") / "store"
    overrides: dict[str, dict[str, Value | None]] = {
        "hypervisor.qemu": {"shared_fs": "none"},
        "hypervisor.qemu.factory": {"enable_template": True, "template_path": str(store)},
    }
    with Containerd(debug=True, overrides=overrides) as daemon:
        daemon.ctr("image", "import", str(archive))
        made = Templates(daemon, store)
        yield made
        made.ctl("destroy")


def test_two_vms_of_a_template_share_no_secret(templates: Templates) -> None:
    """Random numbers, uuids, boot ids, temporary names, addresses of programs; and their clocks are right.
    One has the network of its pod."""
    names = [templates.containerd.new_id("own") for _ in range(2)]
    try:
        templates.detached(names[0])  # makes it
        before = templates.digest()
        with NetLab() as lab:
            templates.detached(names[1], "--with-ns", f"network:{lab.pod}")
            assert GUEST4 in "".join(templates.ask(names[1], "ip -4 addr show eth0"))
            assert " 0% packet loss" in "".join(templates.ask(names[1], f"ping -c 1 -W 20 {HOST4}"))
        said = [templates.ask(name, SECRETS) for name in names]
        assert [len(lines) for lines in said] == [6, 6], said
        for one, other in zip(said[0][:-1], said[1][:-1], strict=True):
            assert one != other
        for lines in said:
            assert abs(int(lines[-1]) - time.time()) < 60
        assert templates.digest() == before, "a VM has written the template"
    finally:
        for name in names:
            templates.containerd.remove(name)
    log = templates.log()
    assert log.count("template made") == 1
    assert "the VM boots" not in log
    status = templates.ctl("status", "--json")
    assert status.returncode == 0, status.stderr
    (listed,) = json.loads(status.stdout)["templates"]
    assert listed["digest"] == json.loads(status.stdout)["wanted"]
    assert templates.ctl("destroy").stdout.endswith("1 removed\n")
    assert [entry.name for entry in templates.store.iterdir()] == ["lock"]


@_long
def test_a_broken_template_is_rejected_and_the_vm_boots(templates: Templates) -> None:
    """It is tried once; who comes later boots at once, until it is made anew."""
    containerd = templates.containerd
    assert containerd.run(BUSYBOX, "echo", "made").text == "made"
    (state,) = templates.store.glob("*/device_state")
    state.chmod(0o600)
    state.write_bytes(state.read_bytes()[:1000])
    since = len(templates.log())
    assert containerd.run(BUSYBOX, "echo", "booted").text == "booted"
    assert containerd.run(BUSYBOX, "echo", "again").text == "again"
    told = templates.log(since)
    assert told.count("the VM boots") == 2
    assert "its VM could not begin with the template" in told
    assert "there is no template, because:" in told
    assert templates.ctl("status").returncode == 1
    made = templates.ctl("init")
    assert (made.returncode, made.stderr) == (0, "")
    since = len(templates.log())
    assert containerd.run(BUSYBOX, "echo", "from it").text == "from it"
    assert "the VM boots" not in templates.log(since)


@_long
def test_a_shim_that_is_killed_while_it_makes_one_leaves_nothing(templates: Templates) -> None:
    templates.ctl("destroy")
    containerd = templates.containerd
    name = containerd.new_id("killed")
    with ThreadPoolExecutor(1) as pool:
        argv = ("run", "--rm", "--runtime", KATA, BUSYBOX, name, "true")
        running = pool.submit(containerd.ctr, *argv, check=False)
        while not list(templates.store.glob("*.new/vm/qmp.sock")):
            assert not running.done()
            time.sleep(0.01)
        for process in containerd.processes():
            if "containerd-shim" in " ".join(process.argv):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, 9)
        assert running.result().code != 0
    containerd.remove(name)
    assert containerd.run(BUSYBOX, "echo", "next").text == "next"
    assert [entry.suffix for entry in templates.store.iterdir() if entry.is_dir()] == [""]


@_long
def test_twenty_at_once(templates: Templates) -> None:
    containerd = templates.containerd
    templates.ctl("init")
    names = [containerd.new_id("many") for _ in range(20)]
    try:
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(templates.detached, names))
            said = list(pool.map(lambda name: templates.ask(name, SECRETS), names))
        for column in list(zip(*said, strict=True))[:-1]:
            assert len(set(column)) == len(names)
    finally:
        for name in names:
            containerd.remove(name)


@_long
def test_many_starts(templates: Templates) -> None:
    """One after the other: no leak, no wrong clock, no id twice."""
    containerd = templates.containerd
    templates.ctl("init")
    containerd.run(BUSYBOX, "true")
    before, since, seen = leaks.snapshot(), len(templates.log()), set()
    for _ in range(STARTS):
        lines = containerd.run(BUSYBOX, "sh", "-c", SECRETS).text.splitlines()
        assert abs(int(lines[-1]) - time.time()) < 60
        seen.update(lines[:4])
    assert len(seen) == 4 * STARTS
    assert "the VM boots" not in templates.log(since)
    assert leaks.settle(before, leaks.snapshot) == {}
