"""A pod's network works in its VM as CNI made it, both ways, and nothing of it stays behind."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shim.resources.network.netns import inside
from testing import leaks
from testing.containerd import KATA, Containerd
from testing.guest import Value, write_configuration
from testing.images import busybox_image
from tests.netlab import ECHO, GUEST4, HOST4, NetLab

from .conftest import BUSYBOX, CONTAINERD

pytestmark = pytest.mark.kata_only

Start = Callable[..., str]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    """A containerd in a network of its own, in which `ctr --cni` may do what it likes."""
    archive = tmp_path_factory.mktemp("images") / "busybox.tar"
    busybox_image(archive, BUSYBOX)
    with Containerd(debug=True, version=CONTAINERD, cni=True) as daemon:
        daemon.ctr("image", "import", str(archive))
        yield daemon


@pytest.fixture
def lab() -> Iterator[NetLab]:
    """The namespaces of a pod and its host."""
    with NetLab() as made:
        yield made


@pytest.fixture
def start(plain: Containerd, lab: NetLab, tmp_path: Path) -> Iterator[Start]:
    """Run the echo in the lab's pod, with these keys of the configuration; the container's name."""
    names = []

    def _start(**overrides: dict[str, Value | None]) -> str:
        configuration = write_configuration(
            tmp_path / "configuration.toml",
            {section.replace("__", "."): keys for section, keys in overrides.items()},
        )
        name = plain.new_id("net")
        names.append(name)
        options = ("--with-ns", f"network:{lab.pod}", "--runtime-config-path", str(configuration))
        plain.ctr("run", "--detach", "--runtime", KATA, *options, BUSYBOX, name, *ECHO)
        return name

    yield _start
    for name in names:
        plain.remove(name)


def _sh(containerd: Containerd, name: str) -> Callable[[str], str]:
    """Runs a script in a container."""

    def run(script: str) -> str:
        exec_id = f"e{time.monotonic_ns()}"
        return containerd.ctr("task", "exec", "--exec-id", exec_id, name, "sh", "-c", script).text

    return run


def test_ctr_run_with_cni(plain: Containerd) -> None:
    """CNI makes the network after Create: its card is plugged into the running VM at Start."""
    name = plain.new_id("cni")
    try:
        plain.ctr("run", "--detach", "--cni", "--runtime", KATA, BUSYBOX, name, *ECHO)
        run = _sh(plain, name)
        address = run("ip -4 addr show eth0 | sed -n 's/.*inet \\([0-9.]*\\).*/\\1/p'")
        assert address.startswith("10.89.")
        assert " 0% packet loss" in run("ping -c 1 -W 20 10.89.0.1")
        assert " 0% packet loss" in run("ping -c 1 -W 20 fd00:89::1")
        host = os.open(f"/proc/{plain.pid}/ns/net", os.O_RDONLY)
        try:
            with inside(host, socket.socket) as client:
                client.settimeout(60)
                client.connect((address, 7))
                client.sendall(b"hello")
                client.shutdown(socket.SHUT_WR)
                assert client.recv(100) == b"hello"
        finally:
            os.close(host)
    finally:
        plain.remove(name)
    assert _unsettled(plain, name) == []


def test_a_network_that_was_there_before(plain: Containerd, start: Start, lab: NetLab) -> None:
    """Addresses, routes, neighbours, MTU and MAC address are the pod's; nothing of ours stays in it."""
    mac = lab.sh("pod", "ip -br link show eth0").split()[2]
    run = _sh(plain, start())
    lab.speaks(run)
    shown = run("ip addr show eth0; ip route; ip -6 route; ip neigh")
    assert f"link/ether {mac}" in shown
    assert "mtu 1400" in shown
    assert f"inet {GUEST4}/24" in shown
    assert f"default via {HOST4} dev eth0" in shown
    assert f"198.51.100.0/24 via {HOST4} dev eth0  src {GUEST4}" in shown
    assert "default via fd00:199::1 dev eth0" in shown
    assert "10.199.0.77 dev eth0 lladdr 02:00:00:00:00:77" in shown
    assert "ingress" in lab.traces()
    assert "tap0_kata" in lab.traces()
    plain.remove(plain.ids[-1])
    assert lab.traces() == ""


def _unsettled(containerd: Containerd, name: str) -> list[str]:
    """What the host still has of a container that has gone."""
    paths = [f"/run/kata/{name}", f"/run/kata-containers/shared/sandboxes/{name}"]
    mounts = [mount for mount in leaks.mounts_below("/run/kata-containers") if name in mount]
    processes = [str(one) for one in leaks.own_processes(containerd.tag, "") if name in one.argv]
    return [path for path in paths if os.path.lexists(path)] + mounts + processes
