"""A VM's life as its driver tells it: the order of calls, start and stop, deaths, and what is refused.

What a capability excludes must raise UnsupportedByHypervisor, and nothing else. What needs a guest that has
booted is in `conformance.in_guest` and `conformance.ends`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import pytest_asyncio

from conformance.gear import INSTEAD_OF_VSOCK, KINDS, PLUGGED_AS_SIZE
from conformance.subject import SANDBOX, Subject, World
from devices.child import process_stat
from devices.config import PortConfig, VsockConfig
from devices.confine import CAPABILITIES
from devices.errors import BugError, GuestError, HypervisorError, KataError, UnsupportedByHypervisor
from devices.kinds import OPERATIONS, Kind, Op
from devices.port import PortChannel
from devices.vsock import AGENT_PORT, HybridVsock
from hypervisors.base import Hypervisor

__all__ = ["PROMPT", "Contract", "LifeContract"]

PROMPT = 20.0
"""Seconds: "at once" on a busy machine."""

# What needs a running VM, each as a call.
_RUNNING: dict[str, Callable[[Hypervisor], Awaitable[object]]] = {
    "check": lambda vm: vm.check(),
    "get_thread_ids": lambda vm: vm.get_thread_ids(),
    "get_vmm_master_tid": lambda vm: vm.get_vmm_master_tid(),
    "get_ns_path": lambda vm: vm.get_ns_path(),
    "save_state": lambda vm: vm.save_state(),
}


@contextlib.contextmanager
def _unsupported(what: str) -> Iterator[None]:
    """Exactly this error, and told before anything was attempted."""
    with pytest.raises(HypervisorError) as caught:
        yield
    assert type(caught.value) is UnsupportedByHypervisor, f"{what}: {caught.value!r}"
    assert caught.value.code == "UNIMPLEMENTED"


def _files(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _program(pid: int) -> str:
    """The name of what it runs."""
    return os.path.basename(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode())


def _check_confined(pid: int) -> None:
    """What every process of a VM is denied, whoever its plugin is: SECURITY.md."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    denied = sum(
        1 << CAPABILITIES.index(name) for name in ("sys_admin", "sys_ptrace", "sys_module", "net_admin")
    )
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) & denied == 0
    for kind in ("ipc", "pid"):
        assert os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    ours = {word for word in words if word.startswith((b"PYTEST_CURRENT_TEST=", b"OLDPWD=", b"SHLVL="))}
    assert ours == set()


class Contract:
    """What all parts of the contract have: the subject, and the surroundings of a VM."""

    subject: ClassVar[Subject]
    pytestmark = pytest.mark.asyncio

    @pytest_asyncio.fixture
    async def world(self, tmp_path: Path) -> AsyncIterator[World]:
        """The surroundings of one VM; whatever the test did, nothing of it is left afterwards."""
        made = World(self.subject, tmp_path)
        await made.open()
        yield made
        await made.close()


class LifeContract(Contract):
    """See the module's docstring."""

    # --- order of calls

    async def test_calls_out_of_order_are_refused(self, world: World) -> None:
        vm = world.create()
        assert await vm.get_pids() == []
        assert vm.diagnostics() == {}
        for call in (vm.start_vm(1), vm.wait_vm(), vm.get_agent_socket(), vm.prepare_vm("another", None)):
            with pytest.raises(BugError):
                await call
        await vm.prepare_vm(SANDBOX, None)
        for name, call_on in _RUNNING.items():
            with pytest.raises(HypervisorError) as caught:
                await call_on(vm)
            assert caught.value.code == "FAILED_PRECONDITION", name
        for call in (vm.get_agent_socket(), vm.wait_vm()):
            with pytest.raises(BugError):
                await call
        await vm.add_device(VsockConfig(daemon=self.subject.vsock_daemon))
        with pytest.raises(BugError):
            await vm.add_device(VsockConfig(daemon=self.subject.vsock_daemon))

    async def test_release_works_at_any_point(self, world: World) -> None:
        vm = world.create()
        await vm.stop_vm()
        await vm.prepare_vm(SANDBOX, None)
        await vm.stop_vm()
        for device in self.subject.devices(await vm.hypervisor_config(), world.share):
            await vm.add_device(device)
        world.pids.update(await vm.get_pids())  # daemons may run already
        await asyncio.gather(vm.cleanup(), vm.cleanup(), vm.stop_vm())

    # --- start, knowledge, stop

    async def test_a_running_vm_tells_what_it_is(self, world: World) -> None:
        vm = await world.start()
        with pytest.raises(BugError):
            await vm.start_vm(1)
        pids = await vm.get_pids()
        master = await vm.get_vmm_master_tid()
        assert pids[0] == master
        threads = await vm.get_thread_ids()
        assert list(threads.vcpus) == [0]
        assert all(Path(f"/proc/{master}/task/{tid}").exists() for tid in threads.vcpus.values())
        assert os.readlink(await vm.get_ns_path()) == os.readlink("/proc/self/ns/net")
        state = json.loads(json.dumps(dataclasses.asdict(await vm.save_state())))
        assert (state["hypervisor"], state["sandbox_id"]) == (self.subject.plugin.name, SANDBOX)
        assert (state["pid"], state["start"] > 0, bool(state["accelerator"])) == (master, True, True)
        for pid in pids:
            _check_confined(pid)
        assert isinstance(await vm.get_jailer_root(), str)
        assert isinstance(await vm.hypervisor_config(), self.subject.plugin.section)
        # all of it at once, as a metrics scrape beside a health check does
        await asyncio.gather(*(call(vm) for _ in range(5) for call in _RUNNING.values()))

        waiting = [asyncio.create_task(vm.wait_vm()) for _ in range(3)]
        begin = time.monotonic()
        await asyncio.gather(vm.stop_vm(), vm.stop_vm())
        assert time.monotonic() - begin < PROMPT
        ends = await asyncio.gather(*waiting, vm.wait_vm())
        assert len(set(ends)) == 1
        assert ends[0].expected
        assert ends[0].reason
        assert await vm.get_pids() == []
        for name, call_on in _RUNNING.items():
            with pytest.raises(HypervisorError):
                await call_on(vm)
                pytest.fail(f"{name} answers after the end")

    async def test_it_lives_in_the_pods_network_namespace(self, world: World) -> None:
        holder = subprocess.Popen(
            ["unshare", "-n", "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE
        )
        assert holder.stdout is not None
        try:
            await asyncio.to_thread(holder.stdout.readline)
            path = f"/proc/{holder.pid}/ns/net"
            vm = await world.start(netns=path)
            assert (
                os.readlink(await vm.get_ns_path()) == os.readlink(path) != os.readlink("/proc/self/ns/net")
            )
            await vm.stop_vm()
        finally:
            holder.kill()
            holder.wait()
            holder.stdout.close()

    async def test_disconnecting_leaves_the_vm_alone(self, world: World) -> None:
        vm = await world.start()
        await vm.disconnect()
        await vm.disconnect()
        (pid, *_) = await vm.get_pids()
        assert Path(f"/proc/{pid}").exists()
        await vm.stop_vm()
        assert (await vm.wait_vm()).expected

    # --- what goes wrong

    async def test_a_vmm_that_dies_at_its_start_is_told_with_its_words(self, world: World) -> None:
        bogus = world.share / "kernel"
        bogus.write_bytes(b"nonsense" * 1000)
        vm = await world.prepare(**self.subject.breaks(bogus))
        world.pids.update(await vm.get_pids())
        with pytest.raises(HypervisorError) as caught:
            await vm.start_vm(self.subject.patience)
        assert caught.value.phase
        assert caught.value.hint
        assert caught.value.details
        assert await vm.get_pids() == []
        assert await vm.wait_vm()

    async def test_a_start_has_a_deadline(self, world: World) -> None:
        vm = await world.prepare()
        world.pids.update(await vm.get_pids())
        begin = time.monotonic()
        with pytest.raises(HypervisorError) as caught:
            await vm.start_vm(0.001)
        assert caught.value.code == "DEADLINE_EXCEEDED"
        assert time.monotonic() - begin < PROMPT
        assert await vm.get_pids() == []

    @pytest.mark.parametrize("moment", [0, 0.005, 0.02, 0.08])  # seconds
    async def test_a_start_that_is_cancelled_leaves_nothing(self, world: World, moment: float) -> None:
        vm = await world.prepare()
        world.pids.update(await vm.get_pids())
        starting = asyncio.create_task(vm.start_vm(self.subject.patience))
        await asyncio.sleep(moment)
        world.pids.update(await vm.get_pids())
        starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting
        await vm.stop_vm()
        assert await vm.get_pids() == []

    async def test_a_stop_ends_a_start_under_way(self, world: World) -> None:
        vm = await world.prepare()
        world.pids.update(await vm.get_pids())
        starting = asyncio.create_task(vm.start_vm(self.subject.patience))
        await asyncio.sleep(0)
        await asyncio.wait_for(vm.stop_vm(), PROMPT)
        with pytest.raises(HypervisorError):
            await starting
        assert (await vm.wait_vm()).expected
        assert await vm.get_pids() == []

    async def test_a_vmm_that_stands_still_is_stopped(self, world: World) -> None:
        vm = await world.start()
        os.kill(await vm.get_vmm_master_tid(), signal.SIGSTOP)
        await asyncio.wait_for(asyncio.gather(vm.stop_vm(), vm.stop_vm()), PROMPT)
        assert (await vm.wait_vm()).expected
        assert await vm.get_pids() == []

    async def test_the_vmms_death_is_told_to_everybody(self, world: World) -> None:
        vm = await world.start()
        channel = await vm.get_agent_socket()
        waiting = asyncio.create_task(channel.wait_ready(self.subject.patience))
        ends = asyncio.create_task(vm.wait_vm())
        await asyncio.sleep(0)
        os.kill(await vm.get_vmm_master_tid(), signal.SIGKILL)
        ended = await asyncio.wait_for(ends, PROMPT)
        assert (ended.expected, ended.code) == (False, -signal.SIGKILL)
        assert "SIGKILL" in ended.reason
        with pytest.raises(KataError, match="SIGKILL"):
            await asyncio.wait_for(waiting, PROMPT)
        with pytest.raises(KataError):
            await channel.connect(AGENT_PORT, 1)
        assert await vm.get_pids() == []
        await vm.stop_vm()
        assert await vm.wait_vm() == ended

    async def test_a_daemons_death_is_the_vms_and_is_told_by_its_name(
        self, world: World, tmp_path: Path
    ) -> None:
        """Of each process beside the VMM, in a VM of its own: without it the guest could only hang."""
        vm = await world.start()
        names = [_program(pid) for pid in (await vm.get_pids())[1:]]
        await vm.stop_vm()
        for number, name in enumerate(names):
            async with World(self.subject, tmp_path / str(number)) as other:
                vm = await other.start()
                (pid,) = [pid for pid in await vm.get_pids() if _program(pid) == name]
                os.kill(pid, signal.SIGKILL)
                ended = await asyncio.wait_for(vm.wait_vm(), PROMPT)
                assert not ended.expected
                assert name in ended.reason
                assert "SIGKILL" in ended.reason
                assert await vm.get_pids() == []

    async def test_two_vms_do_not_know_of_each_other(self, world: World, tmp_path: Path) -> None:
        """They have the same id, in two namespaces of containerd's: only the state directories differ."""
        first = await world.start()
        async with World(self.subject, tmp_path / "beside") as beside:
            second = await beside.start()
            pids, others = set(await first.get_pids()), set(await second.get_pids())
            assert len(pids) == len(others) > 0
            assert not pids & others
            await second.stop_vm()
        await first.check()
        assert set(await first.get_pids()) == pids

    async def test_check_asks_the_vmm(self, world: World) -> None:
        """One that stands still is none that answers, however much its process lives."""
        vm = await world.start()
        await vm.check()
        pid = await vm.get_vmm_master_tid()
        os.kill(pid, signal.SIGSTOP)
        while process_stat(pid)[0] != "T":  # the signal is on its way
            await asyncio.sleep(0.01)
        try:
            with pytest.raises(HypervisorError):
                await asyncio.wait_for(vm.check(), self.subject.patience)
                pytest.fail("check() is content with a VMM that stands still")
        finally:
            os.kill(pid, signal.SIGCONT)

    # --- what the capabilities say

    async def test_capabilities_are_at_most_the_plugins(self, world: World) -> None:
        vm = await world.prepare()
        mine, most = await vm.capabilities(), self.subject.plugin.capabilities
        for kind, operations in OPERATIONS.items():
            for op in operations:
                assert most.can(kind, op) or not mine.can(kind, op), f"{op.value} of {kind.value}"
        for name in ("pause", "snapshot", "restore"):  # the kind of vsock is the host's choice
            assert getattr(most, name) or not getattr(mine, name), name

    async def test_the_table_has_every_kind(self, world: World) -> None:
        assert set(KINDS) | PLUGGED_AS_SIZE | INSTEAD_OF_VSOCK == set(Kind)

    async def test_before_the_start_it_takes_what_the_table_says(self, world: World) -> None:
        """Column "cold-plug"; what is taken can be taken back, unless it has a daemon, and has an id of its
        own."""
        vm = world.create()
        await vm.prepare_vm(SANDBOX, None)
        can = await vm.capabilities()
        tried = set()
        for kind in KINDS:
            device = await world.make(kind)
            if device is None:
                continue
            tried.add(kind)
            if not can.can(kind, Op.COLD):
                with _unsupported(f"cold-plug of {kind.value}"):
                    await vm.add_device(device)
                continue
            assert isinstance(await vm.add_device(device), str)
            with pytest.raises(BugError):
                await vm.add_device(device)
        assert tried >= {Kind.BLK, Kind.SHARE_FS, Kind.VSOCK}
        assert isinstance(await vm.get_agent_socket(), HybridVsock) is can.hybrid_vsock
        disk = await world.gear.make(Kind.BLK)
        await vm.add_device(disk)
        await vm.remove_device(disk.id)
        await vm.add_device(disk)
        with pytest.raises((BugError, UnsupportedByHypervisor)):
            await vm.remove_device("nobody")
        world.pids.update(await vm.get_pids())

    async def test_it_takes_a_port_for_the_agent_if_the_table_says_so(self, world: World) -> None:
        """In a VM without vsock, whose channel it is then."""
        vm = world.create()
        await vm.prepare_vm(SANDBOX, None)
        if not (await vm.capabilities()).can(Kind.PORT, Op.COLD):
            with _unsupported(f"cold-plug of {Kind.PORT.value}"):
                await vm.add_device(PortConfig())
            return
        assert isinstance(await vm.add_device(PortConfig()), str)
        assert isinstance(await vm.get_agent_socket(), PortChannel)

    async def test_while_it_runs_it_refuses_what_the_table_says(self, world: World) -> None:
        """Columns "hot-plug", "unplug" and "resize": every "no" is told beforehand, and changes nothing."""
        vm = await world.start()
        can = await vm.capabilities()
        calls: list[tuple[str, bool, Callable[[], Awaitable[object]]]] = [
            ("a vCPU", can.can(Kind.VCPU, Op.HOT), lambda: vm.resize_vcpu(2)),
            ("memory", can.more_memory, lambda: vm.resize_memory(1024)),
            ("a pause", can.pause, vm.pause_vm),
            ("a snapshot", can.snapshot, lambda: vm.save_vm(str(world.directory))),
        ]
        for kind in KINDS:
            device = await world.make(kind)
            if device is not None:
                calls.append(
                    (f"hot-plug of {kind.value}", can.can(kind, Op.HOT), partial(vm.add_device, device))
                )
        usual = {
            device.kind: device for device in self.subject.devices(await vm.hypervisor_config(), world.share)
        }
        for kind, device in usual.items():
            unplug = can.can(kind, Op.UNPLUG)
            calls.append((f"unplug of {kind.value}", unplug, partial(vm.remove_device, device.id)))
            resize = can.can(kind, Op.RESIZE)
            calls.append((f"resize of {kind.value}", resize, partial(vm.update_device, device)))
        before = _files(world.directory)
        for name, possible, attempt in calls:
            if not possible:
                with _unsupported(name):
                    await attempt()
        await vm.check()  # nothing was attempted: the VM is as it was
        assert len((await vm.get_thread_ids()).vcpus) == 1
        assert _files(world.directory) == before

    async def test_a_guest_that_says_nothing_meets_the_deadline(self, world: World) -> None:
        vm = await world.start()
        if not (await vm.capabilities()).pause:
            pytest.skip("this VMM cannot pause, so the guest cannot be kept from answering")
        await vm.pause_vm()
        begin = time.monotonic()
        with pytest.raises(GuestError) as caught:
            await (await vm.get_agent_socket()).wait_ready(0.5)
        assert caught.value.code == "DEADLINE_EXCEEDED"
        assert time.monotonic() - begin < PROMPT
