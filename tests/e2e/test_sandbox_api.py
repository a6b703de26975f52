"""The Sandbox API on a real VM: a pod without a pause container, from CreateSandbox to ShutdownSandbox.

The shim is started as containerd's sandbox controller starts it, in a bundle without a config.json, and
called with ttrpc, so that each answer can be looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from google.protobuf.any_pb2 import Any as AnyMessage

import ttrpc
from proto import (
    cri_pb2,
    runtimeoptions_pb2,
    sandbox_v1_pb2,
    streaming_pb2,
    task_v2_pb2,
    transfer_streams_pb2,
)
from testing import leaks
from testing.api import Api
from testing.containerd import Containerd
from testing.guest import PROJECT

pytestmark = pytest.mark.kata_only

BUSYBOX = "local/busybox:1"
_SANDBOX = sandbox_v1_pb2.DESCRIPTOR.services_by_name["Sandbox"]
_STREAMING = streaming_pb2.DESCRIPTOR.services_by_name["Streaming"]
_TASK = task_v2_pb2.DESCRIPTOR.services_by_name["Task"]


class Pod:
    """A shim that was started for a sandbox, and its two services."""

    def __init__(self, containerd: Containerd, api: Api) -> None:
        self.containerd = containerd
        self.api = api
        self.id = containerd.new_id("sandbox")
        controller = containerd.state / "io.containerd.sandbox.controller.v1.shim" / containerd.namespace
        self.bundle = controller / self.id
        self.containers: list[str] = []

    def shim(self, action: str, *, where: Path, name: str, stdin: bytes = b"") -> bytes:
        """Run the shim binary as containerd does; its stdout."""
        program = str(self.containerd.root / "bin/containerd-shim-kata-v2")
        flags = ["-namespace", self.containerd.namespace, "-address", self.containerd.address]
        done = subprocess.run(
            [program, *flags, "-publish-binary", "containerd", "-id", name, "-bundle", str(where), action],
            check=True,
            cwd=where,
            # Not the KATA_CONF_FILE of this session: the path comes with the options.
            env={
                **self.containerd.environment,
                "KATA_CONF_FILE": "",
                "TTRPC_ADDRESS": f"{self.containerd.address}.ttrpc",
            },
            input=stdin,
            capture_output=True,
            timeout=60,
        )
        return done.stdout

    async def start(self) -> None:
        """`start`, and a connection."""
        self.bundle.mkdir(parents=True)
        options = runtimeoptions_pb2.Options(config_path=str(self.containerd.configuration))
        type_url = b"runtimeoptions.v1.Options"
        value = options.SerializeToString()
        data = b"\x0a" + bytes([len(type_url)]) + type_url + b"\x12" + bytes([len(value)]) + value
        address = self.shim("start", where=self.bundle, name=self.id, stdin=data).decode()
        self.client = await ttrpc.Client.connect_unix(address.removeprefix("unix://"), timeout=10)

    async def call(self, name: str, timeout: float = 90, **fields: Any) -> Any:
        """An RPC of the Sandbox service."""
        method = _SANDBOX.methods_by_name[name]
        request = getattr(sandbox_v1_pb2, method.input_type.name)(sandbox_id=self.id, **fields)
        return await self.client.call(method, request, timeout=timeout)

    async def task(self, name: str, container: str, timeout: float = 90, **fields: Any) -> Any:
        """An RPC of the Task service."""
        method = _TASK.methods_by_name[name]
        request = getattr(task_v2_pb2, method.input_type.name)(id=container, **fields)
        return await self.client.call(method, request, timeout=timeout)

    async def stream(self, name: str) -> Any:
        """A stream of the shim's, opened as containerd 2.x does: up to its acknowledgement."""
        stream = await self.client.stub(_STREAMING).stream()
        await stream.send(_any(streaming_pb2.StreamInit(id=name)))
        assert (await anext(stream)).type_url == "google.protobuf.Empty"
        return stream

    async def run(self, *command: str, **streams: Any) -> tuple[str, Path]:
        """A started container as a member of the pod, and the file that its output goes to by default."""
        ctr = self.containerd
        name = ctr.new_id("member")
        ctr.ctr("container", "create", BUSYBOX, name)
        self.containers.append(name)
        spec = json.loads(
            self.api.call("containerd.services.containers.v1.Containers", "Get", id=name).container.spec.value
        )
        spec["process"]["args"] = list(command)
        spec["annotations"] = {
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": self.id,
        }
        bundle = ctr.state / "io.containerd.runtime.v2.task" / ctr.namespace / name
        (bundle / "rootfs").mkdir(parents=True)
        (bundle / "config.json").write_text(json.dumps(spec))
        assert self.shim("start", where=bundle, name=name).decode() == (self.bundle / "address").read_text()
        mounts = self.api.call(
            "containerd.services.snapshots.v1.Snapshots", "Mounts", snapshotter="overlayfs", key=name
        ).mounts
        output = bundle / "output"
        rootfs = [{"type": m.type, "source": m.source, "options": list(m.options)} for m in mounts]
        streams.setdefault("stdout", f"file://{output}")
        await self.task("Create", name, bundle=str(bundle), rootfs=rootfs, **streams)
        await self.task("Start", name)
        return name, output

    async def close(self) -> None:
        """End it as containerd does after a failure, if the test did not. Idempotent."""
        await self.client.close()
        if not self.bundle.exists():
            return
        for name in self.containers:
            bundle = (
                self.containerd.state / "io.containerd.runtime.v2.task" / self.containerd.namespace / name
            )
            self.shim("delete", where=bundle, name=name)
            _remove(bundle)
            self.containerd.remove(name)
        self.shim("delete", where=self.bundle, name=self.id)
        _remove(self.bundle)


def _any(message: Any) -> AnyMessage:
    return AnyMessage(type_url=message.DESCRIPTOR.full_name, value=message.SerializeToString())


def _remove(bundle: Path) -> None:
    for path in sorted(bundle.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    bundle.rmdir()


@pytest_asyncio.fixture
async def pod(containerd: Containerd, api: Api, no_leaks: Callable[[], None]) -> AsyncIterator[Pod]:
    pod = Pod(containerd, api)
    await pod.start()
    yield pod
    await pod.close()
    no_leaks()


async def test_a_sandbox_lives_without_a_container(pod: Pod) -> None:
    config = cri_pb2.PodSandboxConfig(hostname="web-0")
    config.dns_config.servers.append("10.0.0.10")
    config.linux.sysctls["kernel.shm_rmid_forced"] = "1"
    options = {"type_url": "runtime.v1.PodSandboxConfig", "value": config.SerializeToString()}
    await pod.call("CreateSandbox", bundle_path=str(pod.bundle), options=options)
    platform = (await pod.call("Platform")).platform
    assert (platform.os, platform.architecture) == ("linux", "amd64")
    with pytest.raises(ttrpc.RpcError) as refused:
        await pod.run("true")
    assert refused.value.code is ttrpc.Code.FAILED_PRECONDITION

    started = await pod.call("StartSandbox")
    assert os.path.basename(os.readlink(f"/proc/{started.pid}/exe")).startswith("qemu-system")
    waiting = asyncio.create_task(pod.call("WaitSandbox"))
    await pod.call("PingSandbox", timeout=10)
    status = await pod.call("SandboxStatus", verbose=True)
    assert (status.state, status.pid, status.created_at) == ("SANDBOX_READY", started.pid, started.created_at)
    info = dict(status.info)
    assert (info["hypervisor"], info["accelerator"], info["vmm.pid"]) == ("qemu", "tcg", str(started.pid))
    assert info["guest.kernel"] == str(PROJECT / "build/guest/vmlinux")
    assert int(info["guest.memory_mib"]) >= 128
    assert {"vmm.start", "vmm.boot", "agent.connect"} <= json.loads(info["phases"]).keys()
    metrics = (await pod.call("SandboxMetrics")).metrics
    assert metrics.id == pod.id
    assert metrics.data.type_url.endswith(".Metrics")

    script = "hostname; cat /etc/resolv.conf /etc/hostname /proc/sys/kernel/shm_rmid_forced; exit 3"
    name, output = await pod.run("sh", "-c", script)
    assert (await pod.task("Wait", name)).exit_status == 3
    assert output.read_text() == "web-0\nnameserver 10.0.0.10\nweb-0\n1\n"
    await pod.task("Delete", name)
    await pod.task("Shutdown", name)
    await pod.call("PingSandbox", timeout=10)

    # A container that still runs ends with the pod, and its exit is told.
    name, _ = await pod.run("sleep", "100000")
    ending = asyncio.create_task(pod.task("Wait", name))
    await pod.call("StopSandbox")
    assert (await ending).exit_status == 137
    ended = await waiting
    assert ended.exit_status == 0
    status = await pod.call("SandboxStatus", verbose=True)
    assert (status.state, status.exited_at) == ("SANDBOX_NOTREADY", ended.exited_at)
    assert not leaks.lives(started.pid)
    await pod.task("Delete", name)
    await pod.call("StopSandbox")
    await pod.call("ShutdownSandbox")


async def test_the_death_of_the_vm_is_told_at_once(pod: Pod) -> None:
    """To a container too that talks with its client over ttrpc streams."""
    await pod.call("CreateSandbox", bundle_path=str(pod.bundle))
    started = await pod.call("StartSandbox")
    stdin, stdout = [await pod.stream(name) for name in ("in", "out")]
    url = "ttrpc+" + (pod.bundle / "address").read_text() + "?streaming_id="
    name, _ = await pod.run("cat", stdin=url + "in", stdout=url + "out")
    await stdout.send(_any(transfer_streams_pb2.WindowUpdate(update=1 << 20)))
    assert transfer_streams_pb2.WindowUpdate.FromString((await anext(stdin)).value).update > 0
    for word in (b"one\n", b"two\n"):
        await stdin.send(_any(transfer_streams_pb2.Data(data=word)))
        assert transfer_streams_pb2.Data.FromString((await anext(stdout)).value).data == word

    waiting = [asyncio.create_task(work) for work in (pod.call("WaitSandbox"), pod.task("Wait", name))]
    os.kill(started.pid, signal.SIGKILL)
    ended, exited = await asyncio.gather(*waiting)
    assert (ended.exit_status, exited.exit_status) == (255, 255)
    with pytest.raises(StopAsyncIteration):
        await anext(stdout)
    status = await pod.call("SandboxStatus")
    assert (status.state, status.exited_at) == ("SANDBOX_NOTREADY", ended.exited_at)
    with pytest.raises(ttrpc.RpcError) as refused:
        await pod.call("PingSandbox")
    assert refused.value.code is ttrpc.Code.FAILED_PRECONDITION
    await pod.task("Delete", name)
    await pod.call("ShutdownSandbox")


async def test_a_shim_that_is_killed_leaves_nothing(pod: Pod) -> None:
    """`delete`, which containerd runs then and the fixture here, finds a bundle without a config.json."""
    await pod.call("CreateSandbox", bundle_path=str(pod.bundle))
    started = await pod.call("StartSandbox")
    await pod.run("sleep", "100000")
    os.kill(int((pod.bundle / "shim.pid").read_text()), signal.SIGKILL)
    with pytest.raises(ttrpc.ConnectionClosed):
        await pod.call("WaitSandbox")
    await pod.close()
    with contextlib.suppress(FileNotFoundError):  # its parent is dead: init may not have reaped it yet
        state = Path(f"/proc/{started.pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state == "Z"
