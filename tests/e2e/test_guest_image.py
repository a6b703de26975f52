"""The guest is built reproducibly and in no time when nothing changed, boots bare, and says what it lacks."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from guest.boot import AGENT_PORT, GuestVM
from guest.build import OUTPUTS, build
from proto import health_pb2
from ttrpc import Client

REPOSITORY = Path(__file__).resolve().parents[2]
GUEST = REPOSITORY / "build" / "guest"

pytestmark = pytest.mark.kata_only


@pytest.fixture(scope="module")
def scratch_build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """A build of its own, from packages that `make guest` has downloaded."""
    out = tmp_path_factory.mktemp("guest") / "a" / "longer" / "path"
    shutil.copytree(GUEST / "debs", out / "debs")
    return out, build(str(out), quiet=True)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each output."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in OUTPUTS}


def test_two_builds_are_equal(scratch_build: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    """Other directory, other moment, nothing shared but the packages: the same bytes."""
    first, manifest = scratch_build
    (tmp_path / "debs").symlink_to(first / "debs")
    again = build(str(tmp_path), quiet=True)

    assert hashes(first) == hashes(tmp_path)
    assert again == manifest
    assert {name: entry["sha256"] for name, entry in again["files"].items()} == hashes(tmp_path)


def test_nothing_changed_is_noticed_at_once(scratch_build: tuple[Path, dict[str, object]]) -> None:
    """Below a second, and no file is touched."""
    out, _ = scratch_build
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    begin = time.monotonic()
    build(str(out), quiet=True)

    assert time.monotonic() - begin < 1.0
    assert {path: path.stat().st_mtime_ns for path in before if path.name in OUTPUTS} == {
        path: stamp for path, stamp in before.items() if path.name in OUTPUTS
    }


def test_a_lost_or_cut_file_is_built_again(scratch_build: tuple[Path, dict[str, object]]) -> None:
    """A manifest alone is not a guest."""
    out, _ = scratch_build
    expected = hashes(out)
    os.truncate(out / "rootfs.img", 4096)
    (out / "vmlinux").unlink()
    build(str(out), quiet=True)

    assert hashes(out) == expected


def test_the_built_guest_matches_its_manifest() -> None:
    """What the other tests boot is what the manifest describes."""
    manifest = json.loads((GUEST / "manifest.json").read_text())

    assert hashes(GUEST) == {name: entry["sha256"] for name, entry in manifest["files"].items()}


@pytest.fixture
async def vm(tmp_path: Path) -> AsyncIterator[GuestVM]:
    """A booted guest with a shared directory."""
    async with GuestVM(GUEST, share=tmp_path) as guest:
        await guest.wait_home()
        yield guest


async def test_boots_to_an_agent_that_answers(vm: GuestVM) -> None:
    """Kata's health check over vsock; nothing on the console complains."""
    connection, _ = await vm.connect(AGENT_PORT)
    client = Client(connection)
    check = health_pb2.DESCRIPTOR.services_by_name["Health"].methods_by_name["Check"]
    reply = await client.call(check, health_pb2.CheckRequest(), timeout=30)
    await client.close()

    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    assert vm.console_tail() == ""


async def test_nothing_is_left_of_it() -> None:
    """Processes and directory go with the context, also in the middle of the boot."""
    async with GuestVM(GUEST) as guest:
        directory, qemu = guest.directory, guest.qemu
        assert qemu is not None
        assert os.path.isdir(directory)

    assert qemu.returncode is not None
    assert not os.path.exists(directory)


@pytest.mark.parametrize(
    ("append", "words"),
    [
        ("root=/dev/vdz", "the root device /dev/vdz did not appear in 5 s"),
        ("root=UUID=1234", "the kernel command line has root=UUID=1234; it must be a path below /dev"),
        ("rootfstype=squashfs", "cannot mount /dev/vda as squashfs"),
        ("init=/no/such", "cannot execute /no/such: No such file or directory"),
    ],
)
async def test_what_is_missing_is_said_on_the_console(append: str, words: str) -> None:
    """One line with the reason, then the machine is off: nobody waits for a deadline."""
    async with GuestVM(GUEST, append=append) as guest:
        async with asyncio.timeout(60):
            await guest.wait_end()

        assert f"guest-init: {words}" in " ".join(guest.console_tail().split())


async def test_the_inside() -> None:
    """Read-only root, the file systems that a container needs, cgroup controllers, loopback, modules."""
    script = (
        "mount; echo controllers: $(cat /sys/fs/cgroup/cgroup.subtree_control);"
        " ip addr show lo | grep inet; touch /x; crun --version | head -n 1; echo DO''NE\n"
    )
    async with GuestVM(GUEST, append="init=/bin/sh") as guest:
        await guest.wait_console("# ")
        guest.write_console(script)
        await guest.wait_console("DONE")
        seen = guest.console_tail(100)

    assert "/dev/vda on / type ext4 (ro," in seen
    for kind, where in {
        "proc": "/proc",
        "sysfs": "/sys",
        "devpts": "/dev/pts",
        "mqueue": "/dev/mqueue",
        "tmpfs": "/run",
        "cgroup2": "/sys/fs/cgroup",
    }.items():
        assert f"on {where} type {kind}" in seen
    controllers = seen.partition("\ncontrollers: ")[2].partition("\n")[0].split()
    assert {"cpu", "memory", "pids", "io"} <= set(controllers)
    assert "inet 127.0.0.1/8" in seen
    assert "touch: /x: Read-only file system" in seen
    assert "crun version" in seen


async def test_late_modules_are_there_or_come_by_themselves() -> None:
    """Overlay is mounted without anybody loading it; a module from no list comes by modprobe."""
    script = (
        "mkdir -p /tmp/a /tmp/b /tmp/c /tmp/d; modprobe veth && echo veth''=ok;"
        " mount -t overlay -o lowerdir=/tmp/a,upperdir=/tmp/b,workdir=/tmp/c o /tmp/d && echo overlay''=ok;"
        " echo DO''NE\n"
    )
    async with GuestVM(GUEST, append="init=/bin/sh") as guest:
        await guest.wait_console("# ")
        guest.write_console(script)
        await guest.wait_console("DONE")

        assert "veth=ok" in guest.console_tail(100)
        assert "overlay=ok" in guest.console_tail(100)
