"""A link is joined to a card, and everything between them goes again, whoever takes it away."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from devices.errors import HostError
from devices.undo import MemoryUndo, UndoLog
from shim.launch.undo_kinds import release
from shim.resources.network.endpoint import Endpoint
from shim.resources.network.netns import Netns
from shim.resources.network.scan import scan
from shim.resources.network.settings import MACVTAP, NO_MODEL, NetworkSettings
from shim.state.identity import Identity
from shim.state.journal import Journal
from shim.state.journalfile import Record, load
from tests.netlab import NetLab


def _endpoint(lab: NetLab, undo: UndoLog, *, by_name: bool = False, **keys: Any) -> Endpoint:
    netns = Netns.open(lab.pod)
    assert netns is not None
    (link,) = lab.inside("pod", scan).links
    return Endpoint(netns, link, 0, NetworkSettings(path=lab.pod, **keys), undo, by_name=by_name)


def _fds() -> int:
    return len(os.listdir("/proc/self/fd"))


VARIANTS = [
    pytest.param({}, id="tcfilter"),
    pytest.param({"queues": 2}, id="two queues"),
    pytest.param({"receive": 10_000_000, "send": 5_000_000}, id="limited"),
    pytest.param({"model": MACVTAP}, id="macvtap"),
    pytest.param({"model": MACVTAP, "receive": 10_000_000, "send": 5_000_000}, id="macvtap limited"),
    pytest.param({"model": NO_MODEL}, id="none"),
    pytest.param({"by_name": True}, id="by name"),
]


@pytest.mark.parametrize("keys", VARIANTS)
async def test_made_joined_and_released(lab: NetLab, keys: dict[str, Any]) -> None:
    undo = MemoryUndo()
    endpoint = _endpoint(lab, undo, **keys)
    before = _fds()
    card = await endpoint.make()
    queues = keys.get("queues", 1)
    assert len(card.tap_fds) == (0 if keys.get("by_name") else queues)
    assert len(card.vhost_fds) in (0, len(card.tap_fds))
    assert card.mac == endpoint.link.mac
    await endpoint.join()
    there = lab.sh("pod", "ip -br link; tc qdisc; tc filter show dev eth0 parent ffff:")
    assert f"{card.tap}" in there
    assert ("redirect" in there.lower()) == (
        keys.get("model") not in (NO_MODEL, MACVTAP) or "receive" in keys
    )
    assert ("tbf" in there) == ("receive" in keys)
    if card.tap_fds:
        assert lab.sh("pod", f"ip -o link show {card.tap}").split("mtu ")[1].split()[0] == "1400"
    assert "inet6" not in lab.sh("pod", f"ip addr show {card.tap}"), "nobody but the guest talks there"
    assert [entry.kind for entry in undo.entries] == ["tap"]
    await endpoint.release()
    await endpoint.release()
    assert lab.traces() == ""
    assert undo.entries == []
    assert _fds() == before


@pytest.mark.parametrize("keys", VARIANTS)
async def test_released_by_the_journal_alone(lab: NetLab, tmp_path: Path, keys: dict[str, Any]) -> None:
    """As `delete` does it after a crash; again it does nothing."""
    journal = Journal.create(str(tmp_path), Identity("/c.sock", "n", "s"))
    endpoint = _endpoint(lab, journal, **keys)
    await endpoint.make()
    await endpoint.join()
    endpoint.handed_over()
    (record,) = load(str(tmp_path)).records
    release(record)
    assert lab.traces() == ""
    release(record)


async def test_a_namespace_that_is_gone_is_fine(lab: NetLab, tmp_path: Path) -> None:
    """As is another one at the same path."""
    journal = Journal.create(str(tmp_path), Identity("/c.sock", "n", "s"))
    endpoint = _endpoint(lab, journal)
    await endpoint.make()
    await endpoint.join()
    endpoint.handed_over()
    (record,) = load(str(tmp_path)).records
    release(Record(1, "tap", {**record.facts, "netns": "/proc/self/nowhere"}))
    release(Record(1, "tap", {**record.facts, "namespace": "1:2"}))
    assert "ingress" in lab.traces()
    release(record)


async def test_another_ones_qdisc_is_left_alone(lab: NetLab) -> None:
    """What arrives at the link is somebody else's matter already."""
    lab.sh("pod", "tc qdisc add dev eth0 ingress")
    undo = MemoryUndo()
    endpoint = _endpoint(lab, undo)
    await endpoint.make()
    with pytest.raises(HostError, match="link eth0 has a qdisc ingress already"):
        await endpoint.join()
    await endpoint.release()
    assert lab.traces().startswith("qdisc ingress ffff: dev eth0")
    assert lab.traces().count("\n") == 0
    assert undo.entries == []


async def test_a_tap_that_exists_is_never_taken_over(lab: NetLab) -> None:
    lab.sh("pod", "ip tuntap add tap0_kata mode tap")
    undo = MemoryUndo()
    with pytest.raises(HostError, match="there is a device tap0_kata in the pod's network namespace"):
        await _endpoint(lab, undo).make()
    assert undo.entries == []
    assert lab.traces() == "tap0_kata"


async def test_a_macvtap_has_no_name_to_open(lab: NetLab) -> None:
    with pytest.raises(HostError, match="by its name, which a macvtap has not"):
        await _endpoint(lab, MemoryUndo(), by_name=True, model=MACVTAP).make()
