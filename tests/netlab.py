"""Two network namespaces with a pair of devices between them: a pod's, and what stands for the host's.

What: `NetLab` makes them, gives sockets in either and runs programs there; `speaks` is the check that all
network tests end in: TCP and ping, both ways, by IPv4 and IPv6.
Why by descriptors of a process: nothing is mounted, and all is gone with that process, whatever fails.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from shim.resources.network.netns import inside

__all__ = ["ECHO", "GUEST4", "GUEST6", "HOST4", "HOST6", "NetLab"]

HOST4, GUEST4 = "10.199.0.1", "10.199.0.2"
HOST6, GUEST6 = "fd00:199::1", "fd00:199::2"
ECHO = ("nc", "-ll", "-p", "7", "-e", "/bin/cat")
"""What a container runs: it sends back whatever it gets at port 7."""

T = TypeVar("T")


class NetLab:
    """For `with`. `pod` is the path of the pod's namespace; `mtu` is that of the pair. With `macvlan` the pod
    has one of these on an end of the pair that stays with the host."""

    def __init__(self, *, mtu: int = 1400, macvlan: bool = False) -> None:
        self._mtu = mtu
        self._macvlan = macvlan
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        self._fds: dict[str, int] = {}

    def __enter__(self) -> Self:
        try:
            for name in ("host", "pod"):
                self._hold(name)
            self._wire()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Both go, unless somebody else is in them."""
        for name in list(self._holders):
            self.drop(name)

    def drop(self, name: str) -> None:
        """Let go of one: whoever stands in it keeps it, but no path leads there any more."""
        holder = self._holders.pop(name)
        holder.kill()
        holder.wait()
        os.close(self._fds.pop(name))

    @property
    def pod(self) -> str:
        """The path of the pod's. By descriptor: that of a process is taken for that process' own."""
        return f"/proc/{os.getpid()}/fd/{self._fds['pod']}"

    @property
    def pod_pid(self) -> int:
        """A process that is in the pod's."""
        return self._holders["pod"].pid

    def sh(self, name: str, script: str) -> str:
        """What a shell script writes there. Raises CalledProcessError."""
        argv = ["nsenter", f"--net=/proc/self/fd/{self._fds[name]}", "sh", "-ec", script]
        done = subprocess.run(argv, check=True, capture_output=True, timeout=60, pass_fds=[self._fds[name]])
        return done.stdout.decode()

    def inside(self, name: str, function: Callable[[], T]) -> T:
        """Call it there, in a thread of its own."""
        return inside(self._fds[name], function)

    def tcp(self, family: int) -> socket.socket:
        """A TCP socket of the host's namespace."""
        return self.inside("host", lambda: socket.socket(family, socket.SOCK_STREAM))

    def traces(self) -> str:
        """What of ours is in the pod's namespace: qdiscs and devices but for the pair's end."""
        qdiscs = [line for line in self.sh("pod", "tc qdisc").splitlines() if "noqueue" not in line]
        devices = self.sh("pod", "ls /proc/self/net/dev_snmp6").split()
        return "\n".join(qdiscs + [name for name in devices if name not in ("lo", "eth0", "eth1")])

    def echoes(self, address: str, text: bytes, timeout: float = 60) -> bytes:
        """What the guest's echo at port 7 answers. Raises OSError."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        deadline = time.monotonic() + timeout
        while True:
            with self.tcp(family) as client:
                client.settimeout(10)
                try:
                    client.connect((address, 7))
                    client.sendall(text)
                    client.shutdown(socket.SHUT_WR)
                    found = b""
                    while piece := client.recv(1 << 16):
                        found += piece
                    return found
                except OSError:  # it may not listen yet
                    if time.monotonic() > deadline:
                        raise
            time.sleep(0.1)

    @contextlib.contextmanager
    def listening(self, address: str) -> Iterator[socket.socket]:
        """A socket of the host that waits for the guest; yields it, bound to a port of its own."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.tcp(family) as server:
            server.settimeout(60)
            server.bind((address, 0))
            server.listen()
            yield server

    def speaks(self, run: Callable[[str], str], *, ping: bool = True) -> None:
        """Assert that both sides reach each other. `run`: a shell script in the container, its output."""
        for host, guest in ((HOST4, GUEST4), (HOST6, GUEST6)):
            text = os.urandom(100_000).hex().encode()
            assert self.echoes(guest, text) == text
            with self.listening(host) as server:
                port = server.getsockname()[1]
                client = run(f"echo from the guest | nc {host} {port} & sleep 0; echo $!")
                connection, peer = server.accept()
                with connection:
                    connection.settimeout(60)
                    assert connection.recv(100) == b"from the guest\n"
                assert peer[0] == guest, client
            if ping:
                assert " 0% packet loss" in run(f"ping -c 1 -W 20 {host}")
                assert " 0% packet loss" in self.sh("host", f"busybox ping -c 1 -W 20 {guest}")

    def _hold(self, name: str) -> None:
        # In its new namespace once it has said so.
        holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "ip link set lo up; echo here; exec sleep 100000"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        self._holders[name] = holder
        assert holder.stdout is not None
        with holder.stdout:
            assert holder.stdout.readline() == b"here\n"
        self._fds[name] = os.open(f"/proc/{holder.pid}/ns/net", os.O_RDONLY)

    def _wire(self) -> None:
        pod, mtu = self._holders["pod"].pid, self._mtu
        pair = f"ip link add veth0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {pod};"
        if self._macvlan:
            pair = (
                f"ip link add veth0 mtu {mtu} type veth peer name below mtu {mtu}; ip link set below up;"
                f"ip link add link below name eth0 netns {pod} type macvlan mode bridge;"
            )
        self.sh(
            "host",
            "sysctl -qw net.ipv6.conf.default.accept_dad=0;"
            f"{pair}"
            f"ip addr add {HOST4}/24 dev veth0; ip addr add {HOST6}/64 dev veth0; ip link set veth0 up",
        )
        self.sh(
            "pod",
            f"ip addr add {GUEST4}/24 dev eth0; ip addr add {GUEST6}/64 dev eth0 nodad; ip link set eth0 up;"
            f"ip route add default via {HOST4}; ip -6 route add default via {HOST6};"
            f"ip route add 198.51.100.0/24 via {HOST4} src {GUEST4};"
            "ip neigh add 10.199.0.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent",
        )
