"""A sandbox is containerd's address, namespace and id together, and its places are named after all three."""

from __future__ import annotations

import itertools
import os

import pytest

from shim.state import bundle
from shim.state.identity import Identity, is_key, key_of_socket

ADDRESS = "/run/containerd/containerd.sock"


def test_each_of_the_three_makes_another_sandbox() -> None:
    """No place of one is another's."""
    parts = itertools.product((ADDRESS, "/run/second.sock"), ("a", "b"), ("twin", "twin2"))
    all_of_them = [Identity(*part) for part in parts]

    assert len(set(all_of_them)) == 8
    for place in ("key", "state_dir", "share_dir"):
        assert len({getattr(each, place) for each in all_of_them}) == 8
    assert Identity(ADDRESS, "a", "twin") == all_of_them[0]
    assert Identity("/run//containerd/containerd.sock", "a", "twin") == all_of_them[0]  # as the socket's name
    assert Identity(ADDRESS, "a", "twin") != "twin"


def test_the_key_is_the_beginning_of_the_sockets_name() -> None:
    """So that one is found by the other."""
    identity = Identity(ADDRESS, "k8s.io", "pod-1")

    assert identity.key == key_of_socket(bundle.socket_path(ADDRESS, "k8s.io", "pod-1"))
    assert is_key(identity.key)


@pytest.mark.parametrize("name", ["", "firecracker", "0" * 31, "0" * 33, "A" * 32, "../" + "0" * 29])
def test_what_is_no_key(name: str) -> None:
    """Other things lie beside the state directories."""
    assert not is_key(name)


def test_sockets_fit_below_a_state_directory() -> None:
    """The longest name below one, and the longest id: 107 bytes are a socket's limit."""
    identity = Identity(ADDRESS, "n" * 128, "i" * 128)

    assert len(os.path.join("/run/kata-shim", identity.key, "x" * 40)) < 107


def test_messages_say_whose_it_is() -> None:
    """Namespace and id as kata-ctl takes them, and the containerd."""
    assert str(Identity(ADDRESS, "a", "twin")) == f"a/twin of the containerd at {ADDRESS}"
