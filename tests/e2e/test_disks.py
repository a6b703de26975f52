"""Disks of every kind in one running VM: found where the guest was told, read and written both ways,
read-only where they shall be, limited, grown, and freed on the host when the guest gives blocks up."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import re
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from devices.config import BlockConfig, BlockFormat, BlockOptions, IoLimits
from devices.errors import CallerError, UnsupportedByHypervisor
from devices.kinds import Kind
from devices.manager import DeviceManager
from hypervisors.qemu.vmm import Qemu
from proto import agent_pb2 as agent
from proto import oci_pb2 as oci
from shim.resources.disks import PMEM_MODULES
from tests.e2e.guests import Guest, make_spec
from tests.e2e.vms import E2FS, booting, make_disk, mounted, read_disk

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="virtiofsd needs root"),
    pytest.mark.kata_only,
    pytest.mark.asyncio(loop_scope="module"),
]

MIB = 1 << 20
NUMBER = (7, 77)  # the host's, whatever the guest's is


@dataclasses.dataclass
class World:
    """One VM for all tests here."""

    vm: Qemu
    guest: Guest
    manager: DeviceManager
    root: Path  # of the containers, on the host

    async def plug(self, disk: BlockConfig) -> agent.Device:
        """Plug it; the agent's device for a container that finds it at /dev/disk."""
        there = await self.manager.generate_agent_device(await self.manager.try_add_device(disk, self.vm))
        return agent.Device(id=there.id, type=there.type, vm_path=there.vm_path, container_path="/dev/disk")

    async def sh(self, script: str, *devices: agent.Device, access: str = "rwm") -> tuple[int, str, str]:
        """Run a script in a container with these devices."""
        code, out, err = await self.guest.run(spec=_spec(script, devices, access), devices=devices)
        return code, out.decode(), err.decode()

    async def mount(self, disk: BlockConfig, script: str, *, fstype: str = "ext4", options: str = "") -> str:
        """Plug it, run a script with it mounted at /data, and unplug it."""
        name = await self.manager.try_add_device(disk, self.vm)
        try:
            there = await self.manager.generate_agent_device(name)
            storage = mounted(there, disk.id, read_only=disk.read_only)
            storage.driver, storage.fstype = there.type, fstype
            for option in filter(None, options.split(",")):
                ours = option.startswith("driver:")
                (storage.driver_options if ours else storage.options).append(option.removeprefix("driver:"))
            spec = _spec(script, (), "rwm")
            spec.Mounts.add(destination="/data", type="bind", source=storage.mount_point, options=["rbind"])
            code, out, err = await self.guest.run(spec=spec, storages=[storage])
            assert code == 0, err
            return out.decode()
        finally:
            await self.manager.try_remove_device(name, self.vm)


def _spec(script: str, devices: tuple[agent.Device, ...], access: str) -> oci.Spec:
    spec = make_spec("sh", "-c", script)
    spec.Linux.Resources.Devices.add(Allow=False, Access="rwm", Major=-1, Minor=-1)
    for device in devices:
        major, minor = NUMBER
        spec.Linux.Devices.add(Path=device.container_path, Type="b", Major=major, Minor=minor, FileMode=0o600)
        spec.Linux.Resources.Devices.add(Allow=True, Type="b", Major=major, Minor=minor, Access=access)
    return spec


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """It has a thread for disks and takes disks as memory; the kinds themselves are each test's choice."""
    made = tmp_path_factory.mktemp("disks")
    async with booting(made) as boot:
        vm, guest, manager = await boot(
            modules=PMEM_MODULES,
            block_device_driver="virtio-pmem",
            enable_iothreads=True,
            default_maxmemory=1024,
        )
        yield World(vm, guest, manager, made / "share/passthrough/busybox/rootfs")
        manager.close()


def image(path: Path, size: int = 4 * MIB) -> Path:
    """Something to read, and to see whether it changed."""
    path.write_bytes(os.urandom(4096))
    os.truncate(path, size)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A loop device and its file."""
    path = image(tmp_path / "loop.img")
    done = subprocess.run(["losetup", "--find", "--show", path], check=True, capture_output=True, text=True)
    device = done.stdout.strip()
    yield device, path
    subprocess.run(["losetup", "--detach", device], check=True)


KINDS = [(Kind.BLK, "blk"), (Kind.SCSI, "scsi")]


@pytest.mark.parametrize(("kind", "name"), KINDS)
async def test_data_goes_both_ways(world: World, tmp_path: Path, kind: Kind, name: str) -> None:
    path = image(tmp_path / name)
    before = path.read_bytes()[:4096]
    device = await world.plug(BlockConfig(id=name, path=str(path), driver=kind))
    assert device.type == name
    script = (
        "head -c 4096 /dev/disk | sha256sum; echo 'from the guest' | dd of=/dev/disk bs=512 seek=8 conv=fsync"
    )
    code, out, err = await world.sh(script, device)
    await world.manager.try_remove_device(name, world.vm)

    assert code == 0, err
    assert out.split()[0] == hashlib.sha256(before).hexdigest()
    assert path.read_bytes()[4096:4111] == b"from the guest\n"


@pytest.mark.parametrize(("kind", "name"), [*KINDS, (Kind.PMEM, "nvdimm")])
async def test_read_only_is_so_whatever_the_guest_does(
    world: World, tmp_path: Path, kind: Kind, name: str
) -> None:
    path = image(tmp_path / f"ro-{name}")
    before = digest(path)
    device = await world.plug(BlockConfig(id=f"ro-{name}", path=str(path), driver=kind, read_only=True))
    assert device.type == name
    script = "head -c 4096 /dev/disk | sha256sum; ! echo no | dd of=/dev/disk conv=fsync"
    code, out, err = await world.sh(script, device)

    assert code == 0, err
    assert out.split()[0] == hashlib.sha256(path.read_bytes()[:4096]).hexdigest()
    assert re.search("Read-only|not permitted|I/O error", err)
    assert digest(path) == before
    if kind is Kind.PMEM:
        with pytest.raises(UnsupportedByHypervisor, match=r"QEMU 7\.2 cannot unplug an nvdimm"):
            await world.manager.try_remove_device(f"ro-{name}", world.vm)
        assert (
            await world.plug(BlockConfig(id="again", path=str(path), driver=kind, read_only=True)) == device
        )
    else:
        await world.manager.try_remove_device(f"ro-{name}", world.vm)


async def test_memory_disks_are_told_apart_whichever_the_kernel_finds_first(
    world: World, tmp_path: Path
) -> None:
    paths = [image(tmp_path / f"m{number}", (number + 1) * MIB) for number in range(3)]
    devices = [
        await world.plug(BlockConfig(id=path.name, path=str(path), driver=Kind.PMEM, read_only=True))
        for path in paths
    ]
    for path, device in zip(paths, devices, strict=True):
        code, out, err = await world.sh("sha256sum < /dev/disk", device)
        assert (code, out.split()[0]) == (0, digest(path)), err
    with pytest.raises(CallerError, match="an nvdimm is read-only"):
        await world.plug(BlockConfig(id="rw", path=str(image(tmp_path / "rw")), driver=Kind.PMEM))


async def test_the_rules_of_the_container_hold_in_the_guest(world: World, tmp_path: Path) -> None:
    device = await world.plug(BlockConfig(id="rules", path=str(image(tmp_path / "rules"))))
    script = "head -c 1 /dev/disk >/dev/null && echo read; echo no | dd of=/dev/disk || echo refused"
    code, out, err = await world.sh(script, device, access="rm")
    await world.manager.try_remove_device("rules", world.vm)

    assert (code, out.split()) == (0, ["read", "refused"])
    assert "Operation not permitted" in err


async def test_a_loop_device_of_the_host(world: World, loop: tuple[str, Path]) -> None:
    device, path = loop
    plugged = await world.plug(BlockConfig(id="loop", path=device))
    assert subprocess.run(["mount", device, "/mnt"], capture_output=True, check=False).returncode != 0
    code, _, err = await world.sh("echo hello | dd of=/dev/disk conv=fsync", plugged)
    await world.manager.try_remove_device("loop", world.vm)

    assert code == 0, err
    assert path.read_bytes()[:6] == b"hello\n"


@pytest.mark.parametrize("aio", ["threads", "native", "io_uring"])
async def test_how_a_disk_is_served(world: World, tmp_path: Path, aio: str) -> None:
    options = BlockOptions(
        direct=True,
        aio=aio,
        queues=1,
        queue_size=64,
        logical_sector=4096,
        physical_sector=8192,
        io_thread=True,
    )
    path = image(tmp_path / aio)
    device = await world.plug(BlockConfig(id=aio, path=str(path), options=options, serial="served"))
    script = (
        "echo served | dd of=/dev/disk bs=4096 count=1 conv=sync,fsync 2>/dev/null; cd /sys/block;"
        "for d in vd*; do [ $(cat $d/serial)x = servedx ] || continue;"
        "cat $d/queue/logical_block_size $d/queue/physical_block_size; ls $d/mq; done"
    )
    code, out, err = await world.sh(script, device)
    nodes = await world.vm._qmp().execute("query-named-block-nodes", {"flat": True})
    (node,) = [node for node in nodes if node["node-name"] == f"node-{aio}"]
    where = {"path": f"/machine/peripheral/{aio}", "property": "queue-size"}
    front = await world.vm._qmp().execute("qom-get", where)
    await world.manager.try_remove_device(aio, world.vm)

    assert code == 0, err
    assert out.split() == ["4096", "8192", "0"]
    assert front == 64
    assert node["cache"] == {"writeback": True, "direct": True, "no-flush": False}
    assert path.read_bytes()[:7] == b"served\n"


async def test_a_limit_is_kept_and_can_be_taken_away(world: World, tmp_path: Path) -> None:
    """However fast or slow the machine: a megabyte, at a quarter of it a second, takes more than three."""
    limits = IoLimits(bytes=MIB // 4)
    path = image(tmp_path / "slow", 2 * MIB)
    device = await world.plug(BlockConfig(id="slow", path=str(path), options=BlockOptions(limits=limits)))
    begin = time.monotonic()
    code, _, err = await world.sh("dd if=/dev/disk of=/dev/null bs=64k count=16 iflag=direct", device)
    assert code == 0, err
    assert time.monotonic() - begin >= 3

    async def now() -> dict[str, int]:
        where = {"path": "/objects/limits-slow", "property": "limits"}
        found: dict[str, int] = await world.vm._qmp().execute("qom-get", where)
        return {key: value for key, value in found.items() if value and not key.endswith("length")}

    assert await now() == {"bps-total": MIB // 4}
    await world.manager.update_disk("slow", world.vm, limits=IoLimits(read_ops=1000, write_bytes=MIB))
    assert await now() == {"iops-read": 1000, "bps-write": MIB}
    await world.manager.update_disk("slow", world.vm, limits=IoLimits())
    assert await now() == {}
    await world.manager.try_remove_device("slow", world.vm)


@pytest.mark.parametrize(("kind", "name"), KINDS)
async def test_a_disk_grows_under_its_file_system(
    world: World, tmp_path: Path, kind: Kind, name: str
) -> None:
    disk = dataclasses.replace(make_disk(tmp_path / f"grow-{name}"), driver=kind)
    plugged = await world.manager.try_add_device(disk, world.vm)
    there = await world.manager.generate_agent_device(plugged)
    storage = mounted(there, disk.id, read_only=False)
    storage.driver = there.type
    spec = _spec("read x; df -m /data; head -c 12000000 /dev/zero > /data/new; sync", (), "rwm")
    spec.Mounts.add(destination="/data", type="bind", source=storage.mount_point, options=["rbind"])
    running = await world.guest.start(spec, stdin=True, storages=[storage])
    path = storage.mount_point
    before = await _total(world, path)

    os.truncate(disk.path, 24 * MIB)
    await world.manager.update_disk(plugged, world.vm)
    await world.guest.agent.resize_volume(agent.ResizeVolumeRequest(volume_guest_path=path, size=24 * MIB))
    assert before < 9 * MIB < 20 * MIB < await _total(world, path)
    with pytest.raises(CallerError, match="cannot shrink to"):
        await world.manager.update_disk(plugged, world.vm, size=8 * MIB)
    await running.send(b"\n")
    code, _, err = await running.finish()
    running.close()
    await world.guest.remove(running.id)
    await world.manager.try_remove_device(plugged, world.vm)

    assert code == 0, err
    assert len(await asyncio.to_thread(read_disk, Path(disk.path), "new")) == 12_000_000
    await asyncio.to_thread(_check, Path(disk.path))


async def _total(world: World, path: str) -> int:
    stats = await world.guest.agent.get_volume_stats(agent.VolumeStatsRequest(volume_guest_path=path))
    return int(stats.usage[0].total)


def _check(path: Path) -> None:
    done = subprocess.run(["e2fsck", "-fn", path], env=E2FS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


async def test_a_qcow2_image_and_a_loop_device_grow(
    world: World, tmp_path: Path, loop: tuple[str, Path]
) -> None:
    qcow2 = tmp_path / "q.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", qcow2, "4M"], check=True)
    device = await world.plug(BlockConfig(id="qcow2", path=str(qcow2), format=BlockFormat.QCOW2))
    await world.manager.update_disk("qcow2", world.vm, size=16 * MIB)
    code, out, err = await world.sh(
        "echo far | dd of=/dev/disk bs=1M seek=15 conv=fsync; wc -c < /dev/disk", device
    )
    await world.manager.try_remove_device("qcow2", world.vm)
    assert (code, int(out)) == (0, 16 * MIB), err

    node, path = loop
    device = await world.plug(BlockConfig(id="grows", path=node))
    os.truncate(path, 8 * MIB)
    subprocess.run(["losetup", "--set-capacity", node], check=True)
    await world.manager.update_disk("grows", world.vm)
    code, out, err = await world.sh("wc -c < /dev/disk", device)
    await world.manager.try_remove_device("grows", world.vm)
    assert (code, int(out)) == (0, 8 * MIB), err


@pytest.mark.parametrize(("kind", "name"), KINDS)
async def test_what_the_guest_gives_up_is_freed_on_the_host(
    world: World, tmp_path: Path, kind: Kind, name: str
) -> None:
    path = tmp_path / f"discard-{name}"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os.truncate(path, 64 * MIB)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", path], check=True, env=E2FS, capture_output=True)
    disk = BlockConfig(id=f"discard-{name}", path=str(path), driver=kind)
    await world.mount(disk, "dd if=/dev/urandom of=/data/big bs=1M count=32 && sync")
    full = path.stat().st_blocks * 512
    await world.mount(disk, "rm /data/big && sync", options="discard")

    assert full > 32 * MIB
    assert path.stat().st_blocks * 512 < full - 28 * MIB


async def test_an_xfs_grows_and_a_clone_of_it_can_be_mounted(world: World, tmp_path: Path) -> None:
    path = tmp_path / "xfs"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os.truncate(path, 320 * MIB)
    subprocess.run(["mkfs.xfs", "-q", path], check=True, env=E2FS, capture_output=True)
    clone = tmp_path / "clone"
    subprocess.run(["cp", "--sparse=always", path, clone], check=True)
    storages = []
    for file in (path, clone):
        name = await world.manager.try_add_device(BlockConfig(id=file.name, path=str(file)), world.vm)
        storage = mounted(await world.manager.generate_agent_device(name), name, read_only=False)
        storage.fstype = "xfs"
        storage.options.append("nouuid")
        storages.append(storage)
    running = await world.guest.start(_spec("read x", (), "rwm"), stdin=True, storages=storages)
    target = storages[0].mount_point
    before = await _total(world, target)
    os.truncate(path, 640 * MIB)
    await world.manager.update_disk("xfs", world.vm)
    await world.guest.agent.resize_volume(agent.ResizeVolumeRequest(volume_guest_path=target, size=640 * MIB))
    assert before < 320 * MIB < 560 * MIB < await _total(world, target)
    await running.send(b"\n")
    await running.finish()
    running.close()
    await world.guest.remove(running.id)
    for file in (path, clone):
        await world.manager.try_remove_device(file.name, world.vm)


async def test_a_blank_disk_gets_a_file_system_and_no_other(world: World, tmp_path: Path) -> None:
    blank, used = tmp_path / "blank", make_disk(tmp_path / "used")
    blank.write_bytes(b"")
    os.truncate(blank, 8 * MIB)
    disk = BlockConfig(id="blank", path=str(blank))
    made = "driver:create_filesystem"
    await world.mount(disk, "echo kept > /data/file; sync", options=made)
    assert await world.mount(disk, "cat /data/file; grep ' /data ' /proc/mounts", options=made)
    assert await asyncio.to_thread(read_disk, blank, "file") == b"kept\n"
    assert await world.mount(used, "cat /data/hello", options=made) == "from used\n"
