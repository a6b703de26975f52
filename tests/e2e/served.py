"""Devices of vhost-user back ends as tests plug them: `serving` and `carrying` have one at the other end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.back_ends import Passt, StorageDaemon, passt_missing
from devices.config import VhostUserBlkConfig, VhostUserNetConfig
from proto import agent_pb2 as agent
from proto import types_pb2 as types
from tests.e2e.guests import Guest, make_spec

__all__ = ["PROMPT", "SIZE", "card", "carrying", "disk", "interface", "serving", "with_disk"]

SIZE = 8 << 20
PROMPT = 20.0  # seconds: "at once" on a busy machine


def serving(directory: Path) -> Iterator[StorageDaemon]:
    """A disk of `SIZE` that begins with a line of text."""
    image = directory / "served.img"
    image.write_bytes(b"from the host\n".ljust(SIZE, b"\0"))
    served = StorageDaemon(image, directory / "disk.sock", queues=2)
    yield served
    served.close()


def carrying(directory: Path) -> Iterator[Passt]:
    """A network."""
    if missing := passt_missing():
        pytest.fail(missing, pytrace=False)
    served = Passt(directory / "net.sock")
    yield served
    served.close()


def disk(daemon: StorageDaemon) -> VhostUserBlkConfig:
    return VhostUserBlkConfig(id="served", path=daemon.path, queues=2, queue_size=64)


def card(passt: Passt) -> VhostUserNetConfig:
    return VhostUserNetConfig(id="net7", path=passt.path, mac="02:00:00:00:00:07")


async def with_disk(guest: Guest, path: str, *command: str) -> tuple[int, bytes, bytes]:
    """Run it in a container that has the disk at this PCI path as /dev/x."""
    spec = make_spec(*command)
    spec.Linux.Devices.add(Path="/dev/x", Type="b", Major=241, Minor=0)
    spec.Linux.Resources.Devices.add(Allow=True, Type="b", Major=-1, Minor=-1, Access="rwm")
    device = agent.Device(id=path, type="blk", vm_path="/dev/vdb", container_path="/dev/x")
    return await guest.run(spec=spec, devices=[device])


def interface(path: str) -> types.Interface:
    wanted = types.Interface(name="eth7", hwAddr="02:00:00:00:00:07", mtu=1400, devicePath=path)
    wanted.IPAddresses.add(family=types.v4, address=Passt.ADDRESS, mask="24")
    return wanted
