"""The pod's network settings are written to the guest's network, and to nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.sysctl import apply, take_network
from ttrpc import Code, RpcError


def test_only_those_of_the_network_are_taken() -> None:
    linux = {"sysctl": {"net.core.somaxconn": "7", "kernel.msgmax": "8", "netx.y": "9"}}

    assert take_network(linux) == {"net/core/somaxconn": "7"}
    assert linux == {"sysctl": {"kernel.msgmax": "8", "netx.y": "9"}}
    assert take_network({}) == {}


@pytest.mark.parametrize("name", ["net.ipv4.conf.eth0/100.forwarding", "net/ipv4/conf/eth0.100/forwarding"])
def test_both_ways_to_write_a_name(name: str) -> None:
    assert take_network({"sysctl": {name: "1"}}) == {"net/ipv4/conf/eth0.100/forwarding": "1"}


@pytest.mark.parametrize(
    "name", ["net/../kernel/core_pattern", "net.", "net..x", "net.//.kernel", "net/./x", "net.a\0b", "net/"]
)
def test_names_that_lead_elsewhere(name: str) -> None:
    with pytest.raises(RpcError) as caught:
        take_network({"sysctl": {name: "1"}})

    assert caught.value.code == Code.INVALID_ARGUMENT


def test_apply(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "x").write_text("0")
    apply({"net/x": "20000 20099"}, str(tmp_path))

    assert (tmp_path / "net" / "x").read_text() == "20000 20099"


def test_what_the_kernel_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(RpcError, match=r"sysctl net\.no\.such = '1': No such file") as caught:
        apply({"net/no/such": "1"}, str(tmp_path))

    assert caught.value.code == Code.INVALID_ARGUMENT
