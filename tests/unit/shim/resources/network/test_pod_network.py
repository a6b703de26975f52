"""A sandbox's network: cards before the start, cards that come and go later, and nothing left of any."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from devices.config import DeviceConfig, NetworkConfig
from devices.errors import GuestError, HostError, HypervisorError, UnsupportedByHypervisor
from devices.kinds import YES, Kind, Support
from devices.manager import DeviceManager
from devices.undo import MemoryUndo
from hypervisors.base import Capabilities
from shim.resources.network.pod import PodNetwork
from shim.resources.network.settings import NetworkSettings, network_settings
from shim.state.trace import Trace
from tests.netlab import GUEST4, NetLab

ALL = Support(cold=YES, hot=YES, unplug=YES)


class _Hypervisor:
    """Keeps the cards that it is given."""

    def __init__(self) -> None:
        self.support = ALL
        self.cards: dict[str, NetworkConfig] = {}
        self.fds: dict[str, list[int]] = {}
        self.fails = False

    async def capabilities(self) -> Capabilities:
        return Capabilities(devices={Kind.NET: self.support})

    async def add_device(self, device: DeviceConfig) -> str:
        if self.fails:
            raise HypervisorError("no")
        assert isinstance(device, NetworkConfig)
        self.cards[device.id] = device
        self.fds[device.id] = [os.dup(fd) for fd in device.tap_fds]
        return f"02/{len(self.cards):02x}"

    async def remove_device(self, device_id: str) -> None:
        if self.support.unplug:
            raise UnsupportedByHypervisor("it", "unplug")
        del self.cards[device_id]
        for fd in self.fds.pop(device_id):
            os.close(fd)

    def stop(self) -> None:
        """What a VMM has taken over goes with it."""
        for fds in self.fds.values():
            for fd in fds:
                os.close(fd)
        self.fds.clear()


class _Agent:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.interfaces: list[Any] = []
        self.routes: list[Any] = []
        self.neighbors: list[Any] = []
        self.fails = False

    async def update_interface(self, interface: Any, beyond: Any) -> None:
        if self.fails:
            raise GuestError("no")
        self.interfaces.append(interface)

    async def update_routes(self, routes: Any, beyond: Any) -> None:
        self.routes = list(routes)

    async def add_arp_neighbors(self, neighbors: Any) -> None:
        self.neighbors = list(neighbors)


class Bench:
    """One network with all its stand-ins."""

    def __init__(self, settings: NetworkSettings) -> None:
        self.hypervisor, self.agent, self.undo = _Hypervisor(), _Agent(), MemoryUndo()
        self.trace = Trace("s")
        self.network = PodNetwork(
            settings,
            self.hypervisor,  # type: ignore[arg-type]
            DeviceManager(),
            self.undo,
            self.trace,
        )

    async def boot(self) -> str | None:
        path = await self.network.open()
        await self.network.plug()
        await self.network.join()
        await self.network.configure(self.agent)
        return path

    async def rescan(self) -> None:
        await self.network.rescan(self.agent)

    @property
    def told(self) -> list[tuple[str, str]]:
        return [(one.name, one.devicePath) for one in self.agent.interfaces]


def _fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest_asyncio.fixture
async def bench(lab: NetLab) -> AsyncIterator[Bench]:
    """Whatever the test does with it, nothing is left afterwards."""
    before = _fds()
    made = Bench(NetworkSettings(path=lab.pod))
    yield made
    made.hypervisor.stop()
    assert await made.network.close() == []
    assert await made.network.close() == []
    assert made.undo.entries == []
    assert lab.traces() == ""
    assert _fds() == before


async def test_cards_before_the_start(bench: Bench, lab: NetLab) -> None:
    assert await bench.boot() == lab.pod
    assert bench.told == [("eth0", "02/01")]
    assert len(bench.agent.routes) == 3
    assert len(bench.agent.neighbors) == 1
    assert "redirect" in lab.sh("pod", "tc filter show dev tap0_kata parent ffff:").lower()
    await bench.rescan()
    assert bench.told == [("eth0", "02/01")], "nothing new"


async def test_a_link_that_comes_and_goes(bench: Bench, lab: NetLab) -> None:
    """It is plugged, told with all routes, and unplugged, while the first one stays."""
    await bench.boot()
    lab.sh(
        "pod",
        "ip link add eth1 type veth peer name peer1 netns $$; ip addr add 192.0.2.2/24 dev eth1;"
        "ip link set eth1 up; ip link set peer1 up; ip route add 203.0.113.0/24 dev eth1",
    )
    await bench.rescan()
    assert bench.told == [("eth0", "02/01"), ("eth1", "02/02")]
    assert len(bench.agent.routes) == 4
    assert "ingress" in lab.sh("pod", "tc qdisc show dev eth1")
    lab.sh("pod", "ip link del eth1")
    await bench.rescan()
    assert list(bench.hypervisor.cards) == ["net0"]
    assert len(bench.undo.entries) == 1
    assert "tap1_kata" not in lab.traces()


async def _until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not done():  # noqa: ASYNC110  (of the kernel's and the network's doing)
            await asyncio.sleep(0.02)


async def test_what_changes_while_containers_run_is_followed(bench: Bench, lab: NetLab) -> None:
    """As `docker network connect` and `disconnect` do it, in whatever order and at whatever pace."""
    await bench.boot()
    bench.network.follow(lambda: bench.agent)
    bench.network.follow(lambda: bench.agent)
    lab.sh("pod", "ip link add eth1 type veth peer name peer1 netns $$; ip addr add 192.0.2.2/24 dev eth1")
    await _until(lambda: len(bench.told) == 2)
    assert bench.told == [("eth0", "02/01"), ("eth1", "02/02")]
    lab.sh("pod", "ip link set eth1 up; ip link set peer1 up; ip route add 203.0.113.0/24 dev eth1")
    await _until(lambda: len(bench.agent.routes) == 4)
    lab.sh("pod", "ip addr add 192.0.2.3/24 dev eth1")
    await _until(lambda: len(bench.told) == 3)
    assert [one.address for one in bench.agent.interfaces[-1].IPAddresses] == ["192.0.2.2", "192.0.2.3"]
    lab.sh("pod", "ip link del eth1")
    await _until(lambda: list(bench.hypervisor.cards) == ["net0"])
    await _until(lambda: len(bench.agent.routes) == 3)


async def test_a_change_that_cannot_be_followed_is_the_next_ones_matter(bench: Bench, lab: NetLab) -> None:
    await bench.boot()
    bench.agent.fails = True
    bench.network.follow(lambda: bench.agent)
    lab.sh("pod", "ip link add eth1 type veth peer name peer1; ip addr add 192.0.2.2/24 dev eth1")
    await _until(lambda: "net1" in bench.hypervisor.cards)
    bench.agent.fails = False
    lab.sh("pod", "ip link set peer1 up; ip link set eth1 up")
    await _until(lambda: ("eth1", "02/02") in bench.told)
    lab.sh("pod", "ip link del eth1")
    await _until(lambda: list(bench.hypervisor.cards) == ["net0"])


async def test_a_card_that_cannot_be_unplugged_stays_cut_off(bench: Bench, lab: NetLab) -> None:
    await bench.boot()
    bench.hypervisor.support = Support(cold=YES, hot=YES, unplug="no")
    lab.sh("pod", "ip link del eth0")
    await bench.rescan()
    assert list(bench.hypervisor.cards) == ["net0"]


async def test_a_link_without_an_address_is_waited_for(bench: Bench, lab: NetLab) -> None:
    """At the next start of a container it may have one."""
    lab.sh("pod", "ip addr flush dev eth0")
    await bench.boot()
    assert bench.told == []
    await bench.rescan()
    assert bench.told == []
    lab.sh("pod", f"ip addr add {GUEST4}/24 dev eth0")
    await bench.rescan()
    assert bench.told == [("eth0", "02/01")]


async def test_a_vmm_without_hotplug_says_so(bench: Bench, lab: NetLab) -> None:
    lab.sh("pod", "ip addr flush dev eth0")
    await bench.boot()
    bench.hypervisor.support = Support(cold=YES, hot="not later")
    lab.sh("pod", f"ip addr add {GUEST4}/24 dev eth0")
    with pytest.raises(UnsupportedByHypervisor, match=r"\(eth0\) came after the VM had started.*not later"):
        await bench.rescan()
    assert bench.undo.entries == []


async def test_a_vmm_without_cards_says_so(bench: Bench) -> None:
    bench.hypervisor.support = Support()
    with pytest.raises(UnsupportedByHypervisor, match="cold-plug of virtio-net"):
        await bench.boot()


@pytest.mark.parametrize("late", [False, True])
async def test_a_plug_that_fails_leaves_nothing(bench: Bench, lab: NetLab, late: bool) -> None:
    """And the next attempt works."""
    if late:
        lab.sh("pod", "ip addr flush dev eth0")
        await bench.boot()
        lab.sh("pod", f"ip addr add {GUEST4}/24 dev eth0")
    bench.hypervisor.fails = True
    with pytest.raises(HypervisorError):
        await (bench.rescan() if late else bench.boot())
    assert bench.undo.entries == []
    assert lab.traces() == ""
    bench.hypervisor.fails = False
    await bench.rescan()
    assert bench.told == [("eth0", "02/01")]


async def test_a_guest_that_was_not_told_is_told_at_the_next_start(bench: Bench) -> None:
    bench.agent.fails = True
    with pytest.raises(GuestError):
        await bench.boot()
    bench.agent.fails = False
    await bench.rescan()
    assert bench.told == [("eth0", "02/01")]


async def test_stopped_while_it_looks(bench: Bench) -> None:
    """Nobody waits for the scan; it is ended, and heard out."""
    await bench.network.open()
    await asyncio.sleep(0)


async def test_a_namespace_of_its_own() -> None:
    before = _fds()
    bench = Bench(NetworkSettings(own=True))
    path = await bench.boot()
    assert path is not None
    assert os.stat(path).st_ino != os.stat("/proc/self/ns/net").st_ino
    await bench.rescan()
    assert bench.told == []
    assert await bench.network.close() == []
    assert _fds() == before


async def test_the_hosts_network_is_not_joined_to_a_vm() -> None:
    bench = Bench(NetworkSettings(path="/proc/self/ns/net"))
    assert await bench.boot() is None
    await bench.rescan()
    assert bench.told == []
    assert await bench.network.close() == []


@pytest.mark.parametrize("path", ["/proc/{pid}/ns/net", "/proc/{pid}/task/{pid}/ns/net", "{link}/net"])
async def test_a_process_own_network_is_not_taken_away(lab: NetLab, tmp_path: Path, path: str) -> None:
    """`docker run --network container:ID`: that container would lose all that arrives for it."""
    (tmp_path / "ns").symlink_to(f"/proc/{lab.pod_pid}/ns")
    path = path.format(pid=lab.pod_pid, link=tmp_path / "ns")
    before, fds = lab.traces(), _fds()
    bench = Bench(NetworkSettings(path=path))
    with pytest.raises(HostError, match=rf"is process {lab.pod_pid}'s \(.+\): a VM cannot share") as caught:
        await bench.boot()
    assert "--network NAME" in str(caught.value)
    assert await bench.network.close() == []
    assert (lab.traces(), _fds()) == (before, fds)


async def test_a_path_that_leads_nowhere() -> None:
    bench = Bench(NetworkSettings(path="/run/netns/nowhere"))
    with pytest.raises(HostError, match="/run/netns/nowhere cannot be opened"):
        await bench.boot()
    assert await bench.network.close() == []


async def test_a_vm_of_somebody_elses_gets_the_path_and_no_cards(lab: NetLab) -> None:
    """Whoever makes it takes the network from there; nothing of the namespace is touched, now or later."""
    before = _fds()
    bench = Bench(NetworkSettings(path=lab.pod, hosted=True))
    bench.hypervisor.support = Support()
    assert await bench.boot() == lab.pod
    await bench.rescan()
    bench.network.follow(lambda: bench.agent)
    assert (bench.hypervisor.cards, bench.agent.interfaces, bench.undo.entries) == ({}, [], [])
    assert await bench.network.close() == []
    assert _fds() == before


@pytest.mark.parametrize(
    ("namespaces", "path", "own"),
    [
        ([], "", False),
        ([{"type": "pid"}], "", False),
        ([{"type": "network"}], "", True),
        ([{"type": "network", "path": "/run/netns/x"}], "/run/netns/x", False),
    ],
)
def test_what_the_spec_says(namespaces: list[Any], path: str, own: bool) -> None:
    from hypervisors.config import HypervisorConfig
    from hypervisors.firecracker.config import FirecrackerConfig
    from hypervisors.remote.config import RemoteConfig
    from shim.config.schema import RuntimeConfig

    spec = {"linux": {"namespaces": namespaces}}
    keys = HypervisorConfig(network_queues=3, disable_vhost_net=True, rx_rate_limiter_max_rate=9000)
    runtime = RuntimeConfig(internetworking_model="macvtap")
    assert network_settings(runtime, keys, spec) == NetworkSettings(
        path=path, own=own, model="macvtap", queues=3, vhost=False, receive=9000
    )
    jailed = network_settings(RuntimeConfig(), FirecrackerConfig(jailer_uid=5, jailer_gid=6), spec)
    assert jailed == NetworkSettings(path=path, own=own), "its limits are the VMM's matter"
    runtime = RuntimeConfig(internetworking_model="none", disable_new_netns=True, dan_conf="/dans")
    assert network_settings(runtime, keys, spec, "s") == NetworkSettings(dan="/dans/s.json")
    hosted = network_settings(runtime, RemoteConfig(), spec)
    assert hosted == NetworkSettings(path=path, own=own, hosted=True), "its maker is told in any case"
