"""One VM under a Cloud Hypervisor that answers as the real one: each of its traps, and each way to end."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from devices.config import (
    BalloonConfig,
    BlockConfig,
    ConsoleConfig,
    NetworkConfig,
    RngConfig,
    ShareFsConfig,
    VfioConfig,
    VsockConfig,
)
from devices.errors import CallerError, HypervisorError, KataError, UnsupportedByHypervisor
from devices.undo import MemoryUndo
from hypervisors.cloud_hypervisor.config import ClhConfig
from hypervisors.cloud_hypervisor.vmm import CloudHypervisor

from .fake import Fake, install

Make = Callable[..., Awaitable[CloudHypervisor]]
GROWS = {"default_maxvcpus": 4, "default_maxmemory": 1024}


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """The program."""
    folder = tmp_path / "clh"
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
    made: list[tuple[CloudHypervisor, MemoryUndo, Path]] = []

    async def build(**keys: Any) -> CloudHypervisor:
        state = tmp_path / f"state{len(made)}"
        state.mkdir()
        undo = MemoryUndo()
        wanted: dict[str, Any] = {
            "path": fake.path,
            "kernel": str(kernel),
            "shared_fs": "none",
            "default_memory": 256,
        }
        section = ClhConfig(**(wanted | {"hotplug_timeout": 5.0} | keys))
        vm = CloudHypervisor(section, sandbox_id="vm", state_dir=str(state), undo=undo)
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


async def test_the_configuration_is_created_whole_and_then_booted(
    make: Make, fake: Fake, disk: BlockConfig
) -> None:
    vm = await make(**GROWS, image="/image", kernel_params="last=1")
    assert await vm.add_device(dataclasses.replace(disk, read_only=True, serial="s")) == "02"  # vsock has 01
    assert await vm.add_device(RngConfig()) == "03"
    assert await vm.add_device(BalloonConfig()) == "04"
    await vm.start_vm(20)
    assert [call for call, _, _ in fake.seen()] == ["vmm.ping", "vm.create", "vm.boot"]
    (made,) = fake.bodies("vm.create")
    assert made["cpus"] == {"boot_vcpus": 1, "max_vcpus": 4, "nested": True}
    assert made["memory"] == {
        "size": 256 << 20,
        "shared": True,
        "hotplug_method": "Acpi",
        "hotplug_size": 768 << 20,
    }
    assert made["payload"]["cmdline"].startswith("console=ttyS0 reboot=k panic=-1")
    assert made["payload"]["cmdline"].endswith(
        "root=/dev/vda rootfstype=ext4 ro agent.home_vport=1028 last=1"
    )
    (plugged,) = made["disks"]
    assert (plugged["image_type"], plugged["readonly"], plugged["serial"]) == ("Raw", True, "s")
    assert [made[key]["pci_device_id"] for key in ("vsock", "rng", "balloon")] == [1, 3, 4]
    assert (made["serial"], made["console"]) == ({"mode": "Tty"}, {"mode": "Off"})
    assert made["platform"] == {"vfio_p2p_dma": False}
    await vm.check()


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"boot": "refused"}, "refused PUT /api/v1/vm.boot: Error from API: The VM could not boot: "),
        ({"boot": "dies"}, r"exited with code 1; .*vmm stderr: .*following chain of errors"),
        ({"dies": 1}, "exited with code 1"),
        ({"dies": 0}, "exited with code 0"),  # which is no sign that a start went well
    ],
)
async def test_a_start_that_fails_leaves_nothing_running(
    make: Make, fake: Fake, wish: dict[str, Any], words: str
) -> None:
    """And nothing is booted after it: what a failed create leaves behind is gone with the process."""
    fake.wish(**wish)
    vm = await make()
    with pytest.raises(KataError, match=words) as caught:
        await vm.start_vm(20)
    assert caught.value.phase
    assert caught.value.hint
    if "boot" in wish:
        assert caught.value.details
    assert await vm.get_pids() == []


async def test_a_create_that_is_refused_is_not_booted(make: Make, fake: Fake, disk: BlockConfig) -> None:
    vm = await make()
    await vm.add_device(disk)
    vm._parts.devices["again"] = vm._parts.devices["disk"]  # one id twice, which the API refuses
    with pytest.raises(HypervisorError, match="Identifier disk is not unique"):
        await vm.start_vm(20)
    assert [call for call, _, _ in fake.seen()] == ["vmm.ping", "vm.create"]


async def test_a_stop_ends_a_start_under_way(make: Make) -> None:
    vm = await make()
    starting = asyncio.create_task(vm.start_vm(20))
    while not await vm.get_pids():  # noqa: ASYNC110  (there is no event for it)
        await asyncio.sleep(0)
    await vm.stop_vm()
    with pytest.raises(HypervisorError, match="stopped"):
        await starting
    assert (await vm.wait_vm()).expected


# --- devices


async def test_taps_go_by_their_descriptors_before_the_boot_and_after(make: Make, fake: Fake) -> None:
    """Never in the body, where they would be ignored, nor with vm.create."""
    vm = await make(default_vcpus=2)
    pairs = [os.pipe() for _ in range(2)]
    card = NetworkConfig(id="eth0", mac="02:00:00:00:00:01", tap_fds=pairs[0])
    try:
        await vm.add_device(card)
        await vm.start_vm(20)
        await vm.add_device(dataclasses.replace(card, id="eth1", tap_fds=pairs[1][:1]))
        with pytest.raises(UnsupportedByHypervisor, match="without descriptors"):
            await vm.add_device(dataclasses.replace(card, id="eth2", tap="tap0", tap_fds=()))
    finally:
        for fd in (*pairs[0], *pairs[1]):
            os.close(fd)
    seen = [(call, fds) for call, _, fds in fake.seen() if call != "vmm.ping"]
    assert seen == [("vm.create", 0), ("vm.add-net", 2), ("vm.boot", 0), ("vm.add-net", 1)]
    first, second = fake.bodies("vm.add-net")
    assert (first["num_queues"], second["num_queues"], first["pci_device_id"]) == (4, 2, 2)
    assert not any("tap" in body or "fds" in body for body in (first, second))


async def test_a_device_is_gone_when_the_guest_has_let_go(make: Make, fake: Fake, disk: BlockConfig) -> None:
    """The removal is answered before that; the id can be had again afterwards."""
    fake.wish(lets_go_after=0.3)
    vm = await make()
    await vm.start_vm(20)
    assert await vm.add_device(disk) == "15"
    began = asyncio.get_running_loop().time()
    await vm.remove_device("disk")
    assert asyncio.get_running_loop().time() - began > 0.25
    assert await vm.add_device(disk) == "16"
    assert [body["image_type"] for body in fake.bodies("vm.add-disk")] == ["Raw", "Raw"]
    with pytest.raises(UnsupportedByHypervisor, match="nobody, which is not there"):
        await vm.remove_device("nobody")


async def test_a_second_try_waits_for_the_first_ones_event(make: Make, fake: Fake, disk: BlockConfig) -> None:
    """A second request would be refused although the guest has not let go yet."""
    fake.wish(waits=True)
    vm = await make(hotplug_timeout=0.1)
    await vm.start_vm(20)
    await vm.add_device(disk)
    with pytest.raises(HypervisorError, match=r"did not let go of disk within 0.1 s") as caught:
        await vm.remove_device("disk")
    assert caught.value.code == "DEADLINE_EXCEEDED"
    object.__setattr__(vm._section, "hotplug_timeout", 20.0)
    fake.go()
    await vm.remove_device("disk")
    assert len(fake.bodies("vm.remove-device")) == 1


async def test_an_address_that_is_none_is_refused(make: Make, fake: Fake, disk: BlockConfig) -> None:
    fake.wish(bdf="../etc")
    vm = await make()
    await vm.start_vm(20)
    with pytest.raises(HypervisorError, match="plugged disk at no address"):
        await vm.add_device(disk)


async def test_a_plug_that_is_cancelled_leaves_no_device(make: Make, fake: Fake, disk: BlockConfig) -> None:
    fake.wish(slow=0.3)
    vm = await make()
    await vm.start_vm(20)
    plugging = asyncio.create_task(vm.add_device(disk))
    while not fake.bodies("vm.add-disk"):  # noqa: ASYNC110  (there is no event for it)
        await asyncio.sleep(0.01)
    plugging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await plugging
    assert fake.bodies("vm.remove-device") == [{"id": "disk"}]
    await vm.add_device(disk)


async def test_a_removal_that_is_cancelled_is_not_asked_for_twice(
    make: Make, fake: Fake, disk: BlockConfig
) -> None:
    fake.wish(waits=True)
    vm = await make(hotplug_timeout=20.0)
    await vm.start_vm(20)
    await vm.add_device(disk)
    for turns in (1, 20):  # before it is told to go, and while the guest looks
        removing = asyncio.create_task(vm.remove_device("disk"))
        for _ in range(turns):
            await asyncio.sleep(0.001)
        removing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await removing
    fake.go()
    await vm.remove_device("disk")
    assert fake.bodies("vm.remove-device") == [{"id": "disk"}]


async def test_what_cannot_be_is_refused_before_anything_is_asked(make: Make, disk: BlockConfig) -> None:
    vm = await make()
    for device, words in (
        (VfioConfig(id="gpu", address="0000:01:00.0"), 'cold_plug_vfio = "no-port"'),
        (ShareFsConfig(source="/"), 'shared_fs = "none"'),
    ):
        with pytest.raises(UnsupportedByHypervisor, match=words):
            await vm.add_device(device)
    await vm.start_vm(20)
    for attempt in (vm.add_device(RngConfig()), vm.remove_device("vsock"), vm.resize_vcpu(2)):
        with pytest.raises(UnsupportedByHypervisor):
            await attempt


async def test_a_disk_grows_and_never_shrinks(make: Make, fake: Fake, disk: BlockConfig) -> None:
    vm = await make()
    await vm.start_vm(20)
    await vm.add_device(disk)
    os.truncate(disk.path, 2 << 20)
    await vm.update_device(disk)
    assert fake.bodies("vm.resize-disk") == [{"id": "disk", "desired_size": 2 << 20}]
    with pytest.raises(CallerError, match="cannot have 1048576"):
        await vm.update_device(dataclasses.replace(disk, size=1 << 20))
    with pytest.raises(CallerError, match="no disk other"):
        await vm.update_device(dataclasses.replace(disk, id="other"))


# --- sizes


async def test_memory_by_acpi_grows_by_whole_dimms_and_is_never_asked_to_shrink(
    make: Make, fake: Fake
) -> None:
    """Cloud Hypervisor would say yes, do nothing, and have false figures afterwards."""
    vm = await make(**GROWS)
    await vm.start_vm(20)
    assert await vm.resize_memory(300) == 384
    with pytest.raises(UnsupportedByHypervisor, match="says yes and takes nothing back"):
        await vm.resize_memory(256)
    with pytest.raises(HypervisorError, match="this VM can have 1024") as caught:
        await vm.resize_memory(2048)
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    assert fake.bodies("vm.resize") == [{"desired_ram": 384 << 20}]


async def test_memory_by_virtio_comes_and_goes(make: Make, fake: Fake) -> None:
    vm = await make(**GROWS, enable_virtio_mem=True)
    await vm.start_vm(20)
    assert (await vm.resize_memory(300), await vm.resize_memory(256)) == (300, 256)
    with pytest.raises(UnsupportedByHypervisor, match="less memory than it started with"):
        await vm.resize_memory(128)


async def test_what_a_guest_keeps_is_asked_for_again(make: Make, fake: Fake) -> None:
    fake.wish(lazy=True)
    vm = await make(**GROWS, enable_virtio_mem=True, hotplug_timeout=0.1)
    await vm.start_vm(20)
    assert await vm.resize_memory(512) == 512
    assert await vm.resize_memory(256) == 512
    assert [body["desired_ram"] >> 20 for body in fake.bodies("vm.resize")] == [512, 256, 512]
    with pytest.raises(HypervisorError, match=r"did not take 2 vCPUs within 0\.1 s; it has 1"):
        await vm.resize_vcpu(2)


async def test_vcpus_come_and_go_with_their_threads(make: Make) -> None:
    vm = await make(**GROWS)
    await vm.start_vm(20)
    assert await vm.resize_vcpu(3) == 3
    assert list((await vm.get_thread_ids()).vcpus) == [0, 1, 2]
    assert await vm.resize_vcpu(1) == 1


async def test_a_vcpu_that_is_still_going_is_told(make: Make, fake: Fake) -> None:
    fake.wish(busy=True)
    vm = await make(**GROWS)
    await vm.start_vm(20)
    with pytest.raises(HypervisorError, match="vCPU is pending removal"):
        await vm.resize_vcpu(2)


# --- how it ends


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ({"guest": "reset"}, "the guest ended the VM (reset)"),
        (
            {"guest": "reset", "console": "[ 1.0] Kernel panic - not syncing: no init"},
            "the guest kernel panicked: no init",
        ),
    ],
)
async def test_a_guest_that_resets_or_panics_has_ended(
    make: Make, fake: Fake, wish: dict[str, str], reason: str
) -> None:
    """Cloud Hypervisor would boot the VM again, in the same process."""
    fake.wish(**wish)
    vm = await make()
    await vm.start_vm(20)
    ended = await asyncio.wait_for(vm.wait_vm(), 20)
    assert (ended.reason, ended.expected, ended.code) == (reason, False, -signal.SIGKILL)
    assert await vm.get_pids() == []
    with pytest.raises(KataError, match="the VM is gone"):
        await (await vm.get_agent_socket()).wait_ready(5)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("off", "the guest ended the VM (power-off, or SIGTERM)"),
        ("fails", "Cloud Hypervisor could not run a vCPU any more (see its words)"),
    ],
)
async def test_an_end_in_good_order_has_its_reason(make: Make, fake: Fake, what: str, reason: str) -> None:
    """Code 0, and nothing but words tells one from the other."""
    fake.wish(guest=what)
    vm = await make()
    await vm.start_vm(20)
    ended = await asyncio.wait_for(vm.wait_vm(), 20)
    assert (ended.reason, ended.code) == (reason, 0)


async def test_its_death_is_told(make: Make) -> None:
    vm = await make()
    await vm.start_vm(20)
    os.kill(await vm.get_vmm_master_tid(), signal.SIGKILL)
    ended = await asyncio.wait_for(vm.wait_vm(), 20)
    assert (ended.reason, ended.expected) == ("cloud-hypervisor was killed by SIGKILL", False)


async def test_it_is_asked_to_end_and_need_not_answer(make: Make, fake: Fake) -> None:
    vm = await make()
    await vm.start_vm(20)
    await asyncio.gather(vm.stop_vm(), vm.stop_vm())
    assert ((await vm.wait_vm()).code, fake.seen()[-1][0]) == (0, "vmm.shutdown")
    still = await make()
    await still.start_vm(20)
    os.kill(await still.get_vmm_master_tid(), signal.SIGSTOP)
    await asyncio.wait_for(still.stop_vm(), 20)
    assert (await still.wait_vm()).expected


async def test_a_daemons_death_is_the_vms(make: Make, tmp_path: Path) -> None:
    """It is met at its path, once, and nothing is left there."""
    daemon = tmp_path / "virtiofsd"
    daemon.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo virtiofsd 1.10.0; exit; }\nsleep 600\n')
    daemon.chmod(0o755)
    vm = await make(shared_fs="virtio-fs")
    await vm.add_device(ShareFsConfig(source=str(tmp_path), daemon=str(daemon)))
    await vm.start_vm(20)
    _, pid = await vm.get_pids()
    os.kill(pid, signal.SIGKILL)
    ended = await asyncio.wait_for(vm.wait_vm(), 20)
    assert "virtiofsd was killed by SIGKILL" in ended.reason


# --- saving


async def test_a_saved_vm_begins_again_with_what_is_elsewhere_now(
    make: Make, fake: Fake, disk: BlockConfig, tmp_path: Path
) -> None:
    """Paused meanwhile; its files stay as they are, cards have their descriptors again."""
    ours, theirs = socket.socketpair()
    card = NetworkConfig(id="eth0", mac="02:00:00:00:00:01", tap_fds=(ours.fileno(),))
    target = tmp_path / "saved"
    target.mkdir()
    vm = await make()
    await vm.add_device(disk)
    await vm.start_vm(20)
    await vm.save_vm(str(target))
    assert [call for call, _, _ in fake.seen()][-4:] == ["vm.info", "vm.pause", "vm.snapshot", "vm.resume"]
    config = json.loads((target / "config.json").read_text())
    config["net"] = [{"id": "eth0", "mac": card.mac, "fds": [-1]}]
    (target / "config.json").write_text(json.dumps(config))
    before = (target / "config.json").read_bytes()

    elsewhere = tmp_path / "elsewhere.img"
    os.rename(disk.path, elsewhere)
    again = await make(restore_on_demand=True)
    await again.add_device(dataclasses.replace(disk, path=str(elsewhere)))
    await again.add_device(card)
    await again.restore_vm(str(target), 20)
    await again.check()
    (call, body, fds) = next(one for one in fake.seen() if one[0] == "vm.restore")
    assert (call, fds) == ("vm.restore", 1)
    assert (body["resume"], body["memory_restore_mode"]) == (True, "OnDemand")
    assert body["net_fds"] == [{"id": "eth0", "num_fds": 1}]
    assert (target / "config.json").read_bytes() == before
    info = await again._info()
    assert info["config"]["disks"][0]["path"] == str(elsewhere)
    assert info["config"]["vsock"]["socket"].startswith(again._state_dir)
    for sock in (ours, theirs):
        sock.close()


async def test_a_vm_that_is_not_the_saved_one_is_refused(
    make: Make, disk: BlockConfig, tmp_path: Path
) -> None:
    vm = await make()
    saved = tmp_path / "saved"
    saved.mkdir()
    with pytest.raises(HypervisorError, match="holds no VM that was saved"):
        await vm.restore_vm(str(saved), 20)
    (saved / "config.json").write_text('{"disks": [{"id": "other"}]}')
    second = await make()
    await second.add_device(disk)
    with pytest.raises(HypervisorError, match="it was saved with other, which this VM has not"):
        await second.restore_vm(str(saved), 20)


async def test_a_vm_that_shares_directories_is_not_saved(make: Make, tmp_path: Path) -> None:
    """Everything says yes to that, and no mount of it works afterwards."""
    vm = await make(shared_fs="virtio-fs")
    await vm.start_vm(20)
    with pytest.raises(UnsupportedByHypervisor, match="saving a VM that shares directories"):
        await vm.save_vm(str(tmp_path))
    with pytest.raises(UnsupportedByHypervisor, match="restoring a VM that shares directories"):
        await (await make(shared_fs="virtio-fs")).restore_vm(str(tmp_path), 20)


# --- knowledge


async def test_its_numbers(make: Make) -> None:
    vm = await make()
    await vm.start_vm(20)
    found = await vm.get_hypervisor_metrics()
    assert (found["processes"], found["disk_read_bytes"]) == (1.0, 7.0)
    assert "disk_read_latency_min" not in found  # it has not counted
    assert found["resident_bytes"] > 1 << 20


async def test_after_an_answer_that_never_came_it_is_asked_anew(
    make: Make, fake: Fake, disk: BlockConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.wish(silent="vm.add-disk")
    vm = await make()
    await vm.start_vm(20)
    with monkeypatch.context() as shortly:
        shortly.setattr("hypervisors.cloud_hypervisor.vmm._CALL", 0.3)
        with pytest.raises(HypervisorError, match=r"did not answer PUT /api/v1/vm\.add-disk"):
            await vm.add_device(disk)
    await vm.check()
