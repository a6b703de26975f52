"""Every RPC of Kata's agent has a handler, and the ones that we cannot serve say so."""

from __future__ import annotations

import asyncio
import socket

import pytest

from agent import sandbox as sandbox_module
from agent.sandbox import Sandbox, check_id
from agent.service import MAY_BE_CANCELLED, AgentService, HealthService
from proto import agent_pb2, health_pb2
from ttrpc import CallContext, Client, Code, RpcError, Server
from ttrpc import snake_case as handler_name

_AGENT = agent_pb2.DESCRIPTOR.services_by_name["AgentService"]
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
_CONTEXT = CallContext("grpc.AgentService", "x")


def test_each_rpc_has_a_handler() -> None:
    missing = [m.name for m in _AGENT.methods if not hasattr(AgentService, handler_name(m.name))]
    missing += [m.name for m in _HEALTH.methods if not hasattr(HealthService, handler_name(m.name))]

    assert missing == []
    assert set(MAY_BE_CANCELLED) <= set(_AGENT.methods_by_name)


@pytest.mark.parametrize("name", ["mem_agent_memcg_set", "set_policy", "get_ip_tables"])
async def test_what_cannot_be_done_says_so(name: str) -> None:
    with pytest.raises(RpcError) as caught:
        await getattr(AgentService(-1), name)(_CONTEXT, None)

    assert caught.value.code == Code.UNIMPLEMENTED


async def test_health_over_a_connection(short_dir: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{short_dir}/agent")
    listener.listen()
    server = Server()
    server.register(_HEALTH, HealthService())
    serving = asyncio.ensure_future(server.serve(listener))
    client = await Client.connect_unix(f"{short_dir}/agent", timeout=5)
    stub = client.stub(_HEALTH, default_timeout=5)
    answer = await stub.check(health_pb2.CheckRequest())
    version = await stub.version(health_pb2.CheckRequest())
    await client.close()
    await server.close(1)
    await serving

    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert version.agent_version


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0", "x" * 256, "a b", "-é/"])
def test_ids_that_are_no_file_names(name: str) -> None:
    with pytest.raises(RpcError):
        check_id(name, "container")


class _Stub:
    """A container as far as Sandbox's rules look at it."""

    def __init__(self, config: dict[str, object]) -> None:
        self.config = config


@pytest.fixture
async def sandbox(short_dir: str, orphans: object, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    monkeypatch.setattr(sandbox_module, "WORK_DIR", f"{short_dir}/work")
    monkeypatch.setattr(sandbox_module, "ROOT", f"{short_dir}/crun")
    return Sandbox(orphans, None)  # type: ignore[arg-type]


async def test_cgroups_do_not_nest(sandbox: Sandbox) -> None:
    sandbox.containers["a"] = _Stub({"linux": {"cgroupsPath": "/pod/a"}})  # type: ignore[assignment]
    placed = []
    for wanted in ("/pod/b", "/pod/a", "/pod", "/pod/a/b", "/pod/ab"):
        config = {"linux": {"cgroupsPath": wanted}}
        sandbox._place(config, "new")
        placed.append(config["linux"]["cgroupsPath"])

    assert placed == ["/pod/b", "/kata/new", "/kata/new", "/kata/new", "/pod/ab"]


async def test_containers_of_a_pod_share_namespaces(sandbox: Sandbox) -> None:
    sandbox._namespaces = {"ipc": "/proc/1/fd/8", "uts": "/proc/1/fd/9", "pid": "/proc/1/fd/10"}
    own = {"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "mount"}]}
    shared = {"namespaces": [{"type": "ipc"}, {"type": "mount"}]}
    sandbox._share_namespaces(own, share_pid=False, private=[])
    sandbox._share_namespaces(shared, share_pid=True, private=["uts"])

    assert own["namespaces"] == [{"type": "pid"}, {"type": "ipc", "path": "/proc/1/fd/8"}, {"type": "mount"}]
    assert {"type": "pid", "path": "/proc/1/fd/10"} in shared["namespaces"]


async def test_a_container_may_have_namespaces_of_its_own(sandbox: Sandbox) -> None:
    sandbox._namespaces = {"ipc": "/proc/1/fd/8", "uts": "/proc/1/fd/9"}
    linux = {"namespaces": [{"type": "ipc"}, {"type": "uts"}]}
    sandbox._share_namespaces(linux, share_pid=False, private=["ipc", "mount"])

    assert linux["namespaces"] == [{"type": "ipc"}, {"type": "uts", "path": "/proc/1/fd/9"}, {"type": "pid"}]


async def test_requests_that_make_no_sense(sandbox: Sandbox) -> None:
    with pytest.raises(RpcError) as unknown:
        sandbox.container("nobody")
    with pytest.raises(RpcError) as empty:
        await sandbox.create_container(agent_pb2.CreateContainerRequest(container_id="a"))

    assert unknown.value.code == Code.NOT_FOUND
    assert empty.value.code == Code.INVALID_ARGUMENT
