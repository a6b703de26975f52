"""A pod's network works in its VM as CNI made it, both ways, and nothing of it stays behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shim.resources.network.netns import inside
from testing import leaks
from testing.api import Api
from testing.containerd import KATA, Containerd, CtrError
from testing.cri import Cri, Pod
from testing.guest import Value, write_configuration
from testing.images import busybox_image
from tests.netlab import ECHO, GUEST4, HOST4, NetLab

from .conftest import BUSYBOX, CONTAINERD, CRI_BUSYBOX
from .test_pods import left_of

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
def lab(request: pytest.FixtureRequest) -> Iterator[NetLab]:
    """The namespaces of a pod and its host."""
    with NetLab(macvlan=getattr(request, "param", False)) as made:
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
        plain.ctr("run", "--detach", "--runtime", KATA, *options, BUSYBOX, name, *ECHO, timeout=180)
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


def test_routes_rules_and_modules(plain: Containerd, start: Start, lab: NetLab) -> None:
    """Of two default routes the one with the lower metric counts; further tables, rules, ways and peers are
    there. A module that the configuration names is loaded before the network comes."""
    lab.sh(
        "pod",
        f"ip route replace default via {HOST4} metric 10; ip route del default metric 0 || true;"
        "ip route add default via 10.199.0.9 metric 200;"
        "ip -6 route add default via fd00:199::9 metric 2000;"
        f"ip route add 192.0.2.0/24 via {HOST4} table 1000 mtu 1300; ip rule add from {GUEST4} lookup 1000;"
        f"ip route add 203.0.113.0/24 nexthop via {HOST4} weight 2 nexthop via 10.199.0.9;"
        "ip route add blackhole 198.18.0.0/15; ip addr add 10.7.0.1 peer 10.7.0.2/32 dev eth0",
    )
    run = _sh(plain, start(agent__kata={"kernel_modules": ["dummy numdummies=2"]}))
    shown = run("ip route; ip route show table 1000; ip rule; ip -6 route; ip addr; ip route get 8.8.8.8")

    assert f"default via {HOST4} dev eth0  metric 10" in shown
    assert "default via 10.199.0.9 dev eth0  metric 200" in shown
    assert "default via fd00:199::9 dev eth0  metric 2000" in shown
    assert f"192.0.2.0/24 via {HOST4} dev eth0" in shown
    assert f"from {GUEST4} lookup 1000" in shown
    assert "203.0.113.0/24" in shown
    assert "198.18.0.0/15" in shown
    assert "10.7.0.1 peer 10.7.0.2/32" in shown
    assert "dummy1" in shown
    assert f"8.8.8.8 via {HOST4}" in shown


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


def _localhost(lab: NetLab, port: int, text: bytes) -> bytes:
    """What the guest answers whoever dials localhost in the pod's namespace, as containerd does for
    `kubectl port-forward`: sent while it is read, with a half-close. Raises OSError."""
    with lab.inside("pod", socket.socket) as client:
        client.settimeout(60)
        client.connect(("127.0.0.1", port))

        def send() -> None:
            client.sendall(text)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        found = bytearray()
        while piece := client.recv(1 << 16):
            found += piece
        sender.join()
        return bytes(found)


def _refused(lab: NetLab, port: int) -> bool:
    try:
        _localhost(lab, port, b"hello")
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        pass  # the guest's went since we looked
    return False


def test_localhost_of_the_pod_is_the_guests(plain: Containerd, start: Start, lab: NetLab) -> None:
    """A port that the guest listens at is there, others are refused; with the container all of it goes."""
    run = _sh(plain, start())
    text = os.urandom(1 << 20)
    _wait(lambda: not _refused(lab, 7), 60)
    assert _localhost(lab, 7, text) == text
    assert _refused(lab, 8)

    run("nc -ll -p 8 -e /bin/cat </dev/null >/dev/null 2>&1 & echo $! > /tmp/pid")
    _wait(lambda: not _refused(lab, 8), 60)
    assert _localhost(lab, 8, text) == text
    run("kill $(cat /tmp/pid)")
    _wait(lambda: _refused(lab, 8), 60)
    assert _localhost(lab, 7, b"still") == b"still"

    plain.remove(plain.ids[-1])
    assert _refused(lab, 7)
    assert len(lab.sh("pod", "cat /proc/net/tcp /proc/net/tcp6 | grep -v ' 06 '").splitlines()) == 2


NAMES = r"""
import socket, struct, sys, threading

def answer(question):
    end = question.index(b"\0", 12) + 5
    record = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 60, 4) + socket.inet_aton("192.0.2.7")
    kind = question[end - 4:end - 2]
    found = record if kind == b"\0\1" else b""
    head = question[:2] + b"\x81\x80" + struct.pack("!HHHH", 1, 1 if found else 0, 0, 0)
    return head + question[12:end] + found

udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("127.0.0.11", 53))
tcp = socket.create_server(("127.0.0.11", 53))

def connections():
    while True:
        connection, _ = tcp.accept()
        with connection:
            head = connection.recv(2)
            if head:
                said = answer(connection.recv(struct.unpack("!H", head)[0]))
                connection.sendall(struct.pack("!H", len(said)) + said)

threading.Thread(target=connections, daemon=True).start()
print("here", flush=True)
while True:
    question, peer = udp.recvfrom(65535)
    udp.sendto(answer(question), peer)
"""
"""A name server of the pod's namespace, as Docker has one in each: every name is 192.0.2.7."""


def test_a_name_server_of_the_namespaces_loopback(plain: Containerd, lab: NetLab, tmp_path: Path) -> None:
    """What resolv.conf names is asked by UDP and TCP; no other address leads out of the guest; and a server
    of the pod's own can still listen at port 53."""
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text("nameserver 127.0.0.11\n")
    name = plain.new_id("names")
    mount = f"type=bind,src={resolv_conf},dst=/etc/resolv.conf,options=rbind:ro"
    options = ("--with-ns", f"network:{lab.pod}", "--mount", mount)
    argv = ["nsenter", f"--net={lab.pod}", sys.executable, "-c", NAMES]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"here\n"
            plain.ctr("run", "--detach", "--runtime", KATA, *options, BUSYBOX, name, *ECHO, timeout=180)
            run = _sh(plain, name)
            assert "192.0.2.7" in run("nslookup web.example")
            question = b"\x12\x34\1\0\0\1\0\0\0\0\0\0\3web\0\0\1\0\1"
            asked = "".join(f"\\{byte:03o}" for byte in struct.pack("!H", len(question)) + question)
            answer = run(f"{{ printf '{asked}'; sleep 1; }} | nc 127.0.0.11 53 | hexdump -ve '1/1 \"%02x\"'")
            assert answer.endswith("c0000207"), answer
            assert "refused" in run("nc 127.0.0.12 53 </dev/null 2>&1; true")
            run("nc -ll -p 53 -e /bin/cat </dev/null >/dev/null 2>&1 &")
            _wait(lambda: not _refused(lab, 53), 60)
            assert _localhost(lab, 53, b"the pod's own") == b"the pod's own"
            assert "192.0.2.7" in run("nslookup db.example")
        finally:
            server.kill()
            plain.remove(name)
    assert _unsettled(plain, name) == []


def test_as_many_routes_as_a_guest_is_told(
    plain: Containerd, start: Start, lab: NetLab, tmp_path: Path
) -> None:
    """A thousand are in the guest; ten thousand are refused by their number, and nothing is left."""

    def add(numbers: range) -> None:
        lines = [f"route add 20.{n >> 8}.{n & 255}.0/24 via {HOST4}\n" for n in numbers]
        (tmp_path / "batch").write_text("".join(lines))
        lab.sh("pod", f"ip -batch {tmp_path}/batch")

    add(range(1000))
    run = _sh(plain, start())
    assert run("ip route | grep -c '^20\\.'") == "1000"
    lab.speaks(run)
    plain.remove(plain.ids[-1])
    add(range(1000, 10_000))
    with pytest.raises(CtrError, match="the pod's network has more than 1024 routes"):
        start()
    assert _unsettled(plain, plain.ids[-1]) == []


def _unsettled(containerd: Containerd, name: str) -> list[str]:
    """What the host still has of a container that has gone."""
    paths = [f"/run/kata/{name}", str(containerd.state_dir(name)), str(containerd.share_dir(name))]
    key = containerd.key(name)
    mounts = [mount for mount in leaks.mounts_below("/run/kata-containers") if key in mount]
    processes = [str(one) for one in containerd.processes() if name in one.argv]
    return [path for path in paths if os.path.lexists(path)] + mounts + processes


@pytest.mark.parametrize(
    ("lab", "variant"),
    [(False, "macvtap"), (False, "two queues"), (False, "microvm"), (True, "macvlan")],
    indirect=["lab"],
)
def test_other_models_and_machines(start: Start, plain: Containerd, lab: NetLab, variant: str) -> None:
    """A macvtap instead of filters, several queues, a machine without PCI, another kind of link."""
    overrides: dict[str, dict[str, dict[str, Value | None]]] = {
        "macvtap": {"runtime": {"internetworking_model": "macvtap"}},
        "two queues": {"hypervisor__qemu": {"network_queues": 2, "default_vcpus": 2}},
        "microvm": {"hypervisor__qemu": {"machine_type": "microvm"}},
        "macvlan": {},
    }
    name = start(**overrides[variant])
    run = _sh(plain, name)
    lab.speaks(run)
    if variant == "two queues":
        assert run("ls /sys/class/net/eth0/queues").split() == ["rx-0", "rx-1", "tx-0", "tx-1"]
    if variant == "macvtap":
        assert "macvtap0_kata" in lab.traces()
        assert "ingress" not in lab.traces()
    plain.remove(name)
    assert lab.traces() == ""


@pytest.mark.parametrize("model", ["tcfilter", "macvtap"])
def test_rates_are_limited(start: Start, plain: Containerd, lab: NetLab, model: str) -> None:
    """Neither way is faster than it may be: what came, less what may come at once, in the time it took."""
    rate, size, burst = 8_000_000, 1_200_000, 200_000  # bits a second, bytes, bytes
    limits: dict[str, Value | None] = {"rx_rate_limiter_max_rate": rate, "tx_rate_limiter_max_rate": rate}
    name = start(hypervisor__qemu=limits, runtime={"internetworking_model": model})
    run = _sh(plain, name)
    least = (size - burst) * 8 / rate

    with lab.listening(HOST4) as server:
        port = server.getsockname()[1]
        run(f"head -c {size} /dev/zero | nc {HOST4} {port} >/dev/null 2>&1 &")
        connection, _ = server.accept()
        with connection:
            begin = time.monotonic()
            received = 0
            while received < size:
                received += len(connection.recv(1 << 16))
            assert time.monotonic() - begin >= least

    begin = time.monotonic()
    assert len(lab.echoes(GUEST4, bytes(size), timeout=60)) == size
    assert time.monotonic() - begin >= least


def test_killed_with_its_pod_it_leaves_nothing(start: Start, plain: Containerd, lab: NetLab) -> None:
    """After kill -9 of the shim `delete` finds taps and qdiscs by the journal alone."""
    name = start()
    assert "tap0_kata" in lab.traces()
    os.kill(_shim_of(plain, name), signal.SIGKILL)
    plain.remove(name)
    _wait(lambda: not _unsettled(plain, name) and not lab.traces())
    assert lab.sh("pod", "ip -br link show eth0")


def test_killed_while_it_boots_it_leaves_nothing(plain: Containerd, lab: NetLab) -> None:
    """kill -9 between the making of the tap and the end of the start."""
    name = plain.new_id("boot")
    options = ("--with-ns", f"network:{lab.pod}")
    argv = plain.ctr_argv("run", "--runtime", KATA, *options, BUSYBOX, name, "true")
    with subprocess.Popen(
        argv, env=plain.environment, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as ctr:
        _wait(lambda: "tap0_kata" in lab.traces(), 60)
        os.kill(_shim_of(plain, name), signal.SIGKILL)
        assert ctr.wait(60)
    plain.remove(name)
    _wait(lambda: not _unsettled(plain, name) and not lab.traces())


def _shim_of(containerd: Containerd, name: str) -> int:
    """The daemon. A child of its has the same arguments until it is another program."""
    found = [
        one.pid
        for one in containerd.processes()
        if name in one.argv and any("containerd-shim-kata-v2" in word for word in one.argv)
    ]
    (pid,) = [each for each in found if _parent(each) not in found]
    return pid


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except FileNotFoundError:  # it was such a child
        return pid


def test_a_namespace_whose_path_has_gone(start: Start, plain: Containerd, lab: NetLab) -> None:
    """Whoever made the pod's namespace may let go of it first."""
    name = start()
    lab.drop("pod")
    plain.remove(name)
    assert _unsettled(plain, name) == []


@pytest.mark.parametrize("why", ["kind", "qdisc"])
def test_what_cannot_be_joined_is_named_and_undone(
    start: Start, plain: Containerd, lab: NetLab, why: str
) -> None:
    """The second link fails; nothing is left of the first."""
    if why == "kind":
        lab.sh("pod", "ip link add eth1 type bridge; ip addr add 192.0.2.1/24 dev eth1")
        expected = "the pod's link eth1 is of kind 'bridge', which cannot be joined to a VM"
    else:
        lab.sh(
            "pod",
            "ip link add eth1 type veth peer name eth2; ip addr add 192.0.2.1/24 dev eth1;"
            "tc qdisc add dev eth1 ingress",
        )
        expected = "the pod's link eth1 has a qdisc ingress already"
    before = lab.traces()
    with pytest.raises(CtrError) as failed:
        start()
    assert expected in failed.value.result.error
    assert lab.traces() == before
    assert _unsettled(plain, plain.ids[-1]) == []


def test_a_hook_that_makes_the_network(plain: Containerd, lab: NetLab, tmp_path: Path) -> None:
    """Docker and nerdctl do it in a hook, by the pid in the container's state."""
    api = Api(plain.address, plain.namespace, tmp_path)
    name = plain.new_id("hook")
    lab.sh("pod", "ip link set eth0 down")
    script = (
        "pid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/');"
        f"nsenter --net={lab.pod} ip link set eth0 netns $pid;"
        f"nsenter --net=/proc/$pid/ns/net sh -c 'ip addr add {GUEST4}/24 dev eth0; ip link set eth0 up'"
    )
    hook = {"path": "/bin/sh", "args": ["sh", "-ec", script], "env": [f"PATH={os.environ['PATH']}"]}
    plain.ctr("container", "create", "--runtime", KATA, BUSYBOX, name)

    def edit(spec: dict[str, Any]) -> None:
        spec["process"]["args"] = list(ECHO)
        spec["hooks"] = {"createRuntime": [hook]}

    try:
        api.patch_spec(name, edit)
        api.task(name).start()
        assert lab.echoes(GUEST4, b"hello") == b"hello"
    finally:
        plain.remove(name)
        api.close()
    assert _unsettled(plain, name) == []


def test_a_machine_that_takes_no_cards_says_so(plain: Containerd, tmp_path: Path) -> None:
    """A network that comes after Create needs a VM that a card can be plugged into."""
    name = plain.new_id("none")
    configuration = write_configuration(
        tmp_path / "configuration.toml", {"hypervisor.qemu": {"machine_type": "microvm"}}
    )
    options = ("--cni", "--runtime-config-path", str(configuration))
    try:
        failed = plain.ctr("run", "--rm", "--runtime", KATA, *options, BUSYBOX, name, "true", check=False)
        assert "the network (eth0) came after the VM had started" in failed.error
        assert "hot-plug of virtio-net: a microvm has no PCI" in failed.error
    finally:
        plain.remove(name)
    assert _unsettled(plain, name) == []


@pytest.fixture(scope="module")
def pod(cri: Cri) -> Iterator[Pod]:
    """A pod whose network CRI made by its CNI configuration, before the sandbox."""
    made = cri.run_pod(namespaces={"network": "POD"}, dns={"servers": ["192.0.2.53"]})
    yield made
    made.remove()
    assert left_of(made) == []


def test_a_pods_containers_share_its_network(pod: Pod) -> None:
    """Two containers, one address, one loopback, the pod's name servers; counters that move."""
    first = pod.run(*ECHO, image=CRI_BUSYBOX)
    second = pod.run("sleep", "100000", image=CRI_BUSYBOX)
    show = "ip -o -4 addr show eth0; ip -o -6 addr show eth0 scope global"
    shown = pod.sh(first, show)
    assert shown == pod.sh(second, show)
    address = shown.split("inet ")[1].split("/")[0]
    assert address.startswith("10.88.")
    assert "inet6 fd00:88::" in shown
    assert "nameserver 192.0.2.53" in pod.sh(second, "cat /etc/resolv.conf")
    assert pod.sh(second, "echo by lo | nc 127.0.0.1 7") == "by lo"
    gateway = pod.sh(second, "ip route").split("via ")[1].split()[0]
    assert " 0% packet loss" in pod.sh(second, f"ping -c 1 -W 20 {gateway}")

    containerd = pod.cri.containerd
    before = _received(containerd, pod.id)
    text = b"hello from the host" * 1000
    host = os.open(f"/proc/{containerd.pid}/ns/net", os.O_RDONLY)
    try:
        with inside(host, socket.socket) as client:
            client.settimeout(60)
            client.connect((address, 7))
            client.sendall(text)
            client.shutdown(socket.SHUT_WR)
            found = b""
            while piece := client.recv(1 << 16):
                found += piece
    finally:
        os.close(host)
    assert found == text
    assert _received(containerd, pod.id) >= before + len(text)


def test_a_pods_link_comes_and_goes(pod: Pod) -> None:
    """The guest follows the namespace with each container that starts: plugged, told, unplugged."""
    (netns,) = [
        space["path"]
        for space in json.loads(pod.info()["info"])["runtimeSpec"]["linux"]["namespaces"]
        if space["type"] == "network"
    ]
    show = ("sh", "-c", "ls /sys/class/net; ip route; echo end")
    script = (
        "ip link add eth1 type veth peer name other; ip addr add 192.0.2.2/24 dev eth1;"
        "ip link set eth1 up; ip link set other up; ip route add 203.0.113.0/24 dev eth1"
    )
    subprocess.run(["nsenter", f"--net={netns}", "sh", "-ec", script], check=True, timeout=60)
    shown = pod.wait_output(pod.run(*show, image=CRI_BUSYBOX), "end")
    assert shown.startswith("eth0\neth1\nlo\n")
    assert "203.0.113.0/24 dev eth1" in shown
    assert "default via" in shown
    subprocess.run(["nsenter", f"--net={netns}", "ip", "link", "del", "eth1"], check=True, timeout=60)
    shown = pod.wait_output(pod.run(*show, image=CRI_BUSYBOX), "end")
    assert shown.startswith("eth0\nlo\ndefault")
    links = subprocess.run(
        ["nsenter", f"--net={netns}", "ip", "-br", "link"], check=True, timeout=60, capture_output=True
    ).stdout.decode()
    assert "tap0_kata" in links
    assert "tap1_kata" not in links


def test_a_running_containers_network_comes_and_goes(pod: Pod) -> None:
    """As by `docker network connect` and `disconnect`: nothing starts afterwards."""
    (netns,) = [
        space["path"]
        for space in json.loads(pod.info()["info"])["runtimeSpec"]["linux"]["namespaces"]
        if space["type"] == "network"
    ]
    container = pod.run("sh", "-c", "echo ready; sleep 100000", image=CRI_BUSYBOX)
    pod.wait_output(container, "ready")
    script = (
        "ip link add eth1 type veth peer name other; ip addr add 192.0.2.2/24 dev eth1;"
        "ip link set eth1 up; ip link set other up; ip route add 203.0.113.0/24 dev eth1"
    )
    subprocess.run(["nsenter", f"--net={netns}", "sh", "-ec", script], check=True, timeout=60)
    _wait(lambda: "203.0.113.0/24 dev eth1" in pod.sh(container, "ip route"), 60)
    assert "192.0.2.2/24" in pod.sh(container, "ip addr show eth1")
    subprocess.run(["nsenter", f"--net={netns}", "ip", "link", "del", "eth1"], check=True, timeout=60)
    _wait(lambda: pod.sh(container, "ls /sys/class/net").split() == ["eth0", "lo"], 60)
    assert "default via" in pod.sh(container, "ip route")


def _received(containerd: Containerd, container: str) -> int:
    """Bytes that came to eth0, as `ctr task metrics` tells: once, with the pod's own container."""
    metrics = json.loads(containerd.ctr("task", "metrics", "--format", "json", container).text)
    return sum(link.get("rx_bytes", 0) for link in metrics["network"] if link["name"] == "eth0")


def _wait(done: Callable[[], bool], timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)
