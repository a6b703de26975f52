"""Device nodes that a shared root file system cannot hold are made in the guest's memory and bound."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from agent.nodes import apart, place, remove

Json = dict[str, Any]
TMPFS = {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]}
DISK = {"path": "/data/disk", "type": "b", "major": 254, "minor": 16, "uid": 7, "gid": 8, "fileMode": 0o640}
FUSE = {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "uid": 0, "gid": 0}
PIPE = {"path": "/pipe", "type": "p"}
USUAL = ["/dev/full", "/dev/null", "/dev/random", "/dev/tty", "/dev/urandom", "/dev/zero"]


def _config(*mounts: dict[str, Any], devices: tuple[dict[str, Any], ...] = (), **linux: Any) -> Json:
    return {"root": {"path": "/"}, "mounts": list(mounts), "linux": {"devices": list(devices), **linux}}


def _paths(config: Json) -> list[str]:
    return sorted(device["path"] for device in apart(config))


def _bind(source: str, destination: str = "/dev") -> Json:
    return {"destination": destination, "type": "bind", "source": source, "options": ["rbind"]}


def test_the_usual_container_has_none() -> None:
    assert _paths(_config(TMPFS, devices=(FUSE, PIPE))) == []
    assert _paths(_config({**TMPFS, "destination": "/dev/"}, devices=(FUSE,))) == []
    assert _paths(_config(_bind("/dev"), devices=(FUSE,))) == []
    assert _paths(_config(devices=(DISK,), uidMappings=[{"size": 1}])) == []


def test_those_outside_of_memory_are_told() -> None:
    assert _paths(_config(TMPFS, devices=(DISK, FUSE))) == ["/data/disk"]
    assert _paths(_config(devices=(FUSE, PIPE))) == sorted(["/dev/fuse", *USUAL])
    assert _paths(_config(TMPFS, _bind("/run/kata-containers/x", "/dev/sub"))) == []
    sub = {**FUSE, "path": "/dev/sub/../sub/fuse"}
    assert _paths(_config(TMPFS, _bind("/run/kata-containers/x", "/dev/sub"), devices=(sub,))) == [
        sub["path"]
    ]
    null = {**FUSE, "path": "/dev/null", "minor": 3}
    assert _paths(_config(devices=(null,))) == USUAL


@pytest.mark.skipif(os.geteuid() != 0, reason="a device node needs root")
def test_they_are_made_as_the_spec_has_them_bound_and_removed(tmp_path: Path) -> None:
    number = os.stat("/").st_dev
    mountinfo = tmp_path / "mountinfo"
    line = f"1 0 {os.major(number)}:{os.minor(number)} / / rw - virtiofs kataShared rw\n"
    mountinfo.write_text(f"2 0 0:999 / /proc rw - proc proc rw\n{line}")
    config = _config(TMPFS, devices=(FUSE, DISK, PIPE))
    nodes = str(tmp_path / "nodes")
    place(config, apart(config), "c1", nodes=nodes, mountinfo=str(mountinfo))

    bound = config["mounts"][1]
    assert (bound["destination"], bound["type"]) == ("/data/disk", "bind")
    assert config["linux"]["devices"] == [FUSE, PIPE]
    info = os.stat(bound["source"])
    assert (info.st_rdev, info.st_uid, info.st_gid) == (os.makedev(254, 16), 7, 8)
    assert info.st_mode == stat.S_IFBLK | 0o640
    assert stat.S_IMODE(os.stat(f"{nodes}/c1").st_mode) == 0o700
    remove("c1", nodes=nodes)
    remove("c1", nodes=nodes)
    assert os.listdir(nodes) == []


def test_a_root_that_can_hold_them_is_left_to_crun(tmp_path: Path) -> None:
    """A disk's, for example: as under runc they are there, and no files."""
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text("2 0 0:999 / / rw - virtiofs kataShared rw\n")
    config = _config(devices=(DISK,))
    place(config, apart(config), "c1", nodes=str(tmp_path / "nodes"), mountinfo=str(mountinfo))
    assert config["mounts"] == []
    assert config["linux"]["devices"] == [DISK]
    assert not (tmp_path / "nodes").exists()
