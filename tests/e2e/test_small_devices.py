"""The devices that a VM has, or can have, do what they are for: entropy arrives, freed memory goes back."""

from __future__ import annotations

import asyncio
import os

import pytest

from devices.config import BalloonConfig
from tests.e2e.guests import make_spec, read_some
from tests.e2e.vms import Boot

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="virtiofsd needs root"), pytest.mark.kata_only]

MIB = 1 << 20
USED = 64  # MiB


def backed(pid: int) -> int:
    """Bytes of the guest's memory that the host has pages for, whoever maps them."""
    for entry in os.listdir(f"/proc/{pid}/fd"):
        link = f"/proc/{pid}/fd/{entry}"
        try:
            if "memory-backend-memfd" in os.readlink(link):
                return os.stat(link).st_blocks * 512
        except OSError:
            continue
    raise AssertionError("QEMU has no memfd for the guest's memory")


async def settles(pid: int, most: int) -> bool:
    """Whether it comes down to so many bytes, in a minute: the guest reports them after a while."""
    for _ in range(600):
        if backed(pid) <= most:
            return True
        await asyncio.sleep(0.1)
    return False


async def test_memory_that_the_guest_freed_goes_back_to_the_host(boot: Boot) -> None:
    """Though virtiofsd and the vsock daemon map all of it, too: a hole in the file is one for all of them."""
    vm, guest, _ = await boot(also=[BalloonConfig()])
    pid = await vm.get_vmm_master_tid()
    assert len(await vm.get_pids()) >= 2
    before = backed(pid)
    held = await guest.start(
        make_spec(
            "sh", "-c", f"dd if=/dev/zero of=/dev/shm/x bs=1M count={USED} 2>/dev/null; echo; sleep 1000"
        )
    )
    assert held.stdout is not None
    assert await read_some(held.stdout) == b"\n"
    used = backed(pid)
    assert used > before + (USED - 8) * MIB
    await guest.signal(held, 9)
    await guest.remove(held.id)  # its /dev/shm with it
    assert await settles(pid, used - (USED - 16) * MIB), (before, used, backed(pid))


async def test_the_guests_entropy_comes_from_the_host(boot: Boot) -> None:
    """/dev/hwrng is the virtio device, and gives bytes that are not the same twice."""
    _, guest, _ = await boot()
    # Its driver comes when nobody else wants the time: until then "none", or no such file.
    current = "/sys/class/misc/hw_random/rng_current"
    script = f"until grep -q virtio {current} 2>/dev/null; do sleep 0.1; done; cat {current};"
    spec = make_spec("sh", "-c", f"{script} head -c 16 /dev/hwrng | busybox md5sum")
    spec.Linux.Devices.add(Path="/dev/hwrng", Type="c", Major=10, Minor=183)
    spec.Linux.Resources.Devices.add(Allow=True, Type="c", Major=10, Minor=183, Access="rwm")
    seen = set()
    for _round in range(2):
        code, out, err = await guest.run(spec=spec)
        assert code == 0, err
        current, digest = out.decode().splitlines()
        assert current.startswith("virtio_rng")
        seen.add(digest)
    assert len(seen) == 2
