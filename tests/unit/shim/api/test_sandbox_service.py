"""The Sandbox service: each RPC in each state, and a VM that only StopSandbox, Shutdown or death ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
from google.protobuf.any_pb2 import Any as AnyMessage

from devices.errors import GuestError, KataError
from proto import cri_pb2, runtimeoptions_pb2, sandbox_v1_pb2
from shim.api.sandbox_service import SandboxService
from shim.resources.network.settings import NetworkSettings
from shim.sandbox.pod_config import PodDefaults
from shim.sandbox.pod_sandbox import TABLE, Call, PodSandbox, State
from shim.spec.limits import Size
from shim.state.trace import Trace
from tests.unit.shim.fakes import VMM_PID, FakeRuntime, FakeSandbox, TaskClient
from ttrpc import snake_case

OK, NOT_FOUND, EXISTS, REFUSED = "OK", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION"

STATES = ("absent", "created", "ready", "stopped", "died")
# fmt: off
CODES = {
    #                   absent     created  ready    stopped  died
    "CreateSandbox":   (OK,        EXISTS,  EXISTS,  EXISTS,  EXISTS),
    "StartSandbox":    (NOT_FOUND, OK,      OK,      REFUSED, REFUSED),
    "Platform":        (NOT_FOUND, OK,      OK,      OK,      OK),
    "StopSandbox":     (NOT_FOUND, OK,      OK,      OK,      OK),
    "SandboxStatus":   (NOT_FOUND, OK,      OK,      OK,      OK),
    "PingSandbox":     (NOT_FOUND, REFUSED, OK,      REFUSED, REFUSED),
    "SandboxMetrics":  (NOT_FOUND, REFUSED, OK,      REFUSED, REFUSED),
    "ShutdownSandbox": (OK,        OK,      OK,      OK,      OK),
    "task.Create":     (OK,        REFUSED, OK,      REFUSED, REFUSED),
}
# fmt: on


class _Hypervisor:
    """What a fake sandbox says of its VMM."""

    async def hypervisor_config(self) -> Any:
        return type(
            "Section",
            (),
            {"kernel": "/k", "image": "", "initrd": "/i"},
        )

    async def save_state(self) -> Any:
        return type("HypervisorState", (), {"hypervisor": "qemu", "accelerator": "tcg", "pid": VMM_PID})

    async def get_pids(self) -> list[int]:
        return [VMM_PID]

    async def get_ns_path(self) -> str:
        return f"/proc/{VMM_PID}/ns/net"

    async def get_hypervisor_metrics(self) -> dict[str, float]:
        return {"cpu_seconds_total": 2.5, "resident_bytes": 1 << 28, "processes": 3.0}


class _Sandbox(FakeSandbox):
    """One whose VMM can be asked, and which has a pid only while it runs, like the real one."""

    def __init__(self, sandbox_id: str) -> None:
        super().__init__(sandbox_id)
        self.hypervisor = _Hypervisor()
        self.settings: Any = type(
            "Settings",
            (),
            {
                "hostname": "h",
                "share_path": "/s",
                "network": NetworkSettings(),
                "pod": None,
                "direct_stdio": True,
            },
        )
        self.size = Size(1.0, 256 << 20)
        self.checks = 0

    @property
    def vmm_pid(self) -> int:
        return VMM_PID if self.started else 0

    async def check(self, timeout: float) -> None:
        self.checks += 1


class _Pods(FakeRuntime):
    """A runtime that makes sandboxes by the Sandbox API too."""

    def __init__(self, manager: Any, tasks: asyncio.TaskGroup) -> None:
        super().__init__(pod="pod")
        self.pod: PodSandbox | None = None
        self.trace = Trace("pod")
        self.trace.mark("vmm.boot", 1.0, 2.5)
        self.spec: Mapping[str, Any] = {}
        self._manager = manager
        self._tasks = tasks

    async def sandbox_for(self, container_id: str, bundle: str, spec: Any, options: Any) -> FakeSandbox:
        if self.pod is not None:
            return cast("FakeSandbox", self.pod.admit(container_id))
        return await super().sandbox_for(container_id, bundle, spec, options)

    async def make_pod(
        self, spec: Mapping[str, Any], options: AnyMessage, defaults: PodDefaults
    ) -> PodSandbox:
        self.spec, self.options, self.defaults = spec, options, defaults
        sandbox = self.sandbox = _Sandbox("pod")
        sandbox.settings.pod = defaults
        self.sandboxes.append(self.sandbox)
        self.prepare(self.sandbox)
        self.pod = PodSandbox(cast("Any", self.sandbox), self._manager, self._tasks)
        return self.pod


class Client(TaskClient):
    """A client of both services."""

    def __init__(self, directory: Path, tasks: asyncio.TaskGroup) -> None:
        super().__init__(directory)
        self.pods = _Pods(self.manager, tasks)
        self.runtime = self.pods
        self.manager._runtime = self.pods
        (directory / "b").mkdir()
        self.sandboxes = SandboxService(
            self.pods,
            self.manager,
            sandbox_id="pod",
            bundle=str(directory / "b"),
            files=str(directory / "files"),
            shutdown=self._shut_down,
        )

    async def rpc(self, name: str, sandbox_id: str = "pod", **fields: Any) -> Any:
        method = sandbox_v1_pb2.DESCRIPTOR.services_by_name["Sandbox"].methods_by_name[name]
        request = getattr(sandbox_v1_pb2, method.input_type.name)(sandbox_id=sandbox_id, **fields)
        return await getattr(self.sandboxes, snake_case(name))(None, request)

    async def code(self, name: str, **fields: Any) -> str:
        try:
            if name == "task.Create":
                await self.create("c")
            else:
                await self.rpc(name, **fields)
        except KataError as error:
            return error.code
        return OK

    async def bring(self, state: str) -> None:
        """The sandbox into a state."""
        if state == "absent":
            return
        await self.rpc("CreateSandbox")
        if state in {"ready", "died"}:
            await self.rpc("StartSandbox")
        if state == "died":
            self.sandbox.die()
            await self.rpc("WaitSandbox")
        if state == "stopped":
            await self.rpc("StopSandbox")


@pytest_asyncio.fixture
async def shim(tmp_path: Path) -> AsyncIterator[Client]:
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        client = Client(tmp_path, tasks)
        yield client
        if client.pods.pod is not None:
            await client.pods.pod.stop(0)
        await client.close()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("rpc", CODES)
async def test_every_call_in_every_state(shim: Client, rpc: str, state: str) -> None:
    await shim.bring(state)
    assert await shim.code(rpc) == CODES[rpc][STATES.index(state)]
    if rpc == "ShutdownSandbox":
        assert shim.shutdowns == 1
        assert not shim.pods.sandboxes or shim.sandbox.stopped


@pytest.mark.parametrize("rpc", [rpc for rpc in CODES if "." not in rpc] + ["WaitSandbox"])
@pytest.mark.parametrize("state", ["absent", "ready"])
async def test_a_shim_has_one_sandbox(shim: Client, rpc: str, state: str) -> None:
    await shim.bring(state)
    assert await shim.code(rpc, sandbox_id="other") == NOT_FOUND
    assert shim.shutdowns == 0


def test_the_table_names_all_states_and_only_those() -> None:
    assert set(TABLE) == set(Call)
    assert all(after in State for row in TABLE.values() for pair in row.items() for after in pair)


async def test_its_life(shim: Client) -> None:
    await shim.rpc("CreateSandbox")
    status = await shim.rpc("SandboxStatus")
    assert (status.state, status.pid, status.HasField("created_at")) == ("SANDBOX_NOTREADY", 0, False)
    assert not shim.manager.idle, "a sandbox without containers is somebody's"
    started = await shim.rpc("StartSandbox")
    assert started.pid == VMM_PID
    assert await shim.rpc("StartSandbox") == started, "who asks again gets the same answer"
    assert shim.sandbox.log.count("start") == 1
    waiting = asyncio.create_task(shim.rpc("WaitSandbox"))
    status = await shim.rpc("SandboxStatus")
    assert (status.state, status.pid, status.created_at) == ("SANDBOX_READY", VMM_PID, started.created_at)
    assert not status.HasField("exited_at")
    platform = (await shim.rpc("Platform")).platform
    assert (platform.os, platform.architecture) == ("linux", "amd64")
    await shim.rpc("PingSandbox")
    assert isinstance(shim.sandbox, _Sandbox)
    assert shim.sandbox.checks == 1
    await shim.rpc("StopSandbox")
    ended = await waiting
    assert ended.exit_status == 0
    status = await shim.rpc("SandboxStatus")
    assert (status.state, status.exited_at) == ("SANDBOX_NOTREADY", ended.exited_at)
    assert shim.sandbox.stopped
    assert shim.shutdowns == 0
    await shim.rpc("ShutdownSandbox")
    assert shim.shutdowns == 1


async def test_verbose_status_and_metrics(shim: Client) -> None:
    await shim.bring("ready")
    assert not (await shim.rpc("SandboxStatus")).info
    info = (await shim.rpc("SandboxStatus", verbose=True)).info
    assert {
        "vmm.pid": str(VMM_PID),
        "hypervisor": "qemu",
        "accelerator": "tcg",
        "guest.kernel": "/k",
        "guest.image": "/i",
        "guest.memory_mib": "256",
        "guest.vcpus": "1",
        "phases": '{"vmm.boot": 1.5}',
    }.items() <= dict(info).items()
    assert "netns" not in info
    metrics = (await shim.rpc("SandboxMetrics")).metrics
    assert metrics.id == "pod"
    assert metrics.timestamp.seconds > 1_600_000_000
    assert metrics.data.type_url in {"io.containerd.cgroups.v1.Metrics", "io.containerd.cgroups.v2.Metrics"}
    from proto import metrics_v1_pb2, metrics_v2_pb2

    if metrics.data.type_url.endswith("v1.Metrics"):
        v1 = metrics_v1_pb2.Metrics.FromString(metrics.data.value)
        assert (v1.cpu.usage.total, v1.memory.usage.usage, v1.memory.usage.limit) == (
            2_500_000_000, 1 << 28, 256 << 20,
        )  # fmt: skip
    else:
        v2 = metrics_v2_pb2.Metrics.FromString(metrics.data.value)
        assert (v2.cpu.usage_usec, v2.memory.usage, v2.memory.usage_limit) == (2_500_000, 1 << 28, 256 << 20)


async def test_containers_come_and_go_and_the_sandbox_stays(shim: Client) -> None:
    await shim.bring("ready")
    for name in ("c", "d"):
        await shim.create(name)
        await shim.start(name)
    shim.guest("c").exit(3)
    assert (await shim.wait("c")).exit_status == 3
    await shim.delete("c")
    shim.guest("d").exit(0)
    await shim.wait("d")
    await shim.delete("d")
    await shim.call("Shutdown", id="d")
    assert not shim.sandbox.stopped
    assert shim.shutdowns == 0
    assert (await shim.rpc("SandboxStatus")).state == "SANDBOX_READY"
    await shim.create("e")
    shim.agent.before["create_container"] = _fail
    with pytest.raises(GuestError):
        await shim.create("f")
    assert not shim.sandbox.stopped, "neither does a failed Create end it"


async def _fail() -> None:
    raise GuestError("no")


async def test_a_sandbox_that_containerd_does_not_know_goes(shim: Client) -> None:
    """containerd died inside RunPodSandbox: its next one finds a shim, not a sandbox, and cleans it up."""
    await shim.bring("ready")
    await shim.create()
    await shim.call("Shutdown", id="pod")
    assert shim.shutdowns == 0, "a container lives in it"
    await shim.delete()
    await shim.call("Shutdown", id="c")
    assert shim.shutdowns == 0
    await shim.call("Shutdown", id="pod")
    assert shim.shutdowns == 1


async def test_no_container_has_the_sandboxs_id(shim: Client) -> None:
    await shim.bring("ready")
    with pytest.raises(KataError) as error:
        await shim.create("pod")
    assert error.value.code == EXISTS


@pytest.mark.parametrize(("grace", "signals", "status"), [(0, [9], 137), (30, [15], 143)])
async def test_stop_ends_what_still_runs(shim: Client, grace: int, signals: list[int], status: int) -> None:
    await shim.bring("ready")
    await shim.create()
    await shim.start()
    process = shim.guest()
    await shim.rpc("StopSandbox", timeout_secs=grace)
    assert process.signals == signals
    assert (await shim.wait()).exit_status == status
    assert [event.exit_status for event in shim.events.of("exit")] == [status]
    await shim.delete()
    assert shim.events.topics == ["create", "start", "exit", "delete"]


async def test_who_ignores_sigterm_is_killed_after_the_grace(shim: Client) -> None:
    await shim.bring("ready")
    await shim.create()
    await shim.start()
    process = shim.guest()
    process.ignores.add(15)
    await shim.rpc("StopSandbox", timeout_secs=1)
    assert process.signals == [15, 9]
    assert (await shim.wait()).exit_status == 137


async def test_the_death_of_the_vm_is_told(shim: Client) -> None:
    await shim.bring("ready")
    await shim.create()
    await shim.start()
    waiting = asyncio.create_task(shim.rpc("WaitSandbox"))
    await asyncio.sleep(0)
    shim.sandbox.die()
    ended = await waiting
    assert (ended.exit_status, ended.exited_at.seconds > 1_600_000_000) == (255, True)
    status = await shim.rpc("SandboxStatus", verbose=True)
    assert (status.state, status.exited_at) == ("SANDBOX_NOTREADY", ended.exited_at)
    assert (await shim.wait()).exit_status == 255
    await shim.rpc("StopSandbox")
    assert shim.sandbox.stopped
    assert (await shim.rpc("WaitSandbox")) == ended, "a stop afterwards changes nothing"


async def test_remains_of_a_dead_vm_go_unasked(shim: Client) -> None:
    await shim.bring("died")
    while not shim.sandbox.stopped:  # noqa: ASYNC110  (the fixture's deadline bounds it)
        await asyncio.sleep(0.001)


async def test_a_vm_that_does_not_come_up(shim: Client) -> None:
    def spoil(sandbox: FakeSandbox) -> None:
        sandbox.fail["start"] = GuestError("no agent", phase="boot", code="DEADLINE_EXCEEDED")

    shim.pods.prepare = spoil
    await shim.rpc("CreateSandbox")
    assert await shim.code("StartSandbox") == "DEADLINE_EXCEEDED"
    assert (await shim.rpc("WaitSandbox")).exit_status == 255
    assert shim.sandbox.stopped
    assert await shim.code("StartSandbox") == REFUSED
    assert (await shim.rpc("SandboxStatus")).state == "SANDBOX_NOTREADY"


async def test_two_starts_boot_once_and_a_caller_that_goes_stops_nothing(shim: Client) -> None:
    go = asyncio.Event()
    await shim.rpc("CreateSandbox")
    shim.sandbox.before["start"] = lambda: _until(go)
    gone = asyncio.create_task(shim.rpc("StartSandbox"))
    other = asyncio.create_task(shim.rpc("StartSandbox"))
    await asyncio.sleep(0.01)
    gone.cancel()
    go.set()
    assert (await other).pid == VMM_PID
    assert shim.sandbox.log.count("start") == 1
    assert (await shim.rpc("SandboxStatus")).state == "SANDBOX_READY"


async def _until(event: asyncio.Event) -> None:
    await event.wait()


async def test_a_stop_ends_a_start_under_way(shim: Client) -> None:
    go = asyncio.Event()

    async def booting() -> None:
        await go.wait()
        raise GuestError("the sandbox was stopped while it booted", code="CANCELLED")

    async def stopping() -> None:
        go.set()

    await shim.rpc("CreateSandbox")
    shim.sandbox.before["start"] = booting
    shim.sandbox.before["stop"] = stopping
    starting = asyncio.create_task(shim.code("StartSandbox"))
    await asyncio.sleep(0.01)
    await shim.rpc("StopSandbox")
    assert await starting == "CANCELLED"
    assert (await shim.rpc("WaitSandbox")).exit_status == 0
    assert await shim.code("StartSandbox") == REFUSED


async def test_containers_without_a_sandbox_keep_their_shim(shim: Client) -> None:
    await shim.create()
    assert await shim.code("CreateSandbox") == REFUSED
    assert await shim.code("ShutdownSandbox") == REFUSED
    assert shim.shutdowns == 0


async def test_what_it_is_made_of(shim: Client) -> None:
    config = cri_pb2.PodSandboxConfig(hostname="web", annotations={"io.katacontainers.x": "y", "other": "z"})
    config.dns_config.servers.append("10.0.0.10")
    config.linux.sysctls["net.ipv4.tcp_syncookies"] = "0"
    config.linux.resources.cpu_quota = 150_000
    options = AnyMessage(type_url="types/runtime.v1.PodSandboxConfig", value=config.SerializeToString())
    await shim.rpc("CreateSandbox", options=options, netns_path="/run/netns/n", annotations={"a": "b"})
    spec = shim.pods.spec
    assert spec["hostname"] == "web"
    assert spec["annotations"] == {
        "a": "b",
        "io.katacontainers.x": "y",
        "io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri.sandbox-id": "pod",
        "io.kubernetes.cri.sandbox-cpu-quota": "150000",
    }
    assert spec["linux"]["namespaces"] == [{"type": "network", "path": "/run/netns/n"}]
    assert shim.pods.defaults.sysctls == {"net.ipv4.tcp_syncookies": "0"}
    resolv = Path(shim.pods.defaults.files["/etc/resolv.conf"])
    assert resolv.read_text() == "nameserver 10.0.0.10\n"


@pytest.mark.parametrize(("pid", "held"), [(cri_pb2.POD, True), (cri_pb2.CONTAINER, False), (None, False)])
async def test_a_shared_pid_namespace_is_held_in_the_guest(
    shim: Client, pid: cri_pb2.NamespaceMode.ValueType | None, held: bool
) -> None:
    """It would end with the first container otherwise; containerd never hears of the holder."""
    config = cri_pb2.PodSandboxConfig()
    if pid is not None:
        config.linux.security_context.namespace_options.pid = pid
    if pid == cri_pb2.POD:
        config.linux.security_context.namespace_options.SetInParent()
    options = AnyMessage(type_url="runtime.v1.PodSandboxConfig", value=config.SerializeToString())
    await shim.rpc("CreateSandbox", options=options)
    await shim.rpc("StartSandbox")
    assert list(shim.agent.containers) == (["pod"] if held else [])
    if held:
        assert shim.agent.containers["pod"].sandbox_pidns
        assert shim.guest("pod").running
    assert shim.events.topics == []
    await shim.create()
    await shim.rpc("StopSandbox")
    assert shim.events.topics == ["create", "exit"]


async def test_options_that_cannot_be_read_are_refused(shim: Client) -> None:
    broken = AnyMessage(type_url="runtime.v1.PodSandboxConfig", value=b"\xff\xff")
    assert await shim.code("CreateSandbox", options=broken) == "INVALID_ARGUMENT"
    other = AnyMessage(
        type_url="runtimeoptions.v1.Options",
        value=runtimeoptions_pb2.Options(config_path="/c").SerializeToString(),
    )
    assert await shim.code("CreateSandbox", options=other) == OK
    assert shim.pods.options == other


async def test_a_bundle_with_a_spec_is_a_sandbox_too(shim: Client) -> None:
    """`ctr sandboxes run` gives the sandbox an OCI spec."""
    bundle = shim.directory / "b"
    (bundle / "config.json").write_text('{"hostname": "h", "linux": {"namespaces": [{"type": "network"}]}}')
    await shim.rpc("CreateSandbox", netns_path="/n")
    assert shim.pods.spec["hostname"] == "h"
    assert shim.pods.spec["linux"]["namespaces"] == [{"type": "network", "path": "/n"}]
