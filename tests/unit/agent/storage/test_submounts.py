"""What a container uses of the share is first mounted in the agent's namespace; only that is unmounted."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.storage import submounts
from agent.storage.submounts import drop, hold


def test_only_virtiofs_below_the_share_is_held(tmp_path: Path) -> None:
    share = f"{tmp_path}/"
    places = {name: f"{tmp_path}/{name}" for name in ("rootfs", "volume", "block", "plain")}
    for place in places.values():
        Path(place).mkdir()
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(
        f"1 0 0:1 / {tmp_path} rw - virtiofs kataShared rw\n"
        f"2 1 0:2 / {places['rootfs']} rw - virtiofs none rw\n"
        f"3 1 0:3 / {places['volume']} rw - virtiofs none rw\n"
        f"4 1 8:1 / {places['block']} rw - ext4 /dev/vda rw\n"
        "5 0 0:5 / /elsewhere rw - virtiofs other rw\n"
    )
    config = {
        "root": {"path": places["rootfs"]},
        "mounts": [
            {"type": "bind", "source": places["volume"] + "/"},
            {"type": "bind", "source": places["block"]},
            {"type": "bind", "source": places["plain"]},
            {"type": "bind", "source": "/elsewhere"},
            {"type": "bind", "source": f"{tmp_path}/missing"},
            {"type": "proc", "source": "proc"},
            {"type": "tmpfs"},
        ],
    }
    assert hold(config, share=share, mountinfo=str(mountinfo)) == [places["rootfs"], places["volume"]]


def test_a_container_without_a_share_holds_nothing() -> None:
    assert hold({}, mountinfo="/nonexistent") == []
    assert hold({"root": {"path": "/run/block/rootfs"}}, mountinfo="/nonexistent") == []


def test_what_cannot_be_unmounted_keeps_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each is asked before it goes, and one that fails does not keep the next."""
    gone: list[str] = []
    monkeypatch.setattr(submounts, "umount", lambda path, flags: gone.append(path))
    drop([str(tmp_path / "missing"), str(tmp_path)])
    assert gone == [str(tmp_path)]
