"""A disk that anybody on the host uses is refused, by name; one that is given to a VM is kept for it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devices import in_use
from devices.errors import CallerError, HostError
from devices.in_use import claim, device_node, hold, probe, users

needs_loop = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/loop-control"),
    reason="loop devices need root and the module",
)
TOOLS = {**os.environ, "PATH": os.environ["PATH"] + ":/sbin:/usr/sbin"}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image with a file system."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"")
    os.truncate(path, 4 << 20)
    subprocess.run(["mke2fs", "-q", "-F", path], check=True, env=TOOLS, capture_output=True)
    return path


def run(*words: str | Path) -> str:
    return subprocess.run(words, check=True, env=TOOLS, capture_output=True, text=True).stdout.strip()


def add_partition(device: str, number: int, start: int, length: int) -> None:
    """As addpart did, which util-linux has no longer: BLKPG of linux/blkpg.h, without a table on the disk."""
    partition = ctypes.create_string_buffer(struct.pack("<qqi64s64s4x", start, length, number, b"", b""))
    argument = struct.pack("@iiiP", 1, 0, len(partition) - 1, ctypes.addressof(partition))  # 1: add it
    with open(device, "rb") as file:
        fcntl.ioctl(file, 0x1269, argument)


@pytest.fixture
def attach() -> Iterator[Callable[..., str]]:
    """`losetup`; what was attached or mounted is gone afterwards."""
    made: list[str] = []

    def _attach(path: Path, *options: str) -> str:
        made.append(run("losetup", "--find", "--show", *options, path))
        return made[-1]

    yield _attach
    for device in reversed(made):
        run("losetup", "--detach", device)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    places: list[Path] = []

    def _mount(device: str) -> Path:
        place = tmp_path / f"place {len(places)}"
        place.mkdir()
        run("mount", device, place)
        places.append(place)
        return place

    yield _mount
    for place in places:
        run("umount", place)


def test_who_writes_is_alone(image: Path) -> None:
    first = claim(str(image), read_only=False)
    for read_only in (True, False):
        with pytest.raises(CallerError, match=r"disk.img is in use on this host: another VM's"):
            probe(str(image), read_only=read_only)
    os.close(first)
    readers = [claim(str(image), read_only=True) for _ in range(2)]
    with pytest.raises(CallerError, match="another VM's"):
        probe(str(image), read_only=False)
    for fd in readers:
        os.close(fd)
    probe(str(image), read_only=False)


def test_a_disk_of_a_vm_that_is_not_ours_is_known_by_qemus_locks(image: Path) -> None:
    fd = os.open(image, os.O_RDWR)
    lock = struct.pack("hhlliL", fcntl.F_RDLCK, 0, 101, 1, 0, 0)  # "I write", as QEMU says it
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
    for read_only in (True, False):
        with pytest.raises(CallerError, match="another VM's"):
            probe(str(image), read_only=read_only)
    os.close(fd)
    probe(str(image), read_only=False)


@pytest.mark.parametrize(("read_only", "mode"), [(True, fcntl.F_RDLCK), (False, fcntl.F_WRLCK)])
def test_a_vmm_can_lock_all_of_a_disk_that_we_hold(image: Path, read_only: bool, mode: int) -> None:
    """As Cloud Hypervisor does, from the disk's first byte to its last; and then it is in use."""
    held = claim(str(image), read_only=read_only)
    vmm = os.open(image, os.O_RDWR)
    whole = struct.pack("hhlliL", mode, 0, 0, image.stat().st_size, 0, 0)
    fcntl.fcntl(vmm, fcntl.F_OFD_SETLK, whole)
    os.close(held)  # it is not ours: somebody started it by hand
    with pytest.raises(CallerError, match="another VM's"):
        probe(str(image), read_only=False)
    if read_only:
        readers = [claim(str(image), read_only=True) for _ in range(2)]
        for fd in readers:
            os.close(fd)
    else:
        with pytest.raises(CallerError, match="another VM's"):
            probe(str(image), read_only=True)
    os.close(vmm)
    probe(str(image), read_only=False)


def test_what_is_no_disk_is_told(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        claim(str(tmp_path / "gone"), read_only=True)
    with pytest.raises(HostError, match="neither a block device nor an image"):
        claim(str(tmp_path), read_only=True)


@needs_loop
def test_a_mounted_device_and_its_file_are_refused_with_the_place(
    image: Path, attach: Callable[..., str], mounted: Callable[[str], Path]
) -> None:
    device = attach(image)
    probe(device, read_only=False)
    place = mounted(device)
    name = os.path.basename(device)
    for read_only in (True, False):
        with pytest.raises(CallerError, match=f"{device} is in use on this host: mounted at {place};"):
            probe(device, read_only=read_only)
        with pytest.raises(CallerError, match=rf"disk.img is in use .* mounted at {place} \(as {name}\)"):
            probe(str(image), read_only=read_only)


@needs_loop
def test_another_device_of_the_same_file_is_refused(
    image: Path, attach: Callable[..., str], mounted: Callable[[str], Path]
) -> None:
    device, other = attach(image), attach(image)
    mounted(device)
    with pytest.raises(CallerError, match=rf"{other} is in use .*\(as {os.path.basename(device)}\)"):
        probe(other, read_only=True)


@needs_loop
def test_the_host_cannot_mount_what_a_vm_has(image: Path, attach: Callable[..., str], tmp_path: Path) -> None:
    device = attach(image)
    fd = claim(device, read_only=False)
    with pytest.raises(CallerError, match="is in use"):
        probe(device, read_only=True)
    done = subprocess.run(["mount", device, tmp_path], capture_output=True, check=False, env=TOOLS)
    os.close(fd)

    assert done.returncode != 0
    probe(device, read_only=False)


@needs_loop
def test_a_disk_with_a_mounted_partition_and_the_partition_of_a_mounted_disk(
    tmp_path: Path, attach: Callable[..., str], mounted: Callable[[str], Path]
) -> None:
    path = tmp_path / "parts.img"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os.truncate(path, 8 << 20)
    device = attach(path, "--partscan")
    add_partition(device, 1, 2048 * 512, 8192 * 512)
    part = f"{device}p1"
    name = os.path.basename(part)
    run("mke2fs", "-q", "-F", part)
    place = mounted(part)

    with pytest.raises(CallerError, match=f"mounted at {place};"):
        probe(part, read_only=True)
    with pytest.raises(CallerError, match=rf"mounted at {place} \({name}\)"):
        probe(device, read_only=True)
    assert users(os.stat(device).st_rdev) == [f"mounted at {place} ({name})"]


@needs_loop
def test_swap_of_the_host_is_refused(tmp_path: Path, attach: Callable[..., str]) -> None:
    path = tmp_path / "swap.img"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    os.truncate(path, 4 << 20)
    device = attach(path)
    run("mkswap", device)
    if subprocess.run(["swapon", device], capture_output=True, check=False, env=TOOLS).returncode != 0:
        pytest.skip("this kernel takes no swap")
    try:
        with pytest.raises(CallerError, match=f"{device} is in use on this host: swap as {device}"):
            probe(device, read_only=True)
        with pytest.raises(CallerError, match=r"swap.img is in use on this host: swap as"):
            probe(str(path), read_only=True)
    finally:
        run("swapoff", device)


def test_devices_above_it_are_named_with_their_mounts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A physical volume of LVM, a member of a RAID: not every kernel has them, so by sysfs' files."""
    below, above = tmp_path / "259:7", tmp_path / "253:9"
    (below / "holders/dm-9").mkdir(parents=True)
    above.mkdir()
    (tmp_path / "dm-9").symlink_to(above)
    (above / "dev").write_text("253:9\n")
    monkeypatch.setattr(in_use, "_sysfs", lambda number: f"{tmp_path}/{os.major(number)}:{os.minor(number)}")
    monkeypatch.setattr(in_use, "CLASS", str(tmp_path))
    number = os.makedev(259, 7)
    assert users(number) == ["a part of dm-9"]
    monkeypatch.setattr(in_use, "_mounts", lambda seen: ["/srv"] if seen == os.makedev(253, 9) else [])
    assert users(number) == ["mounted at /srv (as dm-9)"]


@needs_loop
def test_an_empty_loop_device_is_no_disk() -> None:
    names = sorted(name for name in os.listdir("/sys/block") if name.startswith("loop"))
    free = [name for name in names if not os.path.exists(f"/sys/block/{name}/loop/backing_file")]
    with pytest.raises(HostError, match="is empty"):
        probe(f"/dev/{free[-1]}", read_only=True)
    assert device_node(os.stat(f"/dev/{free[-1]}").st_rdev) == f"/dev/{free[-1]}"
    assert device_node(os.makedev(4095, 0)) == ""


async def test_waiting_for_it_costs_the_loop_nothing(image: Path) -> None:
    fd = await hold(str(image), read_only=False)
    with pytest.raises(CallerError):
        await hold(str(image), read_only=False)
    os.close(fd)
