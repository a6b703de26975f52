"""What the vsock daemon is told: no guest can send a packet that it does not read whole."""

from __future__ import annotations

from agent.vsock import PACKET
from devices.vsock_daemon import _arguments


def _granted(*, ours: bool) -> int:
    words = _arguments("/d", "/run/vhost", "/run/uds", ours=ours)
    return int(words[words.index("--tx-buffer-size") + 1])


def test_an_agent_that_may_send_large_packets_has_room_for_a_small_one() -> None:
    assert _granted(ours=False) == PACKET < 32 << 10


def test_ours_sends_small_ones_and_may_have_several_on_the_way() -> None:
    assert _granted(ours=True) == 4 * PACKET
