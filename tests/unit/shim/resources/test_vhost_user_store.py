"""A reserved number in a spec is the socket that the administrator's directory has for it, or an error."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from devices.errors import CallerError, HostError
from devices.rendezvous import listen
from shim.resources.vhost_user_store import find

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mknod needs root")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for name in ("devices", "sockets"):
        (tmp_path / "block" / name).mkdir(parents=True)
    for name, kind, minor in (
        ("disk0", stat.S_IFBLK, 0),
        ("disk1", stat.S_IFBLK, 1),
        ("no", stat.S_IFCHR, 2),
    ):
        os.mknod(tmp_path / "block/devices" / name, kind | 0o600, os.makedev(241, minor))
    return tmp_path


def test_the_number_names_the_socket(store: Path) -> None:
    path = str(store / "block/sockets/disk1")
    listen(path).close()
    assert find(str(store), 241, 1, "/dev/x") == path


def test_what_is_not_there_is_told(store: Path) -> None:
    with pytest.raises(HostError, match=r"/dev/x \(241:0\): .*/block/sockets/disk0 is no socket"):
        find(str(store), 241, 0, "/dev/x")
    (store / "block/sockets/disk0").touch()
    with pytest.raises(HostError, match="is no socket"):
        find(str(store), 241, 0, "/dev/x")
    with pytest.raises(HostError, match=r"no node in .* has this number") as caught:
        find(str(store), 241, 2, "/dev/x")  # a character device is none
    assert "b 241 2" in caught.value.hint
    with pytest.raises(HostError, match="cannot be read"):
        find(str(store / "nowhere"), 241, 0, "/dev/x")


def test_what_is_switched_off_or_of_another_kind_is_refused(store: Path) -> None:
    with pytest.raises(CallerError, match="switched off") as caught:
        find("", 241, 0, "/dev/x")
    assert caught.value.hint == "enable_vhost_user_store = true"
    with pytest.raises(CallerError, match="vhost-user-scsi"):
        find(str(store), 242, 0, "/dev/x")
