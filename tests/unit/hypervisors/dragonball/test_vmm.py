"""One VM under a process that speaks Dragonball's protocol: what it is told, each way to end, and to fail."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from devices.config import (
    BlockConfig,
    ConsoleConfig,
    NetworkConfig,
    RngConfig,
    ShareFsConfig,
    VsockConfig,
)
from devices.errors import BugError, HypervisorError, KataError, UnsupportedByHypervisor
from devices.undo import MemoryUndo
from hypervisors.dragonball.config import DragonballConfig
from hypervisors.dragonball.vmm import Dragonball

from .fake import Fake, install

Make = Callable[..., Awaitable[Dragonball]]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """The program."""
    folder = tmp_path / "process"
    folder.mkdir()
    return install(folder)


@pytest.fixture
def disk(tmp_path: Path) -> BlockConfig:
    """An image of a MiB."""
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    return BlockConfig(id="disk", path=str(tmp_path / "disk.img"))


@pytest.fixture
async def make(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Prepared VMs with vsock and console; nothing of them is left afterwards."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path == "/dev/kvm" or access(path, mode))
    kernel = tmp_path / "kernel"
    kernel.write_text("")
    made: list[tuple[Dragonball, MemoryUndo, Path]] = []

    async def build(**keys: Any) -> Dragonball:
        state = tmp_path / f"state{len(made)}"
        state.mkdir()
        undo = MemoryUndo()
        wanted: dict[str, Any] = {
            "path": fake.path,
            "kernel": str(kernel),
            "shared_fs": "none",
            "default_memory": 255,
            "hotplug_timeout": 5.0,
        }
        section = DragonballConfig(**(wanted | keys))
        vm = Dragonball(section, sandbox_id="vm", state_dir=str(state), undo=undo)
        made.append((vm, undo, state))
        await vm.prepare_vm("vm", None)
        await vm.add_device(VsockConfig())
        await vm.add_device(ConsoleConfig())
        return vm

    yield build
    for vm, undo, state in made:
        await vm.cleanup()
        await vm.cleanup()
        assert (await vm.get_pids(), undo.entries, os.listdir(state)) == ([], [], [])


# --- the start


async def test_machine_source_and_devices_are_told_before_the_start(
    make: Make, fake: Fake, disk: BlockConfig
) -> None:
    vm = await make(image="/image", kernel_params="last=1", default_vcpus=1.5)
    assert await vm.add_device(disk) == "/dev/vda"
    assert await vm.add_device(dataclasses.replace(disk, id="ro", read_only=True)) == "/dev/vdb"
    await vm.start_vm(20)
    assert fake.names() == [
        "SetVmConfiguration",
        "ConfigureBootSource",
        "InsertVsockDevice",
        "InsertBlockDevice",
        "InsertBlockDevice",
        "StartMicroVm",
    ]
    (machine,) = fake.bodies("SetVmConfiguration")
    assert (machine["vcpu_count"], machine["mem_size_mib"], machine["serial_path"]) == (2, 256, None)
    (source,) = fake.bodies("ConfigureBootSource")
    assert source["boot_args"].startswith("console=ttyS0 reboot=k panic=-1 pci=off")
    assert source["boot_args"].endswith("root=/dev/vda rootfstype=ext4 ro agent.home_vport=1028 last=1")
    assert "nr_cpus=2" in source["boot_args"].split()
    assert [body["is_read_only"] for body in fake.bodies("InsertBlockDevice")] == [False, True]
    assert list((await vm.get_thread_ids()).vcpus) == [0, 1]
    await vm.check()


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"start": "refused"}, "refused StartMicroVm: failed to boot the VM: invalid ELF magic number"),
        ({"start": "dies"}, r"exited with code 101; .*vmm stderr: dragonball: a word before the end"),
        ({"start": "panics"}, "Dragonball panicked: thread 'vmm' panicked: it cannot be"),
        ({"dies": 1}, "exited with code 1"),
        ({"protocol": 2}, "it speaks protocol 2, and this driver 1"),
        ({"says": "no line of the protocol\n"}, "said no line of the protocol"),
        ({"says": "[]\n"}, "said no line of the protocol"),
    ],
)
async def test_a_start_that_fails_leaves_nothing_running(
    make: Make, fake: Fake, wish: dict[str, Any], words: str
) -> None:
    fake.wish(**wish)
    vm = await make()
    with pytest.raises(KataError, match=words) as caught:
        await vm.start_vm(20)
    assert caught.value.phase
    assert caught.value.hint
    assert await vm.get_pids() == []


async def test_a_start_has_a_deadline(make: Make, fake: Fake) -> None:
    fake.wish(start="hangs")
    vm = await make()
    with pytest.raises(HypervisorError, match=r"did not start within 0\.5 s") as caught:
        await vm.start_vm(0.5)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert await vm.get_pids() == []


# --- the shared directory


async def test_the_process_serves_the_directory_itself_once_the_vm_runs(
    make: Make, fake: Fake, tmp_path: Path
) -> None:
    vm = await make(shared_fs="inline-virtio-fs", upcall=True)
    await vm.add_device(ShareFsConfig(source=str(tmp_path), tag="shared"))
    await vm.start_vm(20)
    assert fake.names()[-2:] == ["StartMicroVm", "ManipulateFsBackendFs"]
    (device,), (mounted,) = fake.bodies("InsertFsDevice"), fake.bodies("ManipulateFsBackendFs")
    assert (device["mode"], device["tag"], device["cache_size"]) == ("virtio", "shared", 0)
    assert (mounted["source"], mounted["mountpoint"], mounted["tag"]) == (str(tmp_path), "/", "shared")
    assert len(await vm.get_pids()) == 1  # no daemon


async def test_a_directory_that_is_not_served_is_no_start(make: Make, fake: Fake, tmp_path: Path) -> None:
    fake.wish(mount="refused")
    vm = await make(shared_fs="inline-virtio-fs", upcall=True)
    await vm.add_device(ShareFsConfig(source=str(tmp_path), tag="shared"))
    with pytest.raises(HypervisorError, match="fs tag not found"):
        await vm.start_vm(20)
    assert await vm.get_pids() == []


async def test_a_vm_that_shares_is_not_saved(make: Make, tmp_path: Path) -> None:
    vm = await make(shared_fs="inline-virtio-fs", upcall=True)
    assert not (await vm.capabilities()).snapshot
    for call in (vm.save_vm(str(tmp_path)), vm.restore_vm(str(tmp_path), 5)):
        with pytest.raises(UnsupportedByHypervisor):
            await call


# --- devices that come later


async def test_without_an_upcall_server_nothing_is_plugged(make: Make, fake: Fake, disk: BlockConfig) -> None:
    vm = await make()
    await vm.start_vm(20)
    with pytest.raises(UnsupportedByHypervisor, match="no upcall server"):
        await vm.add_device(disk)
    card = NetworkConfig(id="card", mac="02:00:00:00:00:01", tap="tap0")
    with pytest.raises(UnsupportedByHypervisor, match="no upcall server"):
        await vm.add_device(card)
    assert fake.bodies("InsertBlockDevice") == []


async def test_a_plug_waits_for_the_upcall_server(make: Make, fake: Fake, disk: BlockConfig) -> None:
    fake.wish(upcall_after=2)
    vm = await make(upcall=True)
    await vm.start_vm(20)
    assert await vm.add_device(disk) == "/dev/vda"
    assert len(fake.bodies("InsertBlockDevice")) == 3
    with pytest.raises(BugError):
        await vm.add_device(disk)
    await vm.remove_device("disk")
    assert fake.names()[-2:] == ["PrepareRemoveBlockDevice", "RemoveBlockDevice"]
    assert await vm.add_device(disk) == "/dev/vda"  # the letter is free again


async def test_an_upcall_server_that_never_comes_meets_the_deadline(
    make: Make, fake: Fake, disk: BlockConfig
) -> None:
    vm = await make(upcall=True, hotplug_timeout=0.2)
    await vm.start_vm(20)
    with pytest.raises(UnsupportedByHypervisor, match="Upcall not ready"):
        await vm.add_device(disk)
    assert len(fake.bodies("InsertBlockDevice")) > 1
    await vm.check()


async def test_a_plug_that_is_cancelled_is_not_torn(make: Make, fake: Fake, disk: BlockConfig) -> None:
    fake.wish(upcall_after=0, slow=0.3)
    vm = await make(upcall=True)
    await vm.start_vm(20)
    plugging = asyncio.create_task(vm.add_device(disk))
    while not fake.bodies("InsertBlockDevice"):  # noqa: ASYNC110  (another process says it)
        await asyncio.sleep(0.01)
    plugging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await plugging
    await vm.check()  # the talk goes on: it is the answer to this, not to the plug
    assert fake.names()[-3:] == ["PrepareRemoveBlockDevice", "RemoveBlockDevice", "GetInstanceInfo"]


async def test_what_dragonball_lacks_is_refused_beforehand(make: Make, disk: BlockConfig) -> None:
    vm = await make()
    with pytest.raises(UnsupportedByHypervisor, match="virtio-rng: Dragonball has none"):
        await vm.add_device(RngConfig())
    await vm.add_device(disk)
    for call in (vm.resize_vcpu(2), vm.resize_memory(512), vm.update_device(disk), vm.remove_device("vsock")):
        with pytest.raises(UnsupportedByHypervisor):
            await call
    for number in range(13):
        await vm.add_device(dataclasses.replace(disk, id=f"disk{number}"))
    with pytest.raises(HypervisorError, match="no place for device"):
        await vm.add_device(dataclasses.replace(disk, id="more"))


# --- pause, save, load


async def test_a_vm_pauses_and_is_saved_and_another_begins_with_it(
    make: Make, fake: Fake, tmp_path: Path
) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    vm = await make()
    await vm.start_vm(20)
    await vm.pause_vm()
    await vm.check()
    await vm.resume_vm()
    await vm.save_vm(str(saved))
    assert sorted(os.listdir(saved)) == ["memory", "state.json"]
    await vm.stop_vm()
    again = await make()
    await again.restore_vm(str(saved), 20)
    assert fake.names()[-2:] == ["StartMicroVmFromSnapshot", "ResumeMicroVm"]
    await again.check()
    third = await make()
    with pytest.raises(HypervisorError, match="No such file"):
        await third.restore_vm(str(tmp_path), 20)


# --- the end


async def test_the_word_ends_it(make: Make, fake: Fake) -> None:
    vm = await make()
    await vm.start_vm(20)
    await asyncio.gather(vm.stop_vm(), vm.stop_vm())
    ended = await vm.wait_vm()
    assert (ended.expected, ended.code) == (True, 0)
    assert fake.names()[-1] == "ShutdownMicroVm"


async def test_one_that_does_not_listen_is_killed(make: Make, fake: Fake) -> None:
    fake.wish(deaf=True)
    vm = await make()
    await vm.start_vm(20)
    await asyncio.wait_for(vm.stop_vm(), 5)
    assert (await vm.wait_vm()).expected


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ({"guest": "reset"}, r"the guest ended the VM \(reset\)"),
        ({"guest": "failure", "code": 1}, r"Dragonball ended the VM \(failure\)"),
        (
            {"guest": "reset", "console": "Kernel panic - not syncing: no init"},
            "the guest kernel panicked: no init",
        ),
    ],
)
async def test_the_guests_end_is_told_with_its_reason(
    make: Make, fake: Fake, wish: dict[str, Any], reason: str
) -> None:
    fake.wish(**wish)
    vm = await make()
    await vm.start_vm(20)
    ended = await asyncio.wait_for(vm.wait_vm(), 20)
    assert not ended.expected
    assert ended.code == wish.get("code", 0)
    with pytest.raises(KataError, match=reason):
        await (await vm.get_agent_socket()).wait_ready(5)


async def test_its_death_is_told(make: Make) -> None:
    vm = await make()
    await vm.start_vm(20)
    os.kill(await vm.get_vmm_master_tid(), signal.SIGKILL)
    ended = await asyncio.wait_for(vm.wait_vm(), 20)
    assert (ended.expected, ended.code) == (False, -signal.SIGKILL)
    assert "SIGKILL" in ended.reason
    with pytest.raises(HypervisorError):
        await vm.check()


async def test_the_vm_outlives_the_connection(make: Make) -> None:
    vm = await make()
    await vm.start_vm(20)
    await vm.disconnect()
    await vm.disconnect()
    assert len(await vm.get_pids()) == 1
    with pytest.raises(HypervisorError, match="not there"):
        await vm.check()


async def test_a_late_answer_is_nobody_elses(make: Make, fake: Fake) -> None:
    fake.wish(silent="PauseMicroVm")
    vm = await make()
    await vm.start_vm(20)
    assert vm._parts.talk is not None
    with pytest.raises(HypervisorError, match=r"did not answer PauseMicroVm within 0\.1 s"):
        await vm._parts.talk.ask("PauseMicroVm", timeout=0.1)
    await vm.check()
