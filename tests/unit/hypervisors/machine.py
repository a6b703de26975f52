"""A QEMU in the test's own process: QMP's commands for sizing and hot-plug, over a socket pair.

What: `Machine` keeps what is plugged and answers as QEMU 7.2 does, events included. `lazy` makes its
guest look away (no event follows), `refuse` names commands that are answered with an error.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

from hypervisors.qemu.qmp import QmpClient

__all__ = ["NODE_SIZE", "Machine"]

NODE_SIZE = 4096
"""Bytes of every disk image."""


class RefusedError(Exception):
    """The command is answered with an error of this text and class."""

    def __init__(self, text: str, kind: str = "GenericError") -> None:
        super().__init__(text)
        self.kind = kind


class Machine:
    """One QEMU with its guest."""

    def __init__(self, *, vcpus: int = 1, max_vcpus: int = 4, memory: int = 256) -> None:
        self.cpus: dict[int, str] = {
            n: f"/machine/unattached/device[{n}]" if n < vcpus else "" for n in range(max_vcpus)
        }
        self.base = memory << 20
        self.objects: dict[str, dict[str, Any]] = {}
        self.nodes: dict[str, dict[str, Any]] = {}
        self.devices: dict[str, dict[str, Any]] = {}
        self.netdevs: dict[str, dict[str, Any]] = {}
        self.chardevs: dict[str, dict[str, Any]] = {}
        self.descriptors: set[str] = set()
        self.fdsets: dict[int, int] = {}
        self.leaving: set[str] = set()
        self.virtio_mem = {"requested-size": 0, "size": 0}
        self.keeps = 0  # bytes that the guest does not give back
        self.ost_status = 0  # of the guest's answer to what is plugged
        self.refusals: dict[str, int | str] = {}  # to an unplug, by device: an ACPI status, or an event
        self.lazy = False
        self.throttled = False  # sizes are told too late
        self.late = 0  # how often a node that is free is said to be in use
        self.refuse: set[str] = set()
        self.commands: list[str] = []
        self.asked = asyncio.Condition()
        self._writer: asyncio.StreamWriter | None = None
        self._serving: asyncio.Task[None] | None = None

    async def connect(self) -> QmpClient:
        """A client of this machine."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        reader, self._writer = await asyncio.open_connection(sock=ours)
        self._serving = asyncio.create_task(self._serve(reader))
        self._say({"QMP": {}})
        return await QmpClient.connect(theirs, timeout=10)

    async def saw(self, command: str) -> None:
        """Return when the command has come."""
        async with self.asked:
            await self.asked.wait_for(lambda: command in self.commands)

    async def close(self) -> None:
        """Hang up, as a QEMU does that dies."""
        assert self._writer is not None
        assert self._serving is not None
        self._writer.close()
        self._serving.cancel()
        await asyncio.wait({self._serving})

    def event(self, name: str, **data: Any) -> None:
        """Tell of something."""
        self._say({"event": name, "data": data})

    def _say(self, message: dict[str, Any]) -> None:
        assert self._writer is not None
        self._writer.write(json.dumps(message).encode() + b"\r\n")

    async def _serve(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            command = json.loads(line)
            name, arguments = command["execute"], command.get("arguments", {})
            self.commands.append(name)
            async with self.asked:
                self.asked.notify_all()
            try:
                if name in self.refuse:
                    raise RefusedError(f"{name} is refused")
                handler = getattr(self, f"_{name.replace('-', '_')}")
                self._say({"return": handler(arguments), "id": command["id"]})
            except RefusedError as refusal:
                error = {"class": refusal.kind, "desc": str(refusal)}
                self._say({"error": error, "id": command["id"]})

    # --- commands

    def _qmp_capabilities(self, _: dict[str, Any]) -> Any:
        return {}

    def _query_status(self, _: dict[str, Any]) -> Any:
        return {"status": "running"}

    def _query_hotpluggable_cpus(self, _: dict[str, Any]) -> Any:
        entries = [
            {"props": {"core-id": n, "socket-id": 0, "thread-id": 0, "node-id": 0}, "type": "max-x86_64-cpu"}
            | ({"qom-path": path} if path else {})
            for n, path in self.cpus.items()
        ]
        return entries[::-1]  # QEMU begins with the last

    def _query_memory_size_summary(self, _: dict[str, Any]) -> Any:
        dimms = sum(
            self.objects[d["memdev"]]["size"]
            for d in self.devices.values()
            if d["driver"] in ("pc-dimm", "nvdimm")  # QEMU counts both
        )
        return {"base-memory": self.base, "plugged-memory": dimms + self.virtio_mem["size"]}

    def _query_memory_devices(self, _: dict[str, Any]) -> Any:
        kinds = {"pc-dimm": "dimm", "nvdimm": "nvdimm"}
        found, end = [], 4 << 30
        for name, device in self.devices.items():
            if device["driver"] not in kinds:
                continue
            size = self.objects[device["memdev"]]["size"]
            data = {"id": name, "size": size, "addr": device.get("addr", end)}
            end = max(end, data["addr"] + size)
            found.append({"type": kinds[device["driver"]], "data": data})
        return found

    def _object_add(self, arguments: dict[str, Any]) -> Any:
        self.objects[arguments["id"]] = arguments
        return {}

    def _object_del(self, arguments: dict[str, Any]) -> Any:
        if any(device.get("memdev") == arguments["id"] for device in self.devices.values()):
            raise RefusedError(f"object '{arguments['id']}' is in use, can not be deleted")
        if any(node.get("throttle-group") == arguments["id"] for node in self.nodes.values()):
            raise RefusedError(f"object '{arguments['id']}' is in use, can not be deleted")
        if arguments["id"] not in self.objects:
            raise RefusedError(f"object '{arguments['id']}' not found")
        del self.objects[arguments["id"]]
        return {}

    def _qom_get(self, arguments: dict[str, Any]) -> Any:
        assert arguments["path"] == "/machine/peripheral/virtio-mem0"
        return self.virtio_mem[arguments["property"]]

    def _qom_set(self, arguments: dict[str, Any]) -> Any:
        if arguments["property"] == "limits":
            self.objects[arguments["path"].removeprefix("/objects/")]["limits"] = arguments["value"]
            return {}
        self.virtio_mem["requested-size"] = arguments["value"]
        if not self.lazy:
            for part in (2, 1):  # it comes and goes in pieces
                step = (arguments["value"] - self.virtio_mem["size"]) // part
                size = max(self.virtio_mem["size"] + step, self.keeps)
                self.virtio_mem["size"] = size
                if not self.throttled:
                    self.event("MEMORY_DEVICE_SIZE_CHANGE", id="virtio-mem0", size=size)
        return {}

    def _blockdev_add(self, arguments: dict[str, Any]) -> Any:
        assert arguments.get("throttle-group", "") in {"", *self.objects}
        below = arguments["file"]
        assert isinstance(below, dict) or below in self.nodes
        self.nodes[arguments["node-name"]] = {"size": NODE_SIZE, **arguments}
        return {}

    def _query_named_block_nodes(self, _: dict[str, Any]) -> Any:
        return [{"node-name": name, "image": {"virtual-size": n["size"]}} for name, n in self.nodes.items()]

    def _block_resize(self, arguments: dict[str, Any]) -> Any:
        self.nodes[arguments["node-name"]]["size"] = arguments["size"]
        return {}

    def _chardev_add(self, arguments: dict[str, Any]) -> Any:
        address = arguments["backend"]["data"]["addr"]
        if address["type"] == "fd":
            self.descriptors.remove(address["data"]["str"])
        self.chardevs[arguments["id"]] = arguments
        return {}

    def _chardev_remove(self, arguments: dict[str, Any]) -> Any:
        name = arguments["id"]
        if name not in self.chardevs:
            raise RefusedError(f"Chardev '{name}' not found")
        users = [*self.devices.values(), *self.netdevs.values()]
        if any(user.get("chardev") == name for user in users):
            raise RefusedError(f"Chardev '{name}' is busy")
        del self.chardevs[name]
        return {}

    def _blockdev_del(self, arguments: dict[str, Any]) -> Any:
        node = arguments["node-name"]
        used = any(device.get("drive") == node for device in self.devices.values())
        if self.late > 0 or used or any(other["file"] == node for other in self.nodes.values()):
            self.late -= 1
            raise RefusedError(f"Node {node} is in use")
        if node not in self.nodes:
            raise RefusedError(f"Failed to find node with node-name='{node}'")
        del self.nodes[node]
        return {}

    def _getfd(self, arguments: dict[str, Any]) -> Any:
        self.descriptors.add(arguments["fdname"])
        return {}

    def _closefd(self, arguments: dict[str, Any]) -> Any:
        if arguments["fdname"] not in self.descriptors:
            raise RefusedError(f"File descriptor named '{arguments['fdname']}' not found")
        self.descriptors.remove(arguments["fdname"])
        return {}

    def _add_fd(self, arguments: dict[str, Any]) -> Any:
        fdset = arguments["fdset-id"]
        assert fdset not in self.fdsets, "each descriptor has a set of its own"
        self.fdsets[fdset] = 40 + fdset
        return {"fdset-id": fdset, "fd": self.fdsets[fdset]}

    def _remove_fd(self, arguments: dict[str, Any]) -> Any:
        if arguments["fdset-id"] not in self.fdsets:
            raise RefusedError(f"File descriptor named 'fdset-id:{arguments['fdset-id']}' not found")
        del self.fdsets[arguments["fdset-id"]]
        return {}

    def _netdev_add(self, arguments: dict[str, Any]) -> Any:
        for key in ("fds", "vhostfds"):
            for name in filter(None, arguments.get(key, "").split(":")):
                self.descriptors.remove(name)
        self.netdevs[arguments["id"]] = arguments
        return {}

    def _netdev_del(self, arguments: dict[str, Any]) -> Any:
        if arguments["id"] not in self.netdevs:
            raise RefusedError(f"Device '{arguments['id']}' not found")
        del self.netdevs[arguments["id"]]
        return {}

    def _device_add(self, arguments: dict[str, Any]) -> Any:
        name = arguments["id"]
        assert name not in self.devices
        assert "bus" not in arguments or self._seat(arguments) not in map(self._seat, self.devices.values())
        self.devices[name] = arguments
        if arguments["driver"].endswith("-cpu"):
            self.cpus[arguments["core-id"]] = f"/machine/peripheral/{name}"
        if not self.lazy and (arguments["driver"].endswith("-cpu") or arguments["driver"] == "pc-dimm"):
            info = {"device": name, "source": 1, "status": self.ost_status, "slot": "0", "slot-type": "X"}
            self.event("ACPI_DEVICE_OST", info=info)
        return {}

    def _seat(self, device: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(device.get(key) for key in ("bus", "addr", "scsi-id", "lun"))

    def _device_del(self, arguments: dict[str, Any]) -> Any:
        name = arguments["id"]
        if name not in self.devices:
            raise RefusedError(f"Device '{name}' not found", "DeviceNotFound")
        by_acpi = "core-id" in self.devices[name] or self.devices[name]["driver"] == "pc-dimm"
        if name in self.leaving and not by_acpi:
            raise RefusedError(f"Device {name} is already in the process of unplug")
        self.leaving.add(name)
        if by_acpi and not self.lazy:
            self._ejects(name)
        elif not self.lazy:
            self.unplugged(name)
        return {}

    def _ejects(self, name: str) -> None:
        """First Linux says that it begins."""
        answer = self.refusals.get(name)
        if answer is not None:
            self.leaving.discard(name)
        for status in (0x84, answer) if isinstance(answer, int) else (0x84,):
            self.event("ACPI_DEVICE_OST", info={"device": name, "source": 3, "status": status, "slot": "0"})
        if isinstance(answer, str):
            self.event(answer, device=name, path=f"/machine/peripheral/{name}")
        elif answer is None:
            self.unplugged(name)

    def unplugged(self, name: str) -> None:
        """The guest let go of it."""
        device = self.devices.pop(name)
        self.leaving.discard(name)
        if "core-id" in device:
            self.cpus[device["core-id"]] = ""
        self.event("DEVICE_DELETED", device=name, path=f"/machine/peripheral/{name}")
