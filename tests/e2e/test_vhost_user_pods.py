"""What a pod asks for by Kata's names is served by vhost-user back ends: nodes 241:N, spdkvol, DAN files."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conformance.back_ends import Passt, StorageDaemon, passt_missing
from shim.resources.direct_volumes import DIRECTORY
from testing.containerd import Containerd
from testing.guest import Value, write_configuration
from tests.e2e.vms import E2FS, read_disk

pytestmark = pytest.mark.kata_only

BUSYBOX = "local/busybox:1"


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., list[str]]:
    """ctr's, for a configuration with these keys."""

    def _options(**overrides: dict[str, Value | None]) -> list[str]:
        sections = {section.replace("__", "."): keys for section, keys in overrides.items()}
        path = write_configuration(tmp_path / "configuration.toml", sections)
        return ["--runtime-config-path", str(path)]

    return _options


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """8 MB of ext4 with one file."""
    (tmp_path / "content").mkdir()
    (tmp_path / "content/hello").write_text("from the host\n")
    path = tmp_path / "served.img"
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-d", tmp_path / "content", path, "8M"], check=True, env=E2FS
    )
    return path


def test_a_node_of_the_store_is_the_back_ends_disk(
    containerd: Containerd,
    options: Callable[..., list[str]],
    image: Path,
    tmp_path: Path,
    no_leaks: Callable[[], None],
) -> None:
    """`ctr run --device`, both ways; while the store is switched off it is refused, and says how."""
    for name in ("devices", "sockets"):
        (tmp_path / "store/block" / name).mkdir(parents=True)
    node = tmp_path / "store/block/devices/disk0"
    os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(241, 7))
    off = options(hypervisor__qemu={"enable_vhost_user_store": False})
    done = containerd.run(BUSYBOX, "true", options=(*off, "--device", str(node)), timeout=120, check=False)
    assert b"enable_vhost_user_store = true" in done.err

    keys: dict[str, Value | None] = {
        "enable_vhost_user_store": True,
        "vhost_user_store_path": str(tmp_path / "store"),
    }
    daemon = StorageDaemon(image, tmp_path / "store/block/sockets/disk0")
    try:
        script = f"stat -c %F {node}; echo written | dd of={node} bs=512 seek=16000 conv=fsync"
        asked = (*options(hypervisor__qemu=keys), "--device", str(node))
        done = containerd.run(BUSYBOX, "sh", "-c", script, options=asked, timeout=120)
        assert done.text.splitlines()[0] == "block special file"
    finally:
        daemon.close()
    assert image.read_bytes()[512 * 16000 :].startswith(b"written\n")
    done = containerd.run(BUSYBOX, "true", options=asked, timeout=120, check=False)
    assert b"block/sockets/disk0 is no socket" in done.err


def test_a_directly_assigned_volume_of_spdk(
    containerd: Containerd, options: Callable[..., list[str]], image: Path, tmp_path: Path
) -> None:
    """`volume-type` spdkvol: the guest mounts what the back end serves."""
    source = tmp_path / "volume"
    source.mkdir()
    entry = Path(DIRECTORY) / base64.urlsafe_b64encode(str(source).encode()).decode()
    entry.mkdir(parents=True)
    daemon = StorageDaemon(image, tmp_path / "disk.sock")
    try:
        info = {"volume-type": "spdkvol", "device": f"spdk://{daemon.path}", "fstype": "ext4", "options": []}
        (entry / "mountInfo.json").write_text(json.dumps(info))
        mount = f"type=bind,src={source},dst=/data,options=rbind:rw"
        script = "cat /data/hello; echo from the guest > /data/new"
        done = containerd.run(
            BUSYBOX, "sh", "-c", script, options=(*options(), "--mount", mount), timeout=120
        )
        assert done.text == "from the host"
    finally:
        daemon.close()
        shutil.rmtree(entry)
    assert read_disk(image, "new") == b"from the guest\n"


@pytest.fixture
def answering() -> Iterator[int]:
    """A port of this host's loopback where one client is answered with what it said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(120)

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"you said " + connection.recv(100))

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join()


def test_a_dan_file_gives_the_pod_its_network(
    containerd: Containerd, options: Callable[..., list[str]], tmp_path: Path, answering: int
) -> None:
    """A card of a vhost-user back end, with its addresses; the pod's own namespace does not count."""
    if missing := passt_missing():
        pytest.fail(missing, pytrace=False)
    passt = Passt(tmp_path / "net.sock")
    try:
        name = containerd.new_id("dan")
        card = {
            "name": "eth7",
            "guest_mac": "02:00:00:00:00:07",
            "device": {"type": "vhost-user", "path": passt.path},
            "network_info": {
                "interface": {"ip_addresses": [f"{Passt.ADDRESS}/24"], "mtu": 1400},
                "routes": [{"dest": "0.0.0.0/0", "gateway": Passt.GATEWAY}],
            },
        }
        (tmp_path / f"{name}.json").write_text(json.dumps({"devices": [card]}))
        script = f"echo hello | nc {Passt.GATEWAY} {answering}; cat /sys/class/net/eth7/mtu; ip route"
        asked = options(runtime={"dan_conf": str(tmp_path)})
        done = containerd.run(BUSYBOX, "sh", "-c", script, name=name, options=asked, timeout=120)
        said, mtu, *routes = done.text.splitlines()
        assert (said, mtu) == ("you said hello", "1400")
        assert any(line.startswith(f"default via {Passt.GATEWAY} dev eth7") for line in routes)
    finally:
        passt.close()
