"""What is sent to port 53 of an address goes elsewhere, by UDP and TCP, and nothing else does: real rules."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import pytest

from agent.network.redirect import redirect
from tests.netlab import NetLab


@pytest.fixture
def lab() -> Iterator[NetLab]:
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    with NetLab() as made:
        yield made


def _asked(address: str, port: int) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.connect((address, port))
        client.send(b"question")
        return client.recv(100)


def _both_ways(lab_address: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, socket.socket() as tcp:
        udp.bind(("127.0.0.1", 0))
        port = udp.getsockname()[1]
        tcp.bind(("127.0.0.1", port))
        tcp.listen()
        redirect([(lab_address, 1)])
        redirect([(lab_address, port)])  # instead
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(10)
            client.connect((lab_address, 53))
            client.send(b"question")
            udp.settimeout(10)
            question, peer = udp.recvfrom(100)
            udp.sendto(question[::-1], peer)
            assert client.recv(100) == b"noitseuq", "it comes from whom was asked"
        with socket.create_connection((lab_address, 53), 10) as asking:
            assert asking.getpeername() == (lab_address, 53)
        for other in (("127.0.0.12", 53), (lab_address, 54)):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(other, 10)
            with pytest.raises(ConnectionRefusedError):
                _asked(*other)
        with socket.create_server(("0.0.0.0", 53)), pytest.raises(ConnectionRefusedError):
            socket.create_connection((lab_address, 54), 10)  # and there can be such a server


def test_one_address_leads_elsewhere(lab: NetLab) -> None:
    try:
        lab.inside("pod", lambda: _both_ways("127.0.0.11"))
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT}:
            pytest.skip("this kernel has no nftables")
        raise


def test_what_is_no_address_changes_nothing(lab: NetLab) -> None:
    with pytest.raises(OSError, match="illegal IP address"):
        lab.inside("pod", lambda: redirect([("no address", 1)]))
