"""The pod as the guest sees it: host name, resolver, storages, shared namespaces, containers.

What: state and rules that concern more than one container.
Why the first container's namespaces: the containers of a pod share ipc and uts (and pid, when asked
to) with the sandbox's own container, which is the first. Its init makes them as it would anyway, or
stays in the guest's. The agent holds ipc and uts open, so they outlive that container; a pid namespace
ends with its init, a pause of ours (agent/pause.py).
Invariants: container ids are path components and unique; /run/kata-containers is this sandbox's
alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agent import log, memory_limits
from agent.container import Container
from agent.crun import ROOT, Crun
from agent.enter import Entrance
from agent.fit import NOTHING, fit, merge
from agent.pause import is_own, own_config
from agent.privileged import furnish
from agent.reaper import Reaper
from agent.spec import cgroup_path, spec_json
from agent.stdio.streams import StreamListener
from agent.storage.storages import Storages
from agent.threads import in_thread
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from agent.huge_pages import Reserved
    from proto import agent_pb2

__all__ = ["RUN_DIR", "Sandbox"]

RUN_DIR = "/run/kata-containers"
WORK_DIR = "/run/kata-agent"
CONTAINERS_MAX = 1024
_PRIVATE = "io.kata-shim.private-namespaces"  # shim/spec/guest_spec.py says so to this agent


def check_id(name: str, what: str) -> str:
    """An id becomes a file name: letters, digits and `_.-+` only. Raises INVALID_ARGUMENT."""
    if not 0 < len(name) <= 255 or name in (".", "..") or not all(c.isalnum() or c in "_.-+" for c in name):
        raise RpcError(Code.INVALID_ARGUMENT, f"{what} {name[:80]!r} is no valid id")
    return name


class Sandbox:
    """The one sandbox of this VM."""

    def __init__(self, reaper: Reaper, listener: StreamListener | None) -> None:
        os.makedirs(WORK_DIR, mode=0o700, exist_ok=True)
        os.makedirs(ROOT, mode=0o700, exist_ok=True)
        self.id = ""
        self.containers: dict[str, Container] = {}
        self.on_start: Callable[[], None] = _nothing
        """Called with each process that was started."""
        self.storages = Storages(reaper)
        self._mounted: dict[str, list[str]] = {}  # container id ("" = the sandbox) -> mount points
        self._huge: dict[str, Reserved] = {}  # container id -> huge pages set aside for it
        self._namespaces: dict[str, str] = {}  # type -> path that the next containers join
        self._held: list[int] = []
        self._making = asyncio.Lock()
        self._reaper = reaper
        self._listener = listener
        self._crun = Crun(reaper, WORK_DIR)
        self._entrance = Entrance(reaper)

    async def create(self, request: agent_pb2.CreateSandboxRequest) -> None:
        """CreateSandbox: prepare the guest. Raises ALREADY_EXISTS the second time."""
        if self.id:
            raise RpcError(Code.ALREADY_EXISTS, f"this VM has sandbox {self.id} already")
        self.id = request.sandbox_id or "sandbox"
        try:
            if request.kernel_modules:
                from agent.modules import load

                for module in request.kernel_modules:
                    await load(self._reaper, module.name, *module.parameters)
            if os.path.isdir(RUN_DIR):
                await in_thread(f"clearing {RUN_DIR}", _clear_run_dir)
            os.makedirs(RUN_DIR, mode=0o755, exist_ok=True)
            if request.hostname:
                socket.sethostname(request.hostname)
            if request.dns:
                _write_resolv_conf(list(request.dns))
            self._mounted[""] = await self.storages.add(request.storages)
            memory_limits.note(memory_limits.memory())
        except BaseException:
            self.id = ""
            raise

    @property
    def streams(self) -> StreamListener | None:
        """Where the host's streams arrive, None if it opens none."""
        return self._listener

    # --- containers ---------------------------------------------------------------------------

    def container(self, container_id: str) -> Container:
        """By id. Raises INVALID_ARGUMENT as Kata's agent does for an unknown one."""
        container = self.containers.get(container_id)
        if container is None:
            raise RpcError(Code.NOT_FOUND, f"there is no container {container_id[:80]}")
        return container

    async def create_container(
        self, request: agent_pb2.CreateContainerRequest, beyond: Mapping[str, Any] = NOTHING
    ) -> None:
        """CreateContainer: mount its storages, write its bundle, create it with crun.

        `beyond`: what of the spec the request has no field for (`agent.fit`).
        """
        name = check_id(request.container_id, "container")
        if name in self.containers:
            raise RpcError(Code.ALREADY_EXISTS, f"there is a container {name} already")
        if len(self.containers) >= CONTAINERS_MAX:
            raise RpcError(Code.RESOURCE_EXHAUSTED, f"{CONTAINERS_MAX} containers are the limit")
        if not request.HasField("OCI") or not request.OCI.Process.Args:
            raise RpcError(Code.INVALID_ARGUMENT, f"container {name} has no command")
        config = spec_json(request.OCI)
        merge(config, beyond)
        annotations = config.get("annotations", {})
        if is_own(annotations):
            config = own_config(config)
        if request.devices:
            from agent.vfio import forget

            forget(request.devices, config["linux"])
        await fit(config, self._reaper)
        await furnish(config)
        if config["linux"].get("sysctl"):
            from agent import sysctl

            sysctl.apply(sysctl.take_network(config["linux"]))
        self._place(config, name)
        container = Container(
            name,
            config,
            bundle=f"{RUN_DIR}/{name}",
            crun=self._crun,
            reaper=self._reaper,
            listener=self._listener,
            entrance=self._entrance,
        )
        share_pid = request.sandbox_pidns
        private = annotations.get(_PRIVATE, "").split(",")
        known = self._namespaces.keys() >= ({"ipc", "uts", "pid"} if share_pid else {"ipc", "uts"})
        self.containers[name] = container
        try:
            # Whoever comes while the namespaces that it is to join are made waits for them.
            async with contextlib.nullcontext() if known else self._making:
                self._share_namespaces(config["linux"], share_pid, private)
                await self._create(container, request)
                kinds = ["ipc", "uts", *(["pid"] if share_pid or is_own(annotations) else [])]
                self._hold_namespaces(container, [kind for kind in kinds if kind not in private])
        except BaseException:
            self.containers.pop(name, None)
            self._give_back(name)
            if self._listener is not None:
                for stream in (request.stdin_port, request.stdout_port, request.stderr_port):
                    self._listener.forget(stream)
            await self.storages.release(self._mounted.pop(name, []))
            raise

    async def _create(self, container: Container, request: agent_pb2.CreateContainerRequest) -> None:
        limits = container.config["linux"].get("resources", {}).get("hugepageLimits")
        if limits:
            from agent.huge_pages import reserve

            what = f"reserving huge pages for {container.id}"
            self._huge[container.id] = await in_thread(what, lambda: reserve(limits))
        self._mounted[container.id] = await self.storages.add(request.storages)
        if request.devices:
            from agent.vfio import KINDS, attach

            passed = [device for device in request.devices if device.type in KINDS]
            disks = [device for device in request.devices if device.type not in KINDS]
            if disks:
                from agent.storage.blockdev import resolve_devices

                await resolve_devices(disks, container.config["linux"])
            if passed:
                container.pci_addresses = await attach(passed, container.config, self._reaper)
        async with container.lock:
            await container.create((request.stdin_port, request.stdout_port, request.stderr_port))

    def _place(self, config: dict[str, Any], name: str) -> None:
        """Give the container a cgroup of its own, wherever the host wants it."""
        path = cgroup_path(config["linux"].get("cgroupsPath", ""), name)
        for other in self.containers.values():
            taken = other.config["linux"]["cgroupsPath"]
            # A cgroup with processes cannot have children with controllers, nor be shared.
            if f"{taken}/".startswith(f"{path}/") or f"{path}/".startswith(f"{taken}/"):
                path = f"/kata/{name}"
        config["linux"]["cgroupsPath"] = path

    def _share_namespaces(self, linux: dict[str, Any], share_pid: bool, private: Sequence[str]) -> None:
        """Have a container join the pod's namespaces, but for the kinds that it is to have for itself.

        A host that does not tell (Kata's own shim clears all paths) means that they are shared.
        """
        wanted = {entry["type"]: entry for entry in linux["namespaces"]}
        for kind, path in self._namespaces.items():
            if kind == "pid" and share_pid:
                wanted.setdefault("pid", {"type": "pid"})["path"] = path
            elif kind != "pid" and kind in wanted and kind not in private:
                wanted[kind]["path"] = path
        # The host leaves it out: by sandbox_pidns it is the pod's, else the container's own.
        wanted.setdefault("pid", {"type": "pid"})
        linux["namespaces"] = list(wanted.values())

    def _hold_namespaces(self, container: Container, kinds: Sequence[str]) -> None:
        """Remember the namespaces that a container is in, for the next ones to join."""
        if container.init is None:
            return
        for kind in kinds:
            if kind in self._namespaces:
                continue
            try:
                fd = os.open(f"/proc/{container.init.pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                log.error(f"namespace {kind} of {container.id}: {error}")
                continue
            self._held.append(fd)
            self._namespaces[kind] = f"/proc/{os.getpid()}/fd/{fd}"

    async def remove_container(self, name: str, timeout: float) -> None:
        """RemoveContainer: everything of it goes; `timeout` seconds, 0 = the default."""
        container = self.container(name)
        async with container.lock:
            try:
                await asyncio.wait_for(container.remove(), timeout or None)
            except TimeoutError:
                raise RpcError(
                    Code.DEADLINE_EXCEEDED, f"container {name} was not gone after {timeout:g} s"
                ) from None
            self.containers.pop(name, None)
        await self.storages.release(self._mounted.pop(name, []))
        self._give_back(name)

    def _give_back(self, name: str) -> None:
        kept = self._huge.pop(name, None)
        if kept:
            from agent.huge_pages import give_back

            give_back(kept)

    async def destroy(self) -> None:
        """DestroySandbox: kill and remove all."""
        for name in list(self.containers):
            try:
                await self.remove_container(name, 10.0)
            except RpcError as error:
                log.error(error.message)
        await self.storages.release(self._mounted.pop("", []))
        for fd in self._held:
            os.close(fd)
        self._held.clear()
        self._namespaces.clear()
        self.id = ""


def _nothing() -> None:
    """Nobody wants to know."""


def _clear_run_dir() -> None:
    """Unmount everything below `RUN_DIR`, then empty it; leftovers of a template or a restart."""
    import shutil

    from agent.storage.mounts import MNT_DETACH, mounts_below, umount

    for target in mounts_below(RUN_DIR):
        umount(target, MNT_DETACH)
    shutil.rmtree(RUN_DIR)


def _write_resolv_conf(lines: list[str]) -> None:
    """The guest's own resolver; /etc/resolv.conf of our image points to it."""
    text = "".join(line.strip() + "\n" for line in lines[:64])
    for path in ("/run/resolv.conf", "/etc/resolv.conf"):
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            log.debug(f"{path}: {error}")  # a read-only image without the link: containers have theirs
