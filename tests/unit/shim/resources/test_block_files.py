"""Without a shared directory a root file system goes in as disks, and all of it comes out again."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from devices.config import BlockConfig, DeviceConfig
from devices.errors import CallerError, HypervisorError
from devices.manager import DeviceManager
from devices.undo import MemoryUndo
from shim.protocols import RootfsMount
from shim.resources import block_files, disk_images
from shim.resources.block_files import BlockFiles
from shim.spec.guest_spec import Volume


class Vm:
    """Plugs disks, or refuses from the nth on."""

    def __init__(self, limit: int = 9) -> None:
        self.plugged: dict[str, BlockConfig] = {}
        self.limit = limit

    async def add_device(self, device: DeviceConfig) -> str:
        assert isinstance(device, BlockConfig)
        if len(self.plugged) >= self.limit:
            raise HypervisorError("no free slot")
        self.plugged[device.id] = device
        return f"/dev/vd{'bcdefghij'[len(self.plugged) - 1]}"

    async def remove_device(self, device_id: str) -> None:
        del self.plugged[device_id]


class Agent:
    async def copy_file(self, request: Any) -> None:
        raise AssertionError(f"nothing is to be copied, {request.path} was")


@pytest.fixture
def make(tmp_path: Path) -> Callable[[Vm, MemoryUndo], BlockFiles]:
    def _make(vm: Vm, undo: MemoryUndo) -> BlockFiles:
        data = str(tmp_path / "data")
        return BlockFiles("sid", DeviceManager(), vm, undo, Agent, data_dir=data)  # type: ignore[arg-type]

    return _make


@pytest.fixture
def bundle(tmp_path: Path) -> str:
    (tmp_path / "rootfs").mkdir()
    (tmp_path / "rootfs" / "file").write_text("content")
    return str(tmp_path / "rootfs")


async def test_a_directory_becomes_an_image_with_a_scratch_disk_above(
    make: Callable[[Vm, MemoryUndo], BlockFiles], bundle: str, tmp_path: Path
) -> None:
    vm, undo = Vm(), MemoryUndo()
    files = make(vm, undo)
    await files.set_up()
    upper, lower, overlay = await files.add("c1", [], bundle, [])
    base = "/run/kata-containers/shared/containers/passthrough/c1"
    assert [(s.driver, s.source, s.fstype, s.mount_point) for s in (upper, lower, overlay)] == [
        ("mmioblk", "/dev/vdb", "ext4", base),
        ("mmioblk", "/dev/vdc", "erofs", f"{base}/lower"),
        ("overlayfs", "overlay", "overlay", f"{base}/rootfs"),
    ]
    assert [disk.read_only for disk in vm.plugged.values()] == [False, True]
    image = next(disk for disk in vm.plugged.values() if disk.read_only)
    assert f"kata-shim.bytes={os.stat(image.path).st_size}" in lower.driver_options
    assert await files.remove("c1") == []
    assert await files.remove("c1") == []
    assert vm.plugged == {}
    assert not os.path.exists(image.path)
    assert await files.tear_down() == []
    assert undo.entries == []
    assert os.listdir(tmp_path / "data/sandboxes") == []
    assert os.listdir(tmp_path / "data/images") == []


async def test_the_snapshotters_disk_is_the_disk(
    make: Callable[[Vm, MemoryUndo], BlockFiles], tmp_path: Path
) -> None:
    vm = Vm()
    files = make(vm, MemoryUndo())
    await files.set_up()
    image = tmp_path / "thin.img"
    image.write_bytes(bytes(1 << 20))
    (storage,) = await files.add("c1", [RootfsMount("ext4", str(image), "", ("loop", "noatime"))], "", [])
    assert (storage.fstype, list(storage.options)) == ("ext4", ["noatime"])
    assert [disk.path for disk in vm.plugged.values()] == [str(image)]
    # The VM is gone: its disks with it.
    vm.plugged.clear()
    assert await files.tear_down() == []


@pytest.mark.parametrize("limit", [0, 1])
async def test_a_failure_leaves_nothing(
    make: Callable[[Vm, MemoryUndo], BlockFiles], bundle: str, tmp_path: Path, limit: int
) -> None:
    vm, undo = Vm(limit), MemoryUndo()
    files = make(vm, undo)
    await files.set_up()
    with pytest.raises(HypervisorError, match="rootfs: no free slot"):
        await files.add("c1", [], bundle, [])
    assert vm.plugged == {}
    assert [entry.facts["path"] for entry in undo.entries] == [str(tmp_path / "data/sandboxes/sid")]
    assert os.listdir(tmp_path / "data/sandboxes/sid") == []


async def test_a_volume_that_cannot_be_copied_undoes_the_rest(
    make: Callable[[Vm, MemoryUndo], BlockFiles], bundle: str
) -> None:
    vm = Vm()
    files = make(vm, MemoryUndo())
    await files.set_up()
    with pytest.raises(CallerError, match="/nope"):
        await files.add("c1", [], bundle, [Volume(0, "/nope", "/x", True, True, "v")])
    assert vm.plugged == {}


def test_only_block_mounts_are_taken_as_disks(tmp_path: Path) -> None:
    plain = RootfsMount("ext4", str(tmp_path), "", ())
    assert block_files._block_rootfs([plain]) is None
    assert block_files._block_rootfs([RootfsMount("overlay", "overlay", "", ())]) is None
    assert block_files._block_rootfs([]) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
async def test_what_walks_a_root_file_system_by_names_is_led_nowhere(
    make: Callable[[Vm, MemoryUndo], BlockFiles], bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While mkfs.erofs is at it the tree may change: it meets no link, no device, and cannot write."""
    (tmp_path / "secret").write_text("of the host")
    refused: list[int | None] = []

    async def mkfs(
        _undo: object, program: str, arguments: Sequence[str], _timeout: float, _confinement: object
    ) -> None:
        if program != "mkfs.erofs":
            return
        *_, image, tree = arguments
        os.unlink(f"{bundle}/file")
        os.symlink(tmp_path / "secret", f"{bundle}/file")
        os.symlink(tmp_path, f"{bundle}/folder")
        os.mknod(f"{bundle}/zero", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
        assert os.readlink(f"{tree}/file") == str(tmp_path / "secret")
        for name, flags in (
            ("file", 0),
            ("folder/secret", 0),
            ("zero", 0),
            ("new", os.O_CREAT | os.O_WRONLY),
        ):
            try:
                os.close(os.open(f"{tree}/{name}", flags))
                refused.append(None)
            except OSError as error:
                refused.append(error.errno)
        Path(image).touch()

    monkeypatch.setattr(disk_images, "_run", mkfs)
    files = make(Vm(), MemoryUndo())
    await files.set_up()
    await files.add("c1", [], bundle, [])
    assert refused == [errno.ELOOP, errno.ELOOP, errno.EACCES, errno.EROFS]
    assert await files.tear_down() == []
