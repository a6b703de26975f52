"""A VM of somebody else's is asked for, and ended, whatever became of the asking; it can do nothing else."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from devices.config import (
    BlockConfig,
    ConsoleConfig,
    DeviceConfig,
    NetworkConfig,
    RngConfig,
    ShareFsConfig,
    VfioConfig,
    VsockConfig,
)
from devices.errors import GuestError, HypervisorError, UnsupportedByHypervisor
from devices.undo import MemoryUndo
from hypervisors.remote import vmm
from hypervisors.remote.config import RemoteConfig
from hypervisors.remote.plugin import plugin
from hypervisors.remote.vmm import RemoteVm
from shim.launch import undo_kinds
from shim.state.journalfile import Record
from shim.state.releases import ReleaseError
from tests.unit.hypervisors.remote.fake import FakeService
from ttrpc import Code, RpcError

KEY = "0123abcd"
POD = {"io.kubernetes.cri.sandbox-name": "web", "io.kubernetes.cri.sandbox-namespace": "shop", "other": "x"}

Made = tuple[RemoteVm, MemoryUndo]


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[FakeService]:
    async with FakeService(tmp_path) as fake:
        yield fake


@pytest.fixture
async def make(service: FakeService, tmp_path: Path) -> AsyncIterator[Callable[..., Made]]:
    vms: list[RemoteVm] = []

    def _make(**changes: Any) -> Made:
        undo = MemoryUndo()
        section = RemoteConfig(remote_hypervisor_socket=service.path, **changes)
        state = str(tmp_path / KEY)
        vms.append(plugin.create(plugin.adjust_config(section), sandbox_id="s1", state_dir=state, undo=undo))
        return vms[-1], undo

    yield _make
    service.refuses.clear()
    for event in service.holds.values():
        event.set()
    for vm in vms:
        await vm.cleanup()


async def _prepare(vm: RemoteVm, annotations: dict[str, str] = POD) -> None:
    await vm.for_pod(annotations)
    await vm.prepare_vm("s1", "/run/netns/pod")
    await vm.add_device(VsockConfig(home_call=False))


async def test_the_service_is_told_what_kata_tells_it(
    service: FakeService, make: Callable[..., Made]
) -> None:
    vm, undo = make(default_vcpus=1.5, machine_type="t3.small", initdata="aW5pdA==", default_gpus=1)
    await _prepare(vm)
    assert service.calls == [], "nothing is asked before all is known"
    await vm.start_vm(5)
    (_, create, deadline), (_, start, _) = service.calls
    assert service.names == ["CreateVM", "StartVM"]
    assert deadline is not None
    assert (create.id, start.id, create.networkNamespacePath) == (KEY, KEY, "/run/netns/pod")
    prefix = "io.katacontainers.config.hypervisor."
    assert dict(create.annotations) == {
        "io.kubernetes.cri.sandbox-name": "web",
        "io.kubernetes.cri.sandbox-namespace": "shop",
        prefix + "machine_type": "t3.small",
        prefix + "default_vcpus": "2",
        prefix + "default_memory": "2048",
        prefix + "image": "",
        prefix + "cc_init_data": "aW5pdA==",
        prefix + "default_gpus": "1",
        prefix + "default_gpu_model": "",
    }
    assert [entry.facts for entry in undo.entries] == [{"socket": service.path, "vm": KEY}]
    state = await vm.save_state()
    assert (state.pid, state.sockets["agent"]) == (0, service.socket)
    assert (await vm.get_pids(), await vm.get_vmm_master_tid()) == ([], os.getpid())
    await vm.check()
    await vm.stop_vm()
    ended = await vm.wait_vm()
    assert ended.expected
    await vm.cleanup()
    name, _, deadline = service.calls[-1]
    assert (name, deadline) == ("StopVM", None), "no deadline that would have the deletion given up"
    assert (service.vms, undo.entries) == (set(), [])


async def test_crios_names_and_none_at_all(service: FakeService, make: Callable[..., Made]) -> None:
    """A service refuses a pod without a name: a container that is in none has its sandbox's id."""
    vm, _ = make()
    await _prepare(vm, {"io.kubernetes.cri-o.KubeName": "a", "io.kubernetes.cri-o.Namespace": "b"})
    await vm.start_vm(5)
    told = service.calls[0][1].annotations
    assert told["io.kubernetes.cri.sandbox-name"] == "a"
    assert told["io.kubernetes.cri.sandbox-namespace"] == "b"
    alone, _ = make()
    await _prepare(alone, {})
    await alone.start_vm(5)
    told = service.calls[2][1].annotations
    assert told["io.kubernetes.cri.sandbox-name"] == told["io.kubernetes.cri.sandbox-namespace"] == "s1"


@pytest.mark.parametrize(
    "device",
    [
        BlockConfig(id="d", path="/dev/vda"),
        ShareFsConfig(source="/srv"),
        NetworkConfig(id="n", mac="02:00:00:00:00:01", tap="tap0"),
        VfioConfig(id="v", address="0000:00:01.0"),
        RngConfig(),
        ConsoleConfig(),
    ],
)
async def test_what_it_cannot_have_is_refused_before_anything_is_asked(
    service: FakeService, make: Callable[..., Made], device: DeviceConfig
) -> None:
    vm, _ = make()
    with pytest.raises(UnsupportedByHypervisor, match="remote does not support cold-plug of"):
        await vm.add_device(device)
    with pytest.raises(UnsupportedByHypervisor, match="home_call"):
        await vm.add_device(VsockConfig(home_call=True))
    for work in (vm.pause_vm(), vm.resume_vm(), vm.save_vm("/x"), vm.resize_vcpu(2), vm.resize_memory(512)):
        with pytest.raises(UnsupportedByHypervisor):
            await work
    with pytest.raises(UnsupportedByHypervisor):
        await vm.remove_device("d")
    assert service.calls == []


async def test_a_refused_vm_is_not_stopped(service: FakeService, make: Callable[..., Made]) -> None:
    """It never was; somebody else's might be of that name."""
    service.refuses["CreateVM"] = RpcError(Code.UNKNOWN, "pod name is\nmissing \x1b[31m")
    vm, undo = make()
    await _prepare(vm)
    with pytest.raises(HypervisorError, match=r"refused CreateVM: pod name is.missing") as caught:
        await vm.start_vm(5)
    assert "\x1b" not in str(caught.value)
    await vm.cleanup()
    assert (service.names, undo.entries) == (["CreateVM"], [])


async def test_a_service_that_goes_while_it_is_asked_may_have_made_one(
    service: FakeService, make: Callable[..., Made]
) -> None:
    service.refuses["CreateVM"] = RpcError(Code.UNAVAILABLE, "the server is closing")
    vm, undo = make()
    await _prepare(vm)
    with pytest.raises(HypervisorError, match="refused CreateVM: the server is closing"):
        await vm.start_vm(5)
    await vm.cleanup()
    assert (service.names, undo.entries) == (["CreateVM", "StopVM"], [])


async def test_a_vm_that_does_not_start_is_stopped(service: FakeService, make: Callable[..., Made]) -> None:
    service.refuses["StartVM"] = RpcError(Code.UNKNOWN, "creating an instance: no quota")
    vm, undo = make()
    await _prepare(vm)
    with pytest.raises(HypervisorError, match="refused StartVM: creating an instance: no quota"):
        await vm.start_vm(5)
    await vm.cleanup()
    assert (service.names, service.vms, undo.entries) == (["CreateVM", "StartVM", "StopVM"], set(), [])


async def test_a_slow_service_has_its_time_and_no_more(
    service: FakeService, make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    service.holds["StartVM"] = asyncio.Event()
    vm, undo = make(remote_hypervisor_timeout=1)
    await _prepare(vm)
    with pytest.raises(HypervisorError, match="did not answer StartVM within") as caught:
        await vm.start_vm(0.1)
    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert "remote_hypervisor_timeout" in caught.value.hint
    await vm.cleanup()
    assert (service.vms, undo.entries) == (set(), [])


async def test_a_service_that_dies_leaves_the_entry(service: FakeService, make: Callable[..., Made]) -> None:
    """Nobody can tell whether there is a VM: `delete` asks again."""
    service.holds["StartVM"] = asyncio.Event()
    vm, undo = make()
    await _prepare(vm)
    starting = asyncio.create_task(vm.start_vm(5))
    await service.called("StartVM")
    await service.close()
    with pytest.raises(HypervisorError, match="StartVM"):
        await starting
    with pytest.raises(HypervisorError, match="cannot be reached") as caught:
        await vm.cleanup()
    assert "cloud-api-adaptor" in caught.value.hint
    assert [entry.kind for entry in undo.entries] == ["remote-vm"]
    with pytest.raises(ReleaseError, match="cannot be reached"):
        await asyncio.to_thread(undo_kinds.release, Record(1, vmm.UNDO_KIND, undo.entries[0].facts), 1.0)
    vm._stopping = vm._entry = None  # the fixture cleans up, too


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("", "named no socket"),
        ("agent.ttrpc", "no absolute path"),
        ("/" + 200 * "x", "no absolute path of at most 107 bytes"),
        ("/a\0b", "no absolute path"),
    ],
)
async def test_a_lying_service(
    service: FakeService, make: Callable[..., Made], answer: str, words: str
) -> None:
    service.socket = answer
    vm, undo = make()
    await _prepare(vm)
    with pytest.raises(HypervisorError, match=words):
        await vm.start_vm(5)
    await vm.cleanup()
    assert (service.names, service.vms, undo.entries) == (["CreateVM", "StopVM"], set(), [])


async def test_an_agents_socket_that_is_none(
    service: FakeService, make: Callable[..., Made], tmp_path: Path
) -> None:
    """Not a file, not a link to somebody's socket: whoever connects there would speak to another."""
    vm, _ = make()
    await _prepare(vm)
    await vm.start_vm(5)
    channel = await vm.get_agent_socket()
    Path(service.socket).touch()
    with pytest.raises(GuestError, match=r"within 0\.3 s"):
        await channel.wait_ready(0.3)
    with pytest.raises(GuestError, match="no socket"):
        await channel.connect(1024, 1)
    Path(service.socket).unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()
        Path(service.socket).symlink_to(tmp_path / "other")
        with pytest.raises(GuestError):
            await channel.connect(1024, 1)
    Path(service.socket).unlink()
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(service.socket)
        agent.listen()
        await channel.wait_ready(5)
        sock, port = await channel.connect(1024, 1)
        sock.close()
        assert (port, channel.home_port) == (0, 0)
    with pytest.raises(HypervisorError, match="no streams"):
        await channel.open_stream(1)
    await vm.stop_vm()
    with pytest.raises(HypervisorError, match="the VM was stopped"):
        await channel.connect(1024, 1)


async def test_a_stop_during_createvm_waits_for_its_answer(
    service: FakeService, make: Callable[..., Made]
) -> None:
    """Before it, the service would not know the VM, and then make it."""
    service.holds["CreateVM"] = asyncio.Event()
    vm, undo = make()
    await _prepare(vm)
    starting = asyncio.create_task(vm.start_vm(5))
    await service.called("CreateVM")
    await vm.stop_vm()
    with pytest.raises(HypervisorError, match="stopped while it started"):
        await starting
    assert service.names == ["CreateVM"]
    assert [entry.kind for entry in undo.entries] == ["remote-vm"]
    service.holds["CreateVM"].set()
    await vm.cleanup()
    assert (service.names, service.vms, undo.entries) == (["CreateVM", "StopVM"], set(), [])


async def test_a_cancelled_start_is_undone(service: FakeService, make: Callable[..., Made]) -> None:
    service.holds["StartVM"] = asyncio.Event()
    vm, undo = make()
    await _prepare(vm)
    starting = asyncio.create_task(vm.start_vm(5))
    await service.called("StartVM")
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await vm.cleanup()
    assert (service.vms, undo.entries) == (set(), [])


async def test_a_slow_end_does_not_keep_the_caller(service: FakeService, make: Callable[..., Made]) -> None:
    service.holds["StopVM"] = asyncio.Event()
    vm, undo = make()
    await _prepare(vm)
    await vm.start_vm(5)
    waiting = asyncio.create_task(vm.wait_vm())
    async with asyncio.timeout(5):
        await vm.stop_vm()
        assert (await waiting).expected
    assert undo.entries != []
    service.holds["StopVM"].set()
    await vm.cleanup()
    assert (service.names.count("StopVM"), undo.entries) == (1, [])


async def test_the_vm_of_a_killed_shim_is_stopped_by_its_record(
    service: FakeService, make: Callable[..., Made]
) -> None:
    vm, undo = make()
    await _prepare(vm)
    await vm.start_vm(5)
    record = Record(1, vmm.UNDO_KIND, dict(undo.entries[0].facts))
    for _ in range(2):  # the second time there is none, which is no error
        await asyncio.to_thread(undo_kinds.release, record, 5.0)
    assert (service.vms, service.names[-2:]) == (set(), ["StopVM", "StopVM"])
