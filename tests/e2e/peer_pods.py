"""A hypervisor service that makes VMs on this machine: what cloud-api-adaptor is to a cloud.

What: `python -m tests.e2e.peer_pods DIRECTORY NAME=TREE ...` serves Kata's hypervisor.proto at
DIRECTORY/hypervisor.sock. A VM is QEMU's, with this project's guest and a disk for each image NAME, made of
the files of the tar TREE. The agent's calls are relayed from DIRECTORY/ID/agent.ttrpc one by one; in
CreateContainer the storage `image_guest_pull` becomes the disk with that image: that stands for the guest's
fetching it. Each call is a line of JSON in DIRECTORY/calls.
Why a process: such a service is never in the shim. SIGTERM ends it with all of its VMs.
Source: cloud-api-adaptor of August 2026: what is refused, and that the socket is there from StartVM on.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from devices.config import BlockConfig, ConsoleConfig, RngConfig, VsockConfig
from devices.manager import DeviceManager
from devices.undo import MemoryUndo
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.plugin import plugin
from hypervisors.qemu.vmm import Qemu
from proto import agent_pb2, health_pb2, remote_pb2
from shim.spec.guest_spec import guest_rootfs
from testing.guest import PROJECT, guest_files
from tests.e2e.vms import BOOT, E2FS
from ttrpc import CallContext, Client, Code, RpcError, Server
from ttrpc._names import snake_case

_POD = ("io.kubernetes.cri.sandbox-name", "io.kubernetes.cri.sandbox-namespace")
_CALL = 120.0  # seconds


@dataclasses.dataclass
class Pod:
    """One VM, from CreateVM on."""

    directory: Path
    vm: Qemu | None = None
    agent: Client | None = None
    server: Server = dataclasses.field(default_factory=Server)
    disks: dict[str, agent_pb2.Storage] = dataclasses.field(default_factory=dict)


class Relay:
    """Serves the agent's methods by asking the agent."""

    def __init__(self, pod: Pod, service: Any) -> None:
        self._pod = pod
        self._methods = service.methods_by_name
        for name in self._methods:
            setattr(self, snake_case(name), self._forward(name))

    def _forward(self, name: str) -> Callable[[CallContext, Any], Awaitable[Any]]:
        async def forward(ctx: CallContext, request: Any) -> Any:
            assert self._pod.agent is not None
            if name == "CreateContainer":
                _fetch(self._pod, request)
            timeout = None if ctx.deadline is None else _CALL
            return await self._pod.agent.call(
                self._methods[name], request, timeout=timeout, metadata=ctx.metadata
            )

        return forward


def _fetch(pod: Pod, request: Any) -> None:
    """As an agent that can: the image of the name that it was told. Ours keeps things of its own where Kata's
    puts images, so it goes where ours has root file systems."""
    for storage in request.storages:
        if storage.driver != "image_guest_pull":
            continue
        assert storage.mount_point == request.OCI.Root.Path
        _, _, told = storage.driver_options[0].partition("image_guest_pull=")
        assert isinstance(json.loads(told)["metadata"], dict)
        disk = pod.disks.get(storage.source)
        if disk is None:
            raise RpcError(Code.INTERNAL, f"failed to pull manifest of {storage.source!r}: not found")
        storage.CopyFrom(disk)
        storage.mount_point = request.OCI.Root.Path = guest_rootfs(request.container_id)


class PeerPods:
    """See the module's docstring."""

    def __init__(self, directory: Path, images: dict[str, Path]) -> None:
        self.directory = directory
        self.images = images
        self.pods: dict[str, Pod] = {}

    def _note(self, name: str, **facts: object) -> None:
        with (self.directory / "calls").open("a") as file:
            file.write(json.dumps({"call": name, **facts}) + "\n")

    def _pod(self, vm: str) -> Pod:
        if vm not in self.pods:
            raise RpcError(Code.UNKNOWN, f"getting sandbox: sandbox {vm} does not exist")
        return self.pods[vm]

    async def version(self, _ctx: CallContext, _request: Any) -> Any:
        return remote_pb2.VersionResponse(version="0.0.0")

    async def create_vm(self, _ctx: CallContext, request: Any) -> Any:
        annotations = dict(request.annotations)
        self._note("CreateVM", id=request.id, annotations=annotations, netns=request.networkNamespacePath)
        for key in _POD:
            if not annotations.get(key):
                raise RpcError(Code.UNKNOWN, f"{key} is missing in annotations")
        pod = self.pods[request.id] = Pod(self.directory / request.id)
        pod.directory.mkdir()
        return remote_pb2.CreateVMResponse(agentSocketPath=str(pod.directory / "agent.ttrpc"))

    async def start_vm(self, _ctx: CallContext, request: Any) -> Any:
        pod = self._pod(request.id)
        await _boot(pod, self.images)
        for service in (
            agent_pb2.DESCRIPTOR.services_by_name["AgentService"],
            health_pb2.DESCRIPTOR.services_by_name["Health"],
        ):
            pod.server.register(service, Relay(pod, service))
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(pod.directory / "agent.ttrpc"))
        listener.listen()
        self._serving = asyncio.create_task(pod.server.serve(listener))
        assert pod.vm is not None
        self._note("StartVM", id=request.id, pid=await pod.vm.get_vmm_master_tid())
        return remote_pb2.StartVMResponse()

    async def stop_vm(self, _ctx: CallContext, request: Any) -> Any:
        pod = self._pod(request.id)
        del self.pods[request.id]
        await _end(pod)
        self._note("StopVM", id=request.id)
        return remote_pb2.StopVMResponse()


async def _boot(pod: Pod, images: dict[str, Path]) -> None:
    vsock = PROJECT / "build/vsock/usr/bin/vhost-device-vsock"
    state = pod.directory / "vm"
    state.mkdir(mode=0o700)
    section = plugin.adjust_config(
        HypervisorConfig(
            **{key: str(path) for key, path in guest_files().items()},  # type: ignore[arg-type]
            default_memory=256,
            shared_fs="none",
            vsock_daemon=str(vsock) if vsock.exists() else "",
        )
    )
    pod.vm = plugin.create(section, sandbox_id="peer", state_dir=str(state), undo=MemoryUndo())
    await pod.vm.prepare_vm("peer", None)
    manager = DeviceManager()
    for device in (
        BlockConfig(id="image", path=section.image, read_only=True, ours=True),
        VsockConfig(daemon=section.vsock_daemon),
        RngConfig(),
        ConsoleConfig(),
    ):
        await manager.try_add_device(device, pod.vm)
    for number, (name, image) in enumerate(images.items()):
        disk = pod.directory / f"{number}.ext4"
        shutil.copyfile(image, disk)
        added = await manager.try_add_device(BlockConfig(id=f"pulled{number}", path=str(disk)), pod.vm)
        found = await manager.generate_agent_device(added)
        pod.disks[name] = agent_pb2.Storage(driver=found.type, source=found.id, fstype="ext4")
    await pod.vm.start_vm(BOOT)
    channel = await pod.vm.get_agent_socket()
    await channel.wait_ready(BOOT)
    sock, _ = await channel.connect(1024, 20)
    pod.agent = Client(sock)


async def _end(pod: Pod) -> None:
    await pod.server.close(0)
    if pod.agent is not None:
        await pod.agent.close()
    if pod.vm is not None:
        await pod.vm.cleanup()


async def _serve(directory: Path, images: dict[str, Path]) -> None:
    service = PeerPods(directory, images)
    server = Server()
    server.register(remote_pb2.DESCRIPTOR.services_by_name["Hypervisor"], service)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(directory / "hypervisor.sock"))
    listener.listen()
    serving = asyncio.create_task(server.serve(listener))
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print("ready", flush=True)
    await ended.wait()
    await server.close(0)
    await serving
    for pod in list(service.pods.values()):
        with contextlib.suppress(Exception):
            await _end(pod)


def main(directory: str, *images: str) -> None:
    """The command."""
    found = {}
    for number, word in enumerate(images):
        name, _, tree = word.partition("=")
        found[name] = Path(directory, f"{number}.ext4")
        files = Path(directory, f"{number}.d")
        files.mkdir()
        subprocess.run(["tar", "-xf", tree, "-C", str(files)], check=True, timeout=60)
        command = [
            "mke2fs",
            "-q",
            "-t",
            "ext4",
            "-O",
            "^has_journal",
            "-d",
            str(files),
            str(found[name]),
            "16M",
        ]
        subprocess.run(command, check=True, env=E2FS, capture_output=True, timeout=60)
    asyncio.run(_serve(Path(directory), found))


if __name__ == "__main__":
    main(*sys.argv[1:])
