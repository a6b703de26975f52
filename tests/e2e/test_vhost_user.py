"""Devices that another process serves: data both ways, plugged, unplugged; and what if it goes or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conformance.back_ends import Passt, StorageDaemon
from devices.config import ShareFsConfig, VhostUserBlkConfig, VhostUserNetConfig
from devices.errors import HostError
from devices.rendezvous import listen
from proto import agent_pb2 as agent
from tests.e2e.guests import make_spec
from tests.e2e.served import PROMPT, SIZE, card, carrying, disk, interface, serving, with_disk
from tests.e2e.vms import Boot

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="virtiofsd needs root"), pytest.mark.kata_only]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StorageDaemon]:
    yield from serving(tmp_path)


@pytest.fixture
def passt(tmp_path: Path) -> Iterator[Passt]:
    yield from carrying(tmp_path)


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


async def test_what_the_guest_syncs_is_on_the_hosts_disk(
    boot: Boot, daemon: StorageDaemon, tmp_path: Path
) -> None:
    """Counted at the back end. Both disks have one serial: they are told apart by their addresses."""
    second = tmp_path / "second"
    second.mkdir()
    image = second / "other.img"
    image.write_bytes(b"from another host\n".ljust(SIZE, b"\0"))
    other = StorageDaemon(image, second / "disk.sock")
    vm, guest, manager = await boot()
    try:
        names = [
            await manager.try_add_device(one, vm)
            for one in (disk(daemon), VhostUserBlkConfig(id="other", path=other.path))
        ]
        served, another = [(await manager.generate_agent_device(name)).id for name in names]
        _, modes, _ = await guest.run("sh", "-c", "cat /sys/block/vd[bc]/queue/write_cache")
        with counting(daemon) as synced:
            write = "head -n1 /dev/x; dd if=/dev/zero of=/dev/x bs=4k seek=2 count=8 conv=fsync 2>/dev/null"
            code, out, err = await with_disk(guest, served, "sh", "-c", write)
            assert (code, out) == (0, b"from the host\n"), err
            assert synced() >= 1
        _, out, _ = await with_disk(guest, another, "head", "-n1", "/dev/x")
        assert out == b"from another host\n"
        assert modes.splitlines() == [b"write back"] * 2
    finally:
        for name in names:
            await manager.try_remove_device(name, vm)
        other.close()


@contextlib.contextmanager
def counting(daemon: StorageDaemon) -> Iterator[Callable[[], int]]:
    """How often the back end has had the host write its file to the disk, from now on."""
    log = Path(daemon.path).with_suffix(".trace")
    calls = ["-e", "trace=fsync,fdatasync", "-p", str(daemon.process.pid), "-o", str(log)]
    tracer = subprocess.Popen(["strace", "-f", *calls], stderr=subprocess.PIPE)
    assert tracer.stderr is not None
    assert b"attached" in tracer.stderr.readline()
    try:
        yield lambda: len(re.findall(r"f(?:data)?sync\(", log.read_text()))
    finally:
        tracer.terminate()
        tracer.communicate(timeout=PROMPT)


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
    free = vm._places.topology.free()
    path = str(tmp_path / "nobody")
    listen(path).close()
    for device in (
        VhostUserBlkConfig(id="b", path=path),
        VhostUserNetConfig(id="n", path=path, mac="02:00:00:00:00:07"),
    ):
        with pytest.raises(HostError, match=rf"{path}: nobody listens there; try: start the back end"):
            await manager.try_add_device(device, vm)
    assert vm._places.topology.free() == free
