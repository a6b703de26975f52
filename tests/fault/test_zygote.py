"""Zygotes that die, stand still, lie, are old or elsewhere: no pod is harmed, and `start` has one daemon."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.shim.shims import Bundle, Shims, shims_fixture


@pytest.fixture
def shims() -> Iterator[Shims]:
    yield from shims_fixture(client=True)


def came_from(bundle: Bundle) -> str:
    """Who made its daemon, as the command line tells."""
    words = Path(f"/proc/{bundle.pid}/cmdline").read_bytes().split(b"\0")
    return "zygote" if os.path.basename(words[0]).startswith(b"containerd-shim-kata") else "launcher"


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(what: object) -> None:
    assert callable(what)
    until = time.monotonic() + 20
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


async def test_its_death_harms_no_pod(shims: Shims) -> None:
    """kill -9: its daemons serve on, the child that waited goes, the next start is the launcher's."""
    zygote = shims.zygote()
    first, second = shims.bundle("c1"), shims.bundle("c2")
    assert shims.start(first).returncode == 0
    pid = await first.serving()
    wait_for(lambda: len(children(zygote.pid)) == 2)
    (waiting,) = set(children(zygote.pid)) - {pid}

    zygote.kill()
    zygote.wait()

    wait_for(lambda: not Path(f"/proc/{waiting}").exists() or state_of(waiting) in "ZX")
    assert await first.serving() == pid
    assert shims.start(second).returncode == 0
    assert (came_from(first), came_from(second)) == ("zygote", "launcher")
    assert await second.serving() == second.pid
    assert Path(f"/proc/{second.pid}/comm").read_text() == "containerd-shim\n"
    for bundle in (first, second):
        assert shims.delete(bundle).returncode == 0


async def test_start_brings_a_zygote_where_it_is_wanted(shims: Shims) -> None:
    """KATA_SHIM_ZYGOTE=on: the first start is the launcher's, and the next ones go through the zygote.
    It keeps no descriptor, directory or environment of who started it, and there is one."""
    bundles = [shims.bundle(f"c{number}") for number in range(4)]
    wanted = {"KATA_SHIM_ZYGOTE": "on", "SECRET": "x"}
    for bundle in bundles[:3]:
        assert shims.start(bundle, env=wanted).returncode == 0
    wait_for(shims.place.exists)
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(str(shims.place))
        pid, _, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        assert shims.start(bundles[3], env=wanted).returncode == 0
        assert came_from(bundles[3]) == "zygote"
        assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
        held = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        assert {name for name in held if not name.startswith(("socket:", "pipe:"))} == {"/dev/null"}
        assert Path(f"/proc/{pid}/environ").read_bytes() == b""
    finally:
        os.kill(pid, signal.SIGKILL)
    for bundle in bundles:
        assert shims.delete(bundle).returncode == 0


@pytest.mark.parametrize("whom", ["zygote", "child"])
async def test_one_that_is_stopped(shims: Shims, whom: str) -> None:
    """The client waits its second, and runs the launcher. When they go on, nobody makes a second daemon."""
    zygote = shims.zygote()
    wait_for(lambda: len(children(zygote.pid)) == 1)
    (child,) = children(zygote.pid)
    bundle, other = shims.bundle("c1"), shims.bundle("c2")
    stopped = [zygote.pid] if whom == "zygote" else [zygote.pid, child]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda pid=pid: state_of(pid) == "T")
    if whom == "zygote":
        assert shims.start(other).returncode == 0  # by the child that waits; nobody makes another
        assert came_from(other) == "zygote"
        assert shims.delete(other).returncode == 0

    begin = time.monotonic()
    assert shims.start(bundle).returncode == 0
    assert time.monotonic() - begin < 20
    assert came_from(bundle) == "launcher"
    daemon = await bundle.serving()
    for pid in reversed(stopped):
        os.kill(pid, signal.SIGCONT)

    late = shims.bundle("c3")
    assert shims.start(late).returncode == 0  # those who came before have had their turn
    assert shims.processes() == sorted({daemon, late.pid})
    assert await bundle.serving() == daemon == bundle.pid
    for each in (bundle, late):
        assert shims.delete(each).returncode == 0


def test_systemd_passes_the_socket(shims: Shims) -> None:
    """By sd_listen_fds(3). Whoever woke it runs the launcher, and does not wait for its imports; the next
    goes through it. At its end the socket stays."""
    first, second = shims.bundle("c1"), shims.bundle("c2")
    shims.place.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(shims.place))
        listener.listen(16)
        with subprocess.Popen(shims.argv(first, "start"), cwd=first.path, env=shims.env) as waking:
            assert select.select([listener], [], [], 20)[0]
            script = 'exec 3<&"$1"; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$0" zygote'
            zygote = subprocess.Popen(
                ["bash", "-c", script, str(shims.program), str(listener.fileno())],
                env=shims.env,
                pass_fds=(listener.fileno(),),
            )
            assert waking.wait(30) == 0
        assert came_from(first) == "launcher"
        wait_for(lambda: children(zygote.pid))
        assert shims.start(second).returncode == 0
        assert came_from(second) == "zygote"
        zygote.kill()
        zygote.wait()
        assert shims.place.exists()
    for bundle in (first, second):
        assert shims.delete(bundle).returncode == 0


class Liar:
    """Listens where a zygote would, answers the first client with `ready`, and after GO with `done`."""

    def __init__(self, place: Path, ready: bytes, done: bytes) -> None:
        place.parent.mkdir(mode=0o700)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(place))
        self._listener.listen(5)
        self._ready, self._done = ready, done
        self.heard = b""
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection:
            connection.settimeout(20)
            connection.recv(1 << 16)
            if self._ready:
                connection.sendall(self._ready)
                self.heard = connection.recv(1)
            if self._done:
                connection.sendall(self._done)

    def close(self) -> None:
        self._thread.join(30)
        self._listener.close()


@pytest.mark.parametrize(
    "done",
    [
        b"",
        b"D",
        b"D\0",
        struct.pack("=cBI", b"D", 0, 1 << 30),
        struct.pack("=cBI", b"D", 0, 9) + b"unix",
        b"X" * 9,
    ],
)
async def test_a_child_that_fails_after_go_is_killed_first(shims: Shims, done: bytes) -> None:
    """No answer, half of one, nonsense: the client kills the child, then runs the launcher."""
    with subprocess.Popen(["sleep", "1000"]) as child:
        liar = Liar(shims.place, struct.pack("=cI", b"R", child.pid), done)
        bundle = shims.bundle("c1")
        result = shims.start(bundle)
        liar.close()
        assert liar.heard == b"G"
        assert child.wait(10) == -signal.SIGKILL
    assert (result.returncode, came_from(bundle)) == (0, "launcher")
    assert result.stdout.decode() == bundle.read("address")  # once, and nothing else
    assert shims.delete(bundle).returncode == 0


@pytest.mark.parametrize("ready", [b"", b"N no", b"R", b"X\1\0\0\0", struct.pack("=cI", b"R", 1 << 30)])
def test_one_that_refuses_or_is_none(shims: Shims, ready: bytes) -> None:
    """Nobody hears GO, and the launcher does it."""
    liar = Liar(shims.place, ready, b"")
    bundle = shims.bundle("c1")
    assert shims.start(bundle).returncode == 0
    liar.close()
    assert liar.heard == b""
    assert came_from(bundle) == "launcher"
    assert shims.delete(bundle).returncode == 0


def test_an_upgraded_installation_gets_a_new_one(shims: Shims) -> None:
    """The old zygote refuses the next start and leaves; a new one serves the start after it."""
    old = shims.zygote()
    bundles = [shims.bundle(name) for name in ("c1", "c2", "c3")]
    assert shims.start(bundles[0]).returncode == 0
    copy = shims.program.read_bytes()
    shims.program.unlink()
    shims.program.write_bytes(copy)
    shims.program.chmod(0o755)

    assert shims.start(bundles[1]).returncode == 0
    assert old.wait(20) == 0
    assert not shims.place.exists()
    assert "has changed" in shims.said.read_text()
    shims.zygote()
    assert shims.start(bundles[2]).returncode == 0
    assert [came_from(bundle) for bundle in bundles] == ["zygote", "launcher", "zygote"]
    for bundle in bundles:
        assert shims.delete(bundle).returncode == 0


@pytest.mark.parametrize(
    ("prefix", "why"),
    [
        (["unshare", "--mount"], "another mnt namespace"),
        (["unshare", "--net"], "another net namespace"),
        (["setpriv", "--no-new-privs"], "NoNewPrivs differs"),
        (["setpriv", "--bounding-set", "-net_raw"], "Cap"),
    ],
)
def test_who_is_elsewhere_is_not_served(shims: Shims, prefix: list[str], why: str) -> None:
    """A caller in another namespace, or with other rights, has a daemon that is where it is."""
    shims.zygote()
    bundle = shims.bundle("c1")
    result = subprocess.run(
        [*prefix, *shims.argv(bundle, "start")],
        cwd=bundle.path,
        env=shims.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert why in shims.said.read_text()
    assert came_from(bundle) == "launcher"
    assert shims.delete(bundle).returncode == 0
