"""The file of a directly attachable network: Kata's form, read strictly and bounded."""

from __future__ import annotations

import copy
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.errors import HostError
from shim.resources.network.dan import read

GOOD: dict[str, Any] = {
    "netns": "/run/netns/pod",
    "devices": [
        {
            "name": "eth0",
            "guest_mac": "02:00:00:00:00:07",
            "device": {"type": "vhost-user", "path": "/run/s", "queue_num": 2, "queue_size": 512},
            "network_info": {
                "interface": {"ip_addresses": ["10.0.0.2/24", "fd00::2/64"], "mtu": 1400, "ntype": "tuntap"},
                "routes": [{"dest": "0.0.0.0/0", "gateway": "10.0.0.1"}, {"dest": "fd01::/64", "mtu": 1300}],
                "neighbors": [{"ip_address": "10.0.0.1/24", "hardware_addr": "02:00:00:00:00:01"}],
            },
        },
        {
            "name": "eth1",
            "device": {"type": "host-tap", "tap_name": "tap7"},
            "network_info": {"interface": {"ip_addresses": []}},
        },
    ],
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], str]:
    def _write(value: Any) -> str:
        path = tmp_path / "s.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return str(path)

    return _write


def test_katas_form_is_read(write: Callable[[Any], str]) -> None:
    dan = read(write(GOOD))
    assert dan is not None
    assert dan.netns == "/run/netns/pod"
    first, second = dan.cards
    assert (first.socket, first.queues, first.queue_size) == ("/run/s", 2, 512)
    assert (first.link.name, first.link.mac, first.link.mtu) == ("eth0", "02:00:00:00:00:07", 1400)
    assert [(one.family, one.address, one.prefix) for one in first.link.addresses] == [
        (socket.AF_INET, "10.0.0.2", 24),
        (socket.AF_INET6, "fd00::2", 64),
    ]
    assert [(one.destination, one.hops[0].gateway, one.hops[0].link) for one in dan.routes] == [
        ("", "10.0.0.1", "eth0"),
        ("fd01::/64", "", "eth0"),
    ]
    assert [(one.address, one.mac) for one in dan.neighbors] == [("10.0.0.1", "02:00:00:00:00:01")]
    assert (second.tap, second.queues, second.queue_size, second.link.mtu) == ("tap7", 0, 256, 1500)
    # One that nobody gave an address gets one of its own.
    assert re.fullmatch(r"02(:[0-9a-f]{2}){5}", second.link.mac)


def test_without_a_file_there_is_none(tmp_path: Path) -> None:
    assert read(str(tmp_path / "s.json")) is None


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(top: dict[str, Any]) -> None:
        at: Any = top
        *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
        for step in steps:
            at = at[step]
        if value is None:
            del at[last]
        else:
            at[last] = value

    return change


FIRST = "devices.0"
INFO = f"{FIRST}.network_info"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("devices", None), "devices is missing"),
        (_set("devices", {}), "devices must be a list"),
        (_set("devices", [{}] * 33), "devices has more than 32 entries"),
        (_set(FIRST, "x"), "devices[0] must be an object"),
        (_set(f"{FIRST}.name", "eth0/../x"), "devices[0].name cannot be"),
        (_set("devices.1.name", "eth0"), "two cards are called eth0"),
        (_set(f"{FIRST}.guest_mac", "xx:xx"), "devices[0].guest_mac cannot be 'xx:xx'"),
        (_set(f"{FIRST}.device.type", "vfio"), "devices[0].device.type 'vfio' is not supported"),
        (_set(f"{FIRST}.device.path", "run/s"), "devices[0].device.path must be an absolute path"),
        (_set(f"{FIRST}.device.queue_size", 300), "must be a power of two from 256 to 1024"),
        (_set(f"{FIRST}.device.queue_num", 257), "devices[0].device.queue_num must be from 0 to 256"),
        (_set(f"{FIRST}.device.queue_num", True), "devices[0].device.queue_num must be a whole number"),
        (_set(f"{INFO}.interface.mtu", 10), "mtu must be from 68 to 65535"),
        (_set(f"{INFO}.interface.ip_addresses.0", "10.0.0.300/24"), "ip_addresses[0] cannot be"),
        (_set(f"{INFO}.interface.ip_addresses.0", 7), "ip_addresses[0] must be a text"),
        (_set(f"{INFO}.routes.0", {}), "routes[0] needs addresses of one family"),
        (_set(f"{INFO}.routes.0.gateway", "fd00::1"), "routes[0] needs addresses of one family"),
        (_set(f"{INFO}.neighbors.0.state", 2), "neighbors[0].state must be 0 or 128"),
        (_set("devices.1.device.tap_name", "a b"), "devices[1].device.tap_name cannot be 'a b'"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(
    write: Callable[[Any], str], change: Callable[[dict[str, Any]], None], said: str
) -> None:
    value = copy.deepcopy(GOOD)
    change(value)
    with pytest.raises(HostError, match=re.escape(said)) as caught:
        read(write(value))
    assert "s.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"devices": [], "devices": []}'])
def test_what_is_no_such_file_is_refused(write: Callable[[Any], str], text: str) -> None:
    with pytest.raises(HostError, match="is no description of a network"):
        read(write(text))


@pytest.mark.timeout(30)
def test_what_is_no_file_or_too_large_is_not_read(write: Callable[[Any], str], tmp_path: Path) -> None:
    with pytest.raises(HostError, match="more than 1048576 bytes"):
        read(write("{}" + " " * (1 << 20)))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(HostError, match="it is no regular file"):
        read(str(tmp_path / "fifo"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["devices", "name", "device", "type", "network_info", "interface", "ip_addresses"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_whatever_it_holds_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(value))
    try:
        read(str(path))
    except HostError as error:
        assert "any.json" in str(error)
