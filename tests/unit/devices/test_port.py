"""A port of virtio-serial gives its one stream once, and ends it for both."""

from __future__ import annotations

import os
import socket

import pytest

from devices.errors import GuestError, HypervisorError
from devices.port import PortChannel


async def test_the_stream_is_given_once() -> None:
    channel, theirs = PortChannel.pair()
    with socket.socket(fileno=theirs) as vmm:
        assert channel.home_port == 0
        await channel.wait_ready(1)
        ours, port = await channel.connect(1024, 1)
        assert port == 0
        ours.send(b"to the guest")
        assert vmm.recv(100) == b"to the guest"
        with pytest.raises(GuestError, match="only connection is taken"):
            await channel.connect(1024, 1)
        with pytest.raises(GuestError, match="no connections for streams"):
            await channel.open_stream(1)
        channel.hang_up()
        assert (vmm.recv(100), ours.recv(100)) == (b"", b"")
        ours.close()
        await channel.close()
        channel.hang_up()


async def test_a_dead_vm_fails_who_asks() -> None:
    channel, theirs = PortChannel.pair()
    channel.fail(lambda: HypervisorError("the VM is gone"))
    for asks in (channel.wait_ready(1), channel.connect(1024, 1)):
        with pytest.raises(HypervisorError, match="the VM is gone"):
            await asks
    await channel.close()
    await channel.close()
    os.close(theirs)
