"""A device whose container could not be made, for whatever reason, is gone again, and can be had anew."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from conformance.gear import KINDS, Gear
from devices.errors import HypervisorError
from devices.holdings import Holdings
from devices.kinds import Op
from proto import agent_pb2 as agent
from tests.e2e.guests import Guest, make_spec
from tests.e2e.vms import Boot, make_disk, mounted
from ttrpc import Code, RpcError

pytestmark = [pytest.mark.e2e, pytest.mark.skipif(os.geteuid() != 0, reason="virtiofsd needs root")]


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


async def test_a_vm_that_dies_under_plugs_of_every_kind_leaves_nothing(boot: Boot, tmp_path: Path) -> None:
    """Half of the devices are there, the others are on their way. Whoever waits hears of the death at once,
    letting go ends too, and neither a daemon nor an entry of the undo log stays."""
    vm, _, manager = await boot(default_bridges=2)
    can = await vm.capabilities()
    kinds = [kind for kind in KINDS if can.can(kind, Op.HOT)]
    gear = Gear(tmp_path)
    holdings = Holdings(manager, vm)
    try:
        kinds = [kind for kind in kinds if not gear.missing(kind)]
        assert len(kinds) >= 5
        for kind in kinds:
            await holdings.take("there", await gear.make(kind))
        coming = [await gear.make(kind) for kind in kinds]
        plugs = [asyncio.create_task(holdings.take("coming", device)) for device in coming]
        await asyncio.wait(plugs, return_when=asyncio.FIRST_COMPLETED)
        os.kill(await vm.get_vmm_master_tid(), 9)
        ended = await vm.wait_vm()
        assert (ended.code, ended.expected) == (-9, False)
        outcomes = await asyncio.gather(*plugs, return_exceptions=True)
        failed = [one for one in outcomes if isinstance(one, BaseException)]
        assert failed, "all of them were quicker: this test shows nothing"
        assert all(isinstance(one, HypervisorError) for one in failed), failed
        for owner in ("there", "coming"):
            for error in await holdings.release(owner):
                assert isinstance(error, HypervisorError)
            assert await holdings.release(owner) == []
    finally:
        await gear.close()
