"""containerd's mounts are mounted as they say, inside the root whatever the image's links, or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices import loop, mounts, rootfs_mounts
from devices.errors import CallerError
from devices.syscalls import mount
from tests.unit.attacker import attacking
from tests.unit.shim.namespaces import in_mount_namespace
from tests.unit.steps import Steps


@dataclass(frozen=True)
class _Mount:
    type: str
    source: str
    options: Sequence[str] = ()
    target: str = ""


def test_options() -> None:
    """Options are flags, propagation, or data; later ones win, unknown ones go to the file system."""
    flags, propagation, data = rootfs_mounts.parse_options(
        ["ro", "nosuid", "rw", "rslave", "size=1k", "index=off"]
    )

    assert flags == mounts.MS_NOSUID
    assert propagation == mounts.MS_SLAVE | mounts.MS_REC
    assert data == "size=1k,index=off"


def test_overlay(tmp_path: Path) -> None:
    """An overlay of two layers shows both, takes writes, and is gone after unmount."""
    for name in ("a", "b", "up", "work", "root"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "from-a").write_text("1")
    (tmp_path / "b" / "from-b").write_text("2")
    root = str(tmp_path / "root")

    def body() -> None:
        # tmpfs, since the test's own directory may lie on an overlay, which cannot be an upper one
        mount("t", str(tmp_path / "up"), "tmpfs", 0, "")
        (tmp_path / "up" / "u").mkdir()
        (tmp_path / "up" / "w").mkdir()
        options = [
            "index=off",
            f"workdir={tmp_path}/up/w",
            f"upperdir={tmp_path}/up/u",
            f"lowerdir={tmp_path}/a:{tmp_path}/b",
        ]
        rootfs_mounts.mount_rootfs([_Mount("overlay", "overlay", options)], root)
        assert mounts.is_mountpoint(root)
        assert sorted(os.listdir(root)) == ["from-a", "from-b"]
        (tmp_path / "root" / "new").write_text("3")
        assert (tmp_path / "up" / "u" / "new").read_text() == "3"
        mounts.unmount(root)
        assert not mounts.is_mountpoint(root)
        assert os.listdir(root) == []

    in_mount_namespace(body)


@pytest.mark.parametrize("count", [30, 120])
def test_overlay_of_many_layers(tmp_path: Path, count: int) -> None:
    """Layers whose paths exceed one page of options are mounted all the same, in their order."""
    base = tmp_path / ("io.containerd.snapshotter.v1.overlayfs" * 2) / "snapshots"
    layers = []
    for number in range(count):
        layer = base / str(number) / "fs"
        layer.mkdir(parents=True)
        (layer / f"only-{number}").write_text("")
        (layer / "all").write_text(str(number))
        layers.append(str(layer))
    root = tmp_path / "root"
    root.mkdir()
    options = ["lowerdir=" + ":".join(layers)]
    assert count < 100 or len(options[0]) > 2 * 4096

    def body() -> None:
        here = os.getcwd()
        rootfs_mounts.mount_rootfs([_Mount("overlay", "overlay", options)], str(root))
        assert len(os.listdir(root)) == count + 1
        assert (root / "all").read_text() == "0"
        assert os.getcwd() == here
        mounts.unmount(str(root))

    in_mount_namespace(body)


def test_layers_with_colons() -> None:
    """A name with an escaped colon stays one layer when its path is shortened."""
    directory, data = rootfs_mounts._shorten_overlay(r"ro,lowerdir=/s/a\:b/fs:/s/c/fs,x=y")

    assert directory == "/s"
    assert data == r"ro,lowerdir=a\:b/fs:c/fs,x=y"


@given(st.lists(st.text("abc/\\:.", min_size=1, max_size=10), min_size=1, max_size=5))
def test_shortening_keeps_what_is_named(names: list[str]) -> None:
    """Relative to the common directory, the layers are the same paths."""
    layers = ["/snap/" + name.replace("\\", "").replace(":", "\\:") for name in names]
    directory, data = rootfs_mounts._shorten_overlay("lowerdir=" + ":".join(layers))

    relative = [part.replace("\0", ":") for part in data[9:].replace("\\:", "\0").split(":")]
    assert [os.path.normpath(os.path.join(directory, part)) for part in relative] == [
        os.path.normpath(layer.replace("\\:", ":")) for layer in layers
    ]


def test_failure_is_undone_and_told(tmp_path: Path) -> None:
    """When the second mount fails the first is undone, and the error names both sides and the cause."""
    (tmp_path / "src").mkdir()
    target = tmp_path / "root"
    target.mkdir()
    wanted = [_Mount("bind", str(tmp_path / "src"), ["bind"]), _Mount("bind", "/does/not/exist", ["bind"])]

    def body() -> None:
        with pytest.raises(mounts.MountError, match=r"cannot mount bind /does/not/exist on .*does not exist"):
            rootfs_mounts.mount_rootfs(wanted, str(target))
        assert not mounts.is_mountpoint(str(target))

    in_mount_namespace(body)


def test_unknown_file_system(tmp_path: Path) -> None:
    """A file system that the kernel lacks is named, with what to try."""

    def body() -> None:
        with pytest.raises(mounts.MountError, match="this kernel has no nosuchfs; try: modprobe nosuchfs"):
            rootfs_mounts.mount_rootfs([_Mount("nosuchfs", "none")], str(tmp_path))

    in_mount_namespace(body)


@pytest.mark.parametrize("target", ["../x", "a/../../x"])
def test_target_stays_inside(tmp_path: Path, target: str) -> None:
    """A mount's own target cannot leave the root file system."""
    with pytest.raises(mounts.MountError, match="leaves the root"):
        rootfs_mounts.mount_rootfs([_Mount("tmpfs", "t", (), target)], str(tmp_path))


class _Image:
    """A root file system with links to the host in it, and a volume's source with one file."""

    def __init__(self, base: Path) -> None:
        self.host = base / "host"
        (self.host / "sub").mkdir(parents=True)
        self.root = base / "root"
        self.image = base / "image"
        (self.image / "real/sub").mkdir(parents=True)
        (self.image / "host/sub").mkdir(parents=True)
        self.extra = base / "extra"
        self.extra.mkdir()
        (self.extra / "mounted").write_text("x")
        self.root.mkdir()

    def mount(self, target: str, *also: _Mount) -> None:
        image = _Mount("bind", str(self.image), ["rbind", "rw"])
        extra = _Mount("bind", str(self.extra), ["rbind", "ro"], target)
        rootfs_mounts.mount_rootfs([image, extra, *also], str(self.root))


def _links(image: _Image) -> dict[str, str]:
    """What an image may have at `data`, and where that lands inside."""
    return {
        str(image.host): f"{image.host}".lstrip("/"),
        "/host": "host",
        "../../../../../../../../host": "host",
        "real/../../host": "host",
        "/real": "real",
    }


def test_where_an_image_has_a_link_the_mount_is_inside(tmp_path: Path) -> None:
    """`data -> /some/directory` means that directory of the image, also where the path goes on behind it."""
    image = _Image(tmp_path)
    for link, inside in _links(image).items():
        for more in ("", "/sub"):
            (image.image / inside / "sub").mkdir(parents=True, exist_ok=True)
            (image.image / "data").unlink(missing_ok=True)
            (image.image / "data").symlink_to(link)

            def body(where: str = inside + more, more: str = more) -> None:
                image.mount(f"/data{more}")
                assert (image.root / where / "mounted").read_text() == "x"
                with pytest.raises(OSError, match="Read-only"):
                    (image.root / where / "new").touch()
                assert mounts.mounts_below(str(image.host)) == []
                mounts.unmount(str(image.root))
                assert mounts.mounts_below(str(image.root)) == []

            in_mount_namespace(body)


def test_a_magic_link_is_no_way_out(tmp_path: Path) -> None:
    image = _Image(tmp_path)
    (image.image / "proc").mkdir()
    proc = _Mount("bind", "/proc", ["rbind"], "/proc")

    def body() -> None:
        for link in ("/proc/self/cwd", f"/proc/1/root{image.host}", "/proc/self/root"):
            (image.image / "data").unlink(missing_ok=True)
            (image.image / "data").symlink_to(link)
            os.chdir(image.host)
            with pytest.raises(mounts.MountError, match=r"cannot mount bind .* on .*/root/data"):
                rootfs_mounts.mount_rootfs(
                    [
                        _Mount("bind", str(image.image), ["rbind"]),
                        proc,
                        _Mount("bind", str(image.extra), ["bind"], "/data"),
                    ],
                    str(image.root),
                )
            assert mounts.mounts_below(str(image.root)) == []
            assert mounts.mounts_below(str(image.host)) == []

    in_mount_namespace(body)


def _become_link(image: _Image) -> None:
    os.rename(image.image / "data", image.image / "was")
    (image.image / "data").symlink_to(image.host)


def _become_link_on_the_way(image: _Image) -> None:
    os.rename(image.image / "data", image.image / "was")
    (image.image / "data").symlink_to(f"../../../../../../../../../../{image.host}")


def _become_fifo(image: _Image) -> None:
    os.rename(image.image / "data", image.image / "was")
    os.mkfifo(image.image / "data")


def _become_mount(image: _Image) -> None:
    mount(str(image.host), str(image.image / "data"), "", 0x1000, "")


@pytest.mark.parametrize("change", [_become_link, _become_link_on_the_way, _become_fifo, _become_mount])
@pytest.mark.parametrize("target", ["/data", "/data/sub"])
@pytest.mark.parametrize("kind", ["bind", "tmpfs"])
def test_at_whatever_step_the_image_changes(
    tmp_path: Path, change: Callable[[_Image], None], target: str, kind: str
) -> None:
    """Before each single system call: what is mounted lands inside, or nothing is mounted at all."""

    def prepare(at: int) -> _Image:
        image = _Image(tmp_path / str(at))
        (image.image / "data/sub").mkdir(parents=True)
        return image

    last = _Mount(kind, "/usr" if kind == "bind" else "t", ["rbind"] if kind == "bind" else [], target)

    def body() -> None:
        dry = Steps()
        with dry.counting():
            prepare(0).mount("/real", last)
        for at in range(1, dry.count + 1):
            image = prepare(at)
            steps = Steps(partial(change, image), at)
            with steps.counting(), contextlib.suppress(OSError):
                image.mount("/real", last)
            mine = mounts.mounts_below(str(image.host))
            assert mine == [], f"step {at} of {dry.count}"
            mounts.unmount(str(image.root))
            assert mounts.mounts_below(str(image.root)) == []

    in_mount_namespace(body)


def test_a_racing_image_gets_no_mount_outside(tmp_path: Path) -> None:
    """Thousands of changes beside the mounting, by somebody who waits for nobody."""
    image = _Image(tmp_path)
    (image.image / "data").mkdir()
    last = _Mount("tmpfs", "t", [], "/data")

    data, was = image.image / "data", image.image / "was"

    def swap(number: int) -> None:
        if not was.exists():
            os.rename(data, was)
        os.symlink(image.host if number % 2 else "../../../../../host", data)
        os.unlink(data)
        os.rename(was, data)

    def body() -> None:
        mounted = failed = 0
        with attacking(swap) as changed:
            end = time.monotonic() + 120  # some two seconds on a quiet machine
            while mounted < 1 or mounted + failed < 1000 or changed() < 1000:
                assert time.monotonic() < end, (mounted, failed, changed())
                try:
                    image.mount("/real", last)
                    mounted += 1
                except OSError:
                    failed += 1
                assert mounts.mounts_below(str(image.host)) == []
                mounts.unmount(str(image.root))

    in_mount_namespace(body)


@pytest.mark.parametrize("options", [["rbind", "ro"], ["bind"]])
def test_what_an_image_has_is_no_device_and_no_privilege_on_the_host(
    tmp_path: Path, options: list[str]
) -> None:
    """Its nodes cannot be opened and its setuid bits do nothing, in each mount; they stay what they are."""
    image = tmp_path / "image"
    (image / "below").mkdir(parents=True)
    target = tmp_path / "root"
    target.mkdir()

    def body() -> None:
        mount("t", str(image / "below"), "tmpfs", 0, "")
        for folder in (image, image / "below"):
            os.mknod(folder / "zero", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
        rootfs_mounts.mount_rootfs(
            [_Mount("bind", str(image), options), _Mount("tmpfs", "t", (), "/below")], str(target)
        )
        with pytest.raises(PermissionError):
            os.open(target / "zero", os.O_RDONLY)
        assert os.stat(target / "zero").st_rdev == os.makedev(1, 5)
        for entry in mounts.mounts_below(str(target)):
            assert {"nodev", "nosuid"} <= set(entry.options.split(",")), entry
        os.close(os.open(image / "zero", os.O_RDONLY))

    in_mount_namespace(body)


def test_flags_of_a_bind(tmp_path: Path) -> None:
    """They are there from the start, of the top mount alone, as runc and mount(8) have it."""
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "below").mkdir(parents=True)
    target.mkdir()

    def body() -> None:
        mount("t", str(source / "below"), "tmpfs", 0, "")
        wanted = _Mount("bind", str(source), ["rbind", "ro", "noexec", "noatime", "nodiratime", "rprivate"])
        rootfs_mounts.mount_rootfs([wanted], str(target))
        top, below = mounts.mounts_below(str(target))
        assert {"ro", "noexec", "noatime", "nodiratime"} <= set(top.options.split(","))
        assert not {"ro", "noexec"} & set(below.options.split(","))
        mounts.unmount(str(target))
        with pytest.raises(mounts.MountError, match="only binds and the root itself"):
            rootfs_mounts.mount_rootfs([wanted, _Mount("tmpfs", "t", ["shared"], "/below")], str(target))

    in_mount_namespace(body)


def test_a_bundles_root_is_a_directory_itself(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "file").touch()
    target = tmp_path / "root"
    target.mkdir()

    def body() -> None:
        for name, what in (("link", "a symbolic link"), ("file", "no directory")):
            with pytest.raises(CallerError, match=f"{name} is {what}") as caught:
                rootfs_mounts.bind_rootfs(str(tmp_path / name), str(target))
            assert caught.value.code == "INVALID_ARGUMENT"
        with pytest.raises(mounts.MountError, match="nope does not exist"):
            rootfs_mounts.bind_rootfs(str(tmp_path / "nope"), str(target))
        assert not mounts.is_mountpoint(str(target))
        rootfs_mounts.bind_rootfs(f"{tmp_path}/real/", str(target), read_only=True)
        (entry,) = mounts.mounts_below(str(target))
        assert {"ro", "nodev", "nosuid"} <= set(entry.options.split(","))

    in_mount_namespace(body)


@pytest.mark.skipif(not os.path.exists("/dev/loop-control"), reason="no loop devices")
@pytest.mark.parametrize("options", [["loop"], ["ro", "loop"]], ids=["rw", "ro"])
def test_an_image_file_is_mounted_and_its_device_goes_with_it(tmp_path: Path, options: list[str]) -> None:
    """containerd's blockfile snapshotter says `loop`."""
    image, root = tmp_path / "image", tmp_path / "root"
    root.mkdir()
    (tmp_path / "files").mkdir()
    (tmp_path / "files/there").write_text("x")
    command = ["mkfs.ext4", "-q", "-F", "-d", str(tmp_path / "files"), str(image), "4M"]
    subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL)

    def body() -> None:
        rootfs_mounts.mount_rootfs([_Mount("ext4", str(image), options)], str(root))
        assert (root / "there").read_text() == "x"
        number = os.minor(os.stat(root).st_dev)
        backing = Path(f"/sys/block/loop{number}/loop/backing_file")
        assert backing.read_text().rstrip() == str(image)
        (mounted,) = mounts.mounts_below(str(root))
        assert {"nodev", "nosuid"} <= set(mounted.options.split(","))
        if "ro" in options:
            with pytest.raises(OSError, match="Read-only"):
                (root / "new").touch()
        else:
            (root / "new").touch()
        mounts.unmount(str(root))
        assert not _soon_there(backing)

    in_mount_namespace(body)


def _soon_there(path: Path) -> bool:
    """Whether it is still there when the kernel has had time to take the device back."""
    until = time.monotonic() + 20
    while path.exists() and time.monotonic() < until:
        time.sleep(0.01)
    return path.exists()


def test_what_is_no_image_file_is_no_device(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    os.mkfifo(tmp_path / "fifo")
    mount = _Mount("ext4", str(tmp_path / "fifo"), ["loop"])

    def body() -> None:
        with pytest.raises(mounts.MountError, match="not a regular file"):
            rootfs_mounts.mount_rootfs([mount], str(tmp_path / "root"))

    in_mount_namespace(body)


def test_a_host_without_loop_devices_is_told_what_to_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_CONTROL", str(tmp_path / "none"))
    (tmp_path / "root").mkdir()
    (tmp_path / "image").touch()
    mount = _Mount("ext4", str(tmp_path / "image"), ["loop"])

    def body() -> None:
        with pytest.raises(mounts.MountError, match="modprobe loop"):
            rootfs_mounts.mount_rootfs([mount], str(tmp_path / "root"))

    in_mount_namespace(body)
