"""What a guest can leave in a volume of the host: each sentence of docs/volumes.md, tried in one VM.

The container runs the host's Python, which it has as a read-only volume: busybox has no words for half of it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from devices.share_fs import carries_groups
from testing.containerd import KATA, Containerd
from testing.guest import Value, write_configuration

pytestmark = pytest.mark.kata_only

IMAGE = "local/busybox:1"
_CAP_MKNOD = 1 << 27
_LIBRARIES = "/host/lib/x86_64-linux-gnu"
_LOADER = f"{_LIBRARIES}/ld-linux-x86-64.so.2 --library-path {_LIBRARIES}"
_PYTHON = f"{_LOADER} /host/bin/{os.path.basename(os.path.realpath('/usr/bin/python3'))} -ISB"

# Everything that it tries, as `name: errno`; 0 is success.
_PROGRAM = r"""
import fcntl, json, os, shutil, socket, stat, struct
done = {}
def attempt(name, call, *arguments, **more):
    try:
        call(*arguments, **more)
        done[name] = 0
    except OSError as error:
        done[name] = error.errno
os.umask(0)
os.chdir("/vol")
open("owned", "w").write("x")
attempt("owner", os.chown, "owned", 12345, 54321)
shutil.copy("/host/bin/id", "setuid")
attempt("setuid", os.chmod, "setuid", 0o6755)
os.mkdir("setgid")
attempt("sticky", os.chmod, "setgid", 0o3777)
attempt("symlink", os.symlink, "/etc/shadow", "symlink")
attempt("climbing", os.symlink, "../../../../../../etc/shadow", "climbing")
attempt("hardlink", os.link, "owned", "hardlink")
attempt("hardlink to another volume", os.link, "owned", "/other/hardlink")
attempt("rename to another volume", os.rename, "setuid", "/other/setuid")
attempt("fifo", os.mkfifo, "fifo", 0o666)
attempt("socket", socket.socket(socket.AF_UNIX).bind, "socket")
attempt("block device", os.mknod, "block", stat.S_IFBLK | 0o666, os.makedev(254, 0))
attempt("character device", os.mknod, "char", stat.S_IFCHR | 0o666, os.makedev(1, 3))
attempt("whiteout", os.mknod, "whiteout", stat.S_IFCHR | 0o666, os.makedev(0, 0))
attempt("user xattr", os.setxattr, "owned", "user.note", b"from the guest")
capability = struct.pack("<5I", 0x02000001, 1 << 21, 0, 0, 0)
attempt("file capability", os.setxattr, "setuid", "security.capability", capability)
attempt("trusted xattr", os.setxattr, "owned", "trusted.note", b"x")
none = 0xFFFFFFFF
entries = ((1, 6, none), (2, 7, 4321), (4, 4, none), (16, 7, none), (32, 4, none))  # tag, bits, user
acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
attempt("acl", os.setxattr, "owned", "system.posix_acl_access", acl)
flags = os.open("owned", os.O_RDWR)
attempt("immutable", fcntl.ioctl, flags, 0x40086602, struct.pack("=l", 0x10))
open("sparse", "w").close()
attempt("sparse", os.truncate, "sparse", 1 << 40)
attempt("times", os.utime, "owned", (86400, 4102444800))
attempt("name", open(b"line\nbreak \xff", "w").close)
attempt("read-only", open, "/ro/new", "w")
attempt("mode of a read-only one", os.chmod, "/ro/file", 0o777)
attempt("node in the root file system", os.mknod, "/block", stat.S_IFBLK | 0o666, os.makedev(254, 0))
attempt("fifo in the root file system", os.mkfifo, "/fifo")
os.sync()
print(json.dumps(done))
"""


@pytest.fixture(scope="module")
def folders() -> Iterator[dict[str, Path]]:
    """Three directories of the host that its users can reach, as an administrator's may be."""
    base = Path(tempfile.mkdtemp(dir="/tmp"))
    base.chmod(0o755)
    made = {name: base / name for name in ("vol", "other", "ro")}
    for folder in made.values():
        folder.mkdir()
        folder.chmod(0o755)
    (made["ro"] / "file").touch(0o600)
    yield made
    shutil.rmtree(base)


def _options(folders: dict[str, Path]) -> list[str]:
    mounts = [(str(folder), f"/{name}", "ro" if name == "ro" else "rw") for name, folder in folders.items()]
    mounts.append(("/usr", "/host", "ro"))
    return [
        word
        for source, target, mode in mounts
        for word in ("--mount", f"type=bind,src={source},dst={target},options=rbind:{mode}")
    ]


def _daemons() -> set[int]:
    """The virtiofsds that run."""
    found = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if Path(f"/proc/{pid}/comm").read_text().startswith("virtiofsd"):
                found.add(int(pid))
        except OSError:
            continue
    return found


def _capabilities(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    sets = dict(line.split(":\t") for line in status if line.startswith("Cap"))
    return int(sets["CapPrm"], 16) | int(sets["CapEff"], 16) | int(sets["CapInh"], 16)


@pytest.fixture(scope="module")
def done(containerd: Containerd, folders: dict[str, Path]) -> dict[str, Any]:
    """What came of each attempt, and what the daemon was allowed meanwhile."""
    name, before = containerd.new_id("leaves"), _daemons()
    run = ("run", "--detach", "--runtime", KATA, *_options(folders), IMAGE, name, "sleep", "100000")
    containerd.ctr(*run, timeout=120)
    try:
        (daemon,) = _daemons() - before
        allowed = _capabilities(daemon)
        (folders["vol"].parent / "program.py").write_text(_PROGRAM)
        shutil.copy(folders["vol"].parent / "program.py", folders["ro"] / "program.py")
        words = [*_PYTHON.split(), "/ro/program.py"]
        out = containerd.ctr("task", "exec", "--exec-id", "p", name, *words, timeout=120)
        return {**json.loads(out.text), "capabilities": allowed}
    finally:
        containerd.remove(name)


def test_no_device_node_is_made_but_what_an_overlay_needs(
    done: dict[str, Any], folders: dict[str, Path]
) -> None:
    assert not done["capabilities"] & _CAP_MKNOD
    assert done["block device"] == done["character device"] == errno.EPERM
    assert done["node in the root file system"] == errno.EPERM
    assert done["whiteout"] == 0
    nodes = {path.name: path.lstat() for path in folders["vol"].iterdir()}
    devices = [
        name for name, info in nodes.items() if stat.S_ISBLK(info.st_mode) or stat.S_ISCHR(info.st_mode)
    ]
    assert devices == ["whiteout"]
    assert nodes["whiteout"].st_rdev == 0


def test_owners_and_modes_are_the_guests(done: dict[str, Any], folders: dict[str, Path]) -> None:
    """A setuid program of the guest's root is one of the host's root, for whoever can reach it."""
    assert done["owner"] == done["setuid"] == done["sticky"] == 0
    owned = (folders["vol"] / "owned").stat()
    assert (owned.st_uid, owned.st_gid) == (12345, 54321)
    program = folders["vol"] / "setuid"
    assert program.stat().st_uid == 0
    assert stat.S_IMODE(program.stat().st_mode) == 0o6755
    assert stat.S_IMODE((folders["vol"] / "setgid").stat().st_mode) == 0o3777
    obeyed = not os.statvfs(program).f_flag & os.ST_NOSUID
    user = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    told = subprocess.run([*user, str(program), "-u"], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == ("0" if obeyed else "65534")


def test_links_say_what_the_guest_wants(done: dict[str, Any], folders: dict[str, Path]) -> None:
    assert done["symlink"] == done["climbing"] == done["hardlink"] == 0
    assert os.readlink(folders["vol"] / "symlink") == "/etc/shadow"
    assert os.readlink(folders["vol"] / "climbing").startswith("../..")
    assert os.path.samefile(folders["vol"] / "owned", folders["vol"] / "hardlink")
    assert done["hardlink to another volume"] == done["rename to another volume"] == errno.EXDEV
    assert list(folders["other"].iterdir()) == []


def test_fifos_and_sockets_are_made(done: dict[str, Any], folders: dict[str, Path]) -> None:
    assert done["fifo"] == done["socket"] == done["fifo in the root file system"] == 0
    assert stat.S_ISFIFO((folders["vol"] / "fifo").stat().st_mode)
    assert stat.S_ISSOCK((folders["vol"] / "socket").stat().st_mode)
    with socket.socket(socket.AF_UNIX) as connection, pytest.raises(ConnectionRefusedError):
        connection.connect(str(folders["vol"] / "socket"))


def test_attributes(done: dict[str, Any], folders: dict[str, Path]) -> None:
    assert done["user xattr"] == done["file capability"] == 0
    in_c = not carries_groups()  # Rust's virtiofsd has access lists with --posix-acl only
    assert done["acl"] == (0 if in_c else errno.EOPNOTSUPP)
    assert os.getxattr(folders["vol"] / "owned", "user.note") == b"from the guest"
    assert "security.capability" in os.listxattr(folders["vol"] / "setuid")
    assert done["trusted xattr"] == errno.EPERM
    assert done["immutable"] in (errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS)
    lists = ["system.posix_acl_access"] if in_c else []
    assert sorted(os.listxattr(folders["vol"] / "owned")) == [*lists, "user.note"]


def test_sizes_times_and_names_are_the_guests(done: dict[str, Any], folders: dict[str, Path]) -> None:
    assert done["sparse"] == done["times"] == done["name"] == 0
    sparse = (folders["vol"] / "sparse").stat()
    assert sparse.st_size == 1 << 40
    assert sparse.st_blocks == 0
    assert (folders["vol"] / "owned").stat().st_mtime == 4102444800
    assert b"line\nbreak \xff" in os.listdir(os.fsencode(folders["vol"]))


def test_a_read_only_volume_gets_nothing(done: dict[str, Any], folders: dict[str, Path]) -> None:
    assert done["read-only"] == done["mode of a read-only one"] == errno.EROFS
    assert sorted(os.listdir(folders["ro"])) == ["file", "program.py"]
    assert stat.S_IMODE((folders["ro"] / "file").stat().st_mode) == 0o600


def test_root_file_systems_can_have_device_nodes_and_volumes_still_not(
    containerd: Containerd, tmp_path: Path, no_leaks: Callable[[], None]
) -> None:
    """`virtio_fs_rootfs_mknod`: a daemon of their own has the capability, and the node works in the guest."""
    overrides: dict[str, dict[str, Value | None]] = {"hypervisor.qemu": {"virtio_fs_rootfs_mknod": True}}
    configuration = write_configuration(tmp_path / "configuration.toml", overrides)
    name, before = containerd.new_id("nodes"), _daemons()
    mount = ("--mount", f"type=bind,src={tmp_path},dst=/vol,options=rbind:rw")
    options = ("--runtime", KATA, "--runtime-config-path", str(configuration), *mount)
    containerd.ctr("run", "--detach", *options, IMAGE, name, "sleep", "100000", timeout=120)
    allowed = sorted(bool(_capabilities(pid) & _CAP_MKNOD) for pid in _daemons() - before)
    script = (
        "mknod /null c 1 3 && cat /null && mknod /x b 254 0 && ls /x; echo kept >/vol/file; cat /vol/file;"
        "mknod /vol/null c 1 3; echo $?; grep -c virtiofs /proc/mounts"
    )
    result = containerd.ctr(
        "task", "exec", "--exec-id", "n", name, "sh", "-c", script, timeout=60, check=False
    )
    containerd.remove(name)

    assert allowed == [False, True]
    assert result.text.splitlines() == ["/x", "kept", "1", "2"]
    assert "mknod: /vol/null: Operation not permitted" in result.error
    assert sorted(os.listdir(tmp_path)) == ["configuration.toml", "file"]
    no_leaks()
