"""OCI fields that Kata's messages have no place for reach our agent, and are refused for a stock one."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from google.protobuf.empty_pb2 import Empty

from agent.service import AgentService
from devices.errors import CallerError, GuestError
from proto import agent_pb2, oci_pb2
from shim.protocols import Deadlines, GuestContainer
from shim.sandbox.agent_client import FEATURE_BEYOND, FEATURE_LOOPBACK, METADATA_BEYOND, GuestAgent
from shim.state.trace import Trace
from ttrpc import CallContext, Client, Code, RpcError, Server

BEYOND = {"process": {"user": {"umask": 7}}, "linux": {"resources": {"unified": {"memory.high": "9"}}}}


class Recorder(AgentService):
    """An agent with these features, that notes the name and the metadata of the calls it gets."""

    def __init__(self, features: list[str]) -> None:
        super().__init__(-1)
        self.features = features
        self.calls: list[tuple[str, list[str]]] = []
        self.metrics = ""

    def _note(self, name: str, ctx: CallContext) -> Empty:
        self.calls.append((name, list(ctx.metadata.get(METADATA_BEYOND, []))))
        return Empty()

    async def get_guest_details(self, ctx: CallContext, request: Any) -> agent_pb2.GuestDetailsResponse:
        self._note("details", ctx)
        details = agent_pb2.AgentDetails(extra_features=self.features)
        return agent_pb2.GuestDetailsResponse(agent_details=details)

    async def get_metrics(self, ctx: CallContext, request: Any) -> agent_pb2.Metrics:
        if not self.metrics:
            return await super().get_metrics(ctx, request)
        return agent_pb2.Metrics(metrics=self.metrics)

    async def create_container(self, ctx: CallContext, _: Any) -> Empty:
        return self._note("create", ctx)

    async def exec_process(self, ctx: CallContext, _: Any) -> Empty:
        return self._note("exec", ctx)

    async def update_container(self, ctx: CallContext, _: Any) -> Empty:
        return self._note("update", ctx)


Connect = Callable[[Recorder], Any]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    servers: list[tuple[Server, asyncio.Future[None], GuestAgent]] = []
    with tempfile.TemporaryDirectory(prefix="ac-", dir="/tmp") as directory:

        async def make(recorder: Recorder) -> GuestAgent:
            path = os.path.join(directory, str(len(servers)))
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(path)
            listener.listen()
            server = Server()
            server.register(agent_pb2.DESCRIPTOR.services_by_name["AgentService"], recorder)
            serving = asyncio.ensure_future(server.serve(listener))
            client = await Client.connect_unix(path, timeout=10)
            agent = GuestAgent(client, Deadlines(), Trace("s", directory))
            servers.append((server, serving, agent))
            return agent

        yield make
        for server, serving, agent in servers:
            await agent.close()
            await server.close(1)
            await serving


async def test_our_agent_gets_them_as_metadata(connect: Connect) -> None:
    recorder = Recorder([FEATURE_BEYOND])
    agent = await connect(recorder)
    await agent.create_container("c", GuestContainer(spec=oci_pb2.Spec(), beyond=BEYOND))
    await agent.exec_process("c", "e", oci_pb2.Process(), beyond=BEYOND)
    await agent.update_container("c", oci_pb2.LinuxResources(), beyond=BEYOND)

    assert [name for name, _ in recorder.calls] == ["details", "create", "exec", "update"], "asked once"
    assert all(json.loads(metadata[0]) == BEYOND for _, metadata in recorder.calls[1:])


async def test_a_stock_agent_would_not_see_them(connect: Connect) -> None:
    recorder = Recorder([])
    agent = await connect(recorder)
    with pytest.raises(CallerError) as caught:
        await agent.create_container("c", GuestContainer(spec=oci_pb2.Spec(), beyond=BEYOND))

    assert caught.value.code == "UNIMPLEMENTED"
    assert "process.user.umask, linux.resources.unified" in str(caught.value)
    assert [name for name, _ in recorder.calls] == ["details"]


async def test_without_them_a_stock_agent_is_not_asked(connect: Connect) -> None:
    recorder = Recorder([])
    agent = await connect(recorder)
    await agent.create_container("c", GuestContainer(spec=oci_pb2.Spec()))

    assert recorder.calls == [("create", [])]


async def test_who_can_be_dialled_says_so(connect: Connect) -> None:
    assert await (await connect(Recorder([FEATURE_LOOPBACK]))).has_loopback()
    assert not await (await connect(Recorder([]))).has_loopback()


async def test_how_much_memory_the_guest_can_spare(connect: Connect) -> None:
    """Ours says it (this machine's here), and so does the stock agent; one that does not is an error."""
    recorder = Recorder([])
    agent = await connect(recorder)
    assert await agent.memory_available() > 1 << 20
    for text in ('kata_guest_meminfo{item="mem_available"} 123456\n', 'x{item="MemAvailable"} 123456'):
        recorder.metrics = f'other{{item="mem_free"}} 7\n{text}'
        assert await agent.memory_available() == 123456
    for text in ("x", 'x{item="mem_available"} many', 'x{item="mem_available"} ' + "9" * 99):
        recorder.metrics = text
        with pytest.raises(GuestError, match="do not say how much memory"):
            await agent.memory_available()


async def test_an_answer_of_any_length_is_not_decoded(connect: Connect) -> None:
    """Four megabytes have room for two million devices."""

    class Talkative(Recorder):
        async def stats_container(self, ctx: CallContext, request: Any) -> agent_pb2.StatsContainerResponse:
            answer = agent_pb2.StatsContainerResponse()
            answer.cgroup_stats.cpu_stats.cpu_usage.percpu_usage.extend([1] * 3_000_000)
            return answer

    agent = await connect(Talkative([]))
    with pytest.raises(GuestError, match=r"3000\d\d\d bytes, where 262144 are the most"):
        await agent.stats_container("c")
    assert await agent.memory_available() > 0


async def test_an_agent_that_speaks_of_a_deadline_where_there_is_none(connect: Connect) -> None:
    """Found by fuzzing: the text of the error could not be made, so containerd got a Python error."""

    class Late(Recorder):
        async def wait_process(self, ctx: CallContext, request: Any) -> agent_pb2.WaitProcessResponse:
            raise RpcError(Code.DEADLINE_EXCEEDED, "late")

    agent = await connect(Late([]))

    with pytest.raises(GuestError, match="did not answer WaitProcess in the time that it had"):
        await agent.wait_process("c", "e")
