"""A device whose container could not be made, for whatever reason, is gone again, and can be had anew."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from devices.errors import GuestError, HypervisorError
from devices.holdings import Holdings
from proto import agent_pb2 as agent
from tests.e2e.guests import Guest, make_spec
from tests.e2e.vms import Boot, booting, make_disk, mounted
from ttrpc import Code, RpcError

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(os.geteuid() != 0, reason="virtiofsd needs root")]


@pytest.fixture
async def boot(tmp_path: Path) -> AsyncIterator[Boot]:
    async with booting(tmp_path) as boots:
        yield boots


async def disks_of(guest: Guest) -> list[str]:
    code, out, _ = await guest.run("ls", "/sys/block")
    assert code == 0
    return [name for name in out.decode().split() if name.startswith("vd")]


async def test_an_agent_that_fails_or_is_late_leaves_the_disk_free(boot: Boot, tmp_path: Path) -> None:
    """The plug went well; then the agent refuses, or nobody waits for its answer any more. The same slot and
    the same index serve the next attempt, which works."""
    vm, guest, manager = await boot()
    holdings = Holdings(manager, vm)
    disk = make_disk(tmp_path / "a")
    spec = make_spec("cat", "/data/hello")
    paths = set()

    for failure in ("refused", "late", ""):
        name = await holdings.take("container", disk)
        device = await manager.generate_agent_device(name)
        paths.add((device.id, device.vm_path))
        storage = mounted(device, f"for-{failure or 'real'}", read_only=True)
        request = agent.CreateContainerRequest(container_id=f"c{failure}", OCI=spec, storages=[storage])
        if failure == "refused":
            request.storages[0].fstype = "nonsense"
            with pytest.raises(RpcError) as caught:
                await guest.agent.create_container(request, timeout=30)
            assert caught.value.code is not Code.DEADLINE_EXCEEDED
        elif failure == "late":
            with pytest.raises(RpcError) as caught:
                await guest.agent.create_container(request, timeout=0.01)
            assert caught.value.code is Code.DEADLINE_EXCEEDED
        else:
            spec.Mounts.add(
                destination="/data", type="bind", source=storage.mount_point, options=["rbind", "ro"]
            )
            code, out, _ = await guest.run(spec=spec, storages=[storage])
            assert (code, out) == (0, b"from a\n")
        assert await holdings.release("container") == []
        assert await holdings.release("container") == []
        assert await disks_of(guest) == ["vda"]
    assert len(paths) == 1


async def test_a_vm_that_dies_under_a_plug_leaves_nothing_half(boot: Boot, tmp_path: Path) -> None:
    """Whoever plugs hears of the death at once; letting go of what was plugged ends too."""
    vm, _, manager = await boot()
    holdings = Holdings(manager, vm)
    disk, other = make_disk(tmp_path / "a"), make_disk(tmp_path / "b")
    await holdings.take("one", disk)
    plugging = asyncio.create_task(holdings.take("two", other))
    await asyncio.sleep(0)
    os.kill(await vm.get_vmm_master_tid(), 9)
    ended = await vm.wait_vm()
    assert (ended.code, ended.expected) == (-9, False)
    with pytest.raises((HypervisorError, GuestError)):
        await plugging
    assert all(isinstance(error, HypervisorError) for error in await holdings.release("one"))
    assert await holdings.release("two") == []
