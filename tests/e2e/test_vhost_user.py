"""Devices that another process serves: data both ways, plugged, unplugged; and what if it goes or hangs."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from devices.config import ShareFsConfig, VhostUserBlkConfig, VhostUserNetConfig
from devices.errors import HostError, HypervisorError
from devices.rendezvous import listen
from hypervisors.qemu.vmm import Qemu
from proto import agent_pb2 as agent
from proto import types_pb2 as types
from testing.vhost_user import Passt, StorageDaemon, passt_missing
from tests.e2e.guests import Guest, make_spec
from tests.e2e.vms import Boot, booting

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="virtiofsd needs root"), pytest.mark.kata_only]

SIZE = 8 << 20
PROMPT = 20.0  # seconds: "at once" on a busy machine


@pytest.fixture
async def boot(tmp_path: Path) -> AsyncIterator[Boot]:
    async with booting(tmp_path) as boots:
        yield boots


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StorageDaemon]:
    image = tmp_path / "served.img"
    image.write_bytes(b"from the host\n".ljust(SIZE, b"\0"))
    served = StorageDaemon(image, tmp_path / "disk.sock", queues=2)
    yield served
    served.close()


@pytest.fixture
def passt(tmp_path: Path) -> Iterator[Passt]:
    if missing := passt_missing():
        pytest.fail(missing, pytrace=False)
    served = Passt(tmp_path / "net.sock")
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


async def test_a_served_disk_comes_and_goes_and_data_passes_both_ways(
    boot: Boot, daemon: StorageDaemon, tmp_path: Path
) -> None:
    vm, guest, manager = await boot()
    name = await manager.try_add_device(disk(daemon), vm)
    device = await manager.generate_agent_device(name)
    assert (device.type, device.vm_path) == ("blk", "/dev/vdb")
    write = "head -n1 /dev/x; echo from the guest | dd of=/dev/x bs=512 seek=8 conv=fsync,sync"
    code, out, err = await with_disk(guest, device.id, "sh", "-c", write)
    assert (code, out) == (0, b"from the host\n"), err
    image = (tmp_path / "served.img").read_bytes()
    assert image[4096:].startswith(b"from the guest\n")
    code, out, _ = await guest.run("sh", "-c", "cd /sys/block/vdb; ls mq; cat size")
    assert out.decode().split() == ["0", "1", str(SIZE >> 9)]

    # Twice the same socket is one disk, plugged once; and when it is gone, it can come again.
    assert await manager.try_add_device(disk(daemon), vm) == name
    assert await manager.try_remove_device(name, vm) is None
    assert await manager.try_remove_device(name, vm) == 1
    code, out, _ = await guest.run("ls", "/sys/block")
    assert "vdb" not in out.decode().split()
    assert await manager.try_add_device(disk(daemon), vm) == name
    assert (await manager.generate_agent_device(name)).id == device.id


def interface(path: str) -> types.Interface:
    wanted = types.Interface(name="eth7", hwAddr="02:00:00:00:00:07", mtu=1400, devicePath=path)
    wanted.IPAddresses.add(family=types.v4, address=Passt.ADDRESS, mask="24")
    return wanted


async def test_a_served_card_carries_packets_both_ways(boot: Boot, passt: Passt) -> None:
    """What the guest sends its neighbour arrives on this host, and what is answered in the guest."""
    vm, guest, _ = await boot()
    path = await vm.add_device(card(passt))
    wanted = interface(path)
    await guest.agent.update_interface(agent.UpdateInterfaceRequest(interface=wanted))
    with socket.create_server(("127.0.0.1", 0)) as host:
        host.settimeout(PROMPT)
        ask = f"echo question | busybox nc {Passt.GATEWAY} {host.getsockname()[1]}; cat /proc/net/arp"
        asking = await guest.start(make_spec("sh", "-c", ask))
        assert await asyncio.to_thread(serve, host) == b"question\n"
        code, out, err = await asking.finish()
    assert (code, out.decode().splitlines()[0]) == (0, "answer"), err
    assert Passt.MAC in out.decode()

    await vm.remove_device("net7")
    links = (await guest.agent.list_interfaces(agent.ListInterfacesRequest())).Interfaces
    assert wanted.hwAddr not in [link.hwAddr for link in links]
    assert await vm.add_device(card(passt)) == path


def serve(host: socket.socket) -> bytes:
    """One client: what it said; it is answered."""
    connection, _ = host.accept()
    with connection:
        connection.settimeout(PROMPT)
        said = connection.recv(100)
        connection.sendall(b"answer\n")
        return said


async def test_a_second_share_comes_and_goes(boot: Boot, tmp_path: Path) -> None:
    """Its virtiofsd comes with it, and is gone with it."""
    vm, guest, _ = await boot()
    source = tmp_path / "second"
    source.mkdir()
    (source / "a").write_text("from the host\n")
    (tmp_path / "share/passthrough/busybox/rootfs/two").mkdir()
    pids = await vm.get_pids()
    share = ShareFsConfig(id="second", source=str(source), tag="two")
    for round_ in range(2):
        path = await vm.add_device(share)
        assert path
        assert len(await vm.get_pids()) == len(pids) + 1
        storage = agent.Storage(
            driver="virtio-fs", source="two", fstype="virtiofs", mount_point="/run/kata-containers/two"
        )
        spec = make_spec("sh", "-c", f"cat /two/a; echo from the guest {round_} > /two/b")
        spec.Mounts.add(destination="/two", type="bind", source=storage.mount_point, options=["rbind"])
        code, out, err = await guest.run(spec=spec, storages=[storage])
        assert (code, out) == (0, b"from the host\n"), err
        assert (source / "b").read_text() == f"from the guest {round_}\n"
        await vm.remove_device("second")
        assert await vm.get_pids() == pids


async def test_a_back_end_that_is_not_there_is_told_before_anything_is_plugged(
    boot: Boot, tmp_path: Path
) -> None:
    vm, _, manager = await boot()
    free = vm._topology.free()
    path = str(tmp_path / "nobody")
    listen(path).close()
    for device in (
        VhostUserBlkConfig(id="b", path=path),
        VhostUserNetConfig(id="n", path=path, mac="02:00:00:00:00:07"),
    ):
        with pytest.raises(HostError, match=rf"{path}: nobody listens there; try: start the back end"):
            await manager.try_add_device(device, vm)
    assert vm._topology.free() == free


@pytest.mark.parametrize("kind", ["blk", "net"])
async def test_a_back_end_that_does_not_answer_is_given_up_and_the_vm_lives(
    boot: Boot, tmp_path: Path, kind: str
) -> None:
    """QEMU waits for it with its main loop standing still, until we end the connection."""
    vm, guest, manager = await boot()
    free = vm._topology.free()
    path = str(tmp_path / "mute")
    mute = listen(path)
    if kind == "blk":
        device: VhostUserBlkConfig | VhostUserNetConfig = VhostUserBlkConfig(id="mute", path=path)
    else:
        device = VhostUserNetConfig(id="mute", path=path, mac="02:00:00:00:00:07")
    with pytest.raises(HypervisorError, match="QEMU did not answer"):
        await manager.try_add_device(device, vm)
    mute.close()
    await vm.check()
    assert (await guest.run("echo", "alive"))[1] == b"alive\n"
    assert vm._topology.free() == free


async def ended(vm: Qemu) -> str:
    async with asyncio.timeout(PROMPT):
        return (await vm.wait_vm()).reason


async def test_the_vm_ends_when_a_disks_back_end_dies(boot: Boot, daemon: StorageDaemon) -> None:
    """QEMU says nothing, and the guest's reads would never return."""
    vm, guest, manager = await boot()
    await manager.try_add_device(disk(daemon), vm)
    await guest.start(make_spec("sleep", "1000"))
    daemon.kill()
    assert await ended(vm) == f"the vhost-user back end at {daemon.path} closed its connection"
    assert await vm.get_pids() == []


async def test_a_card_whose_back_end_dies_loses_its_carrier_and_goes(boot: Boot, passt: Passt) -> None:
    vm, guest, _ = await boot()
    wanted = interface(await vm.add_device(card(passt)))
    await guest.agent.update_interface(agent.UpdateInterfaceRequest(interface=wanted))
    passt.kill()
    wait = "until [ $(cat /sys/class/net/eth7/carrier) = 0 ]; do sleep 0.05; done"
    assert (await guest.run("sh", "-c", wait))[0] == 0
    await vm.remove_device("net7")
    assert (await guest.run("echo", "alive"))[1] == b"alive\n"


@pytest.mark.parametrize("which", ["first", "second"])
async def test_the_vm_ends_when_a_virtiofsd_dies(boot: Boot, tmp_path: Path, which: str) -> None:
    vm, _, _ = await boot()
    before = set(await vm.get_pids())
    (tmp_path / "second").mkdir()
    await vm.add_device(ShareFsConfig(id="second", source=str(tmp_path / "second"), tag="two"))
    (second,) = set(await vm.get_pids()) - before
    victim = second
    if which == "first":
        named = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in before}
        (victim,) = (pid for pid, line in named.items() if re.search(r"\bvirtiofsd\b", line))
    os.kill(victim, signal.SIGKILL)
    assert await ended(vm) == "virtiofsd was killed by SIGKILL"


async def test_a_disk_is_unplugged_though_its_back_end_hangs(boot: Boot, daemon: StorageDaemon) -> None:
    """QEMU asks the back end for its queues before it lets the disk go, and would wait for ever."""
    vm, guest, manager = await boot(hotplug_timeout=3.0)
    name = await manager.try_add_device(disk(daemon), vm)
    device = await manager.generate_agent_device(name)
    assert (await with_disk(guest, device.id, "head", "-c", "4", "/dev/x"))[0] == 0
    os.kill(daemon.process.pid, signal.SIGSTOP)
    await manager.try_remove_device(name, vm)
    await vm.check()
    assert (await guest.run("echo", "alive"))[1] == b"alive\n"
