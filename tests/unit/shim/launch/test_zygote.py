"""The zygote and its client: frames, who is served, and that a daemon of its is as the launcher's is."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proto import task_v2_pb2
from shim.launch import launcher_script, zygote
from shim.launch.caller import Refused
from tests.unit.shim.shims import REPO, Shims, shims_fixture


@pytest.fixture
def shims() -> Iterator[Shims]:
    yield from shims_fixture(zygote=True)


@pytest.fixture
def refusing() -> Iterator[Shims]:
    """With a client that may be refused."""
    yield from shims_fixture(client=True)


def frame(words: list[bytes], count: int, *, magic: bytes = b"KZ1\n", length: int | None = None) -> bytes:
    text = b"".join(word + b"\0" for word in words)
    return struct.pack("=4sII", magic, count, len(text) if length is None else length) + text


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_request_is_read() -> None:
    """In pieces too; a variable without a name is dropped."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        text = frame([b"prog", b"start", b"A=b=c", b"=x", b"E="], 2)
        ours.sendall(text[:5])
        ours.sendall(text[5:])
        words, environment = zygote.read_request(theirs, 5)
    assert words == [b"prog", b"start"]
    assert environment == {b"A": b"b=c", b"E": b""}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (frame([b"p"], 1, magic=b"GET "), "no frame"),
        (frame([b"p"], 1, length=zygote.MAX_FRAME + 1), "no frame"),
        (frame([b"p"], 0), "no frame"),
        (frame([b"p"], 1 << 31), "no frame"),
        (frame([b"p"], 2), "add up"),
        (frame([b"p"], 1)[:-1] + b"x", "add up"),
        (frame([b"p"], 1)[:-1], "half"),
        (b"KZ", "half"),
        (b"", "half"),
    ],
)
@pytest.mark.parametrize("closed", [False, True])
def test_what_is_no_request_is_refused(text: bytes, why: str, closed: bool) -> None:
    """Whether its sender goes or stays, and says no more."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(text)
        if closed:
            ours.close()
        with pytest.raises(Refused, match=why):
            zygote.read_request(theirs, 0.2)


async def test_a_daemon_of_the_zygote_is_like_the_launchers(shims: Shims) -> None:
    """Command line, environment, limits, nice value: those of who asked. Its parent is the zygote."""
    bundle = shims.bundle("c1")

    def change() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3000, 3001))
        os.nice(3)

    argv = shims.argv(bundle, "start")
    subprocess.run(
        argv,
        cwd=bundle.path,
        env=shims.env | {"SECRET": "of-this-sandbox-7f3a"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=30,
        preexec_fn=change,
    )
    pid = await bundle.serving()
    proc = Path(f"/proc/{pid}")
    assert (proc / "cmdline").read_bytes() == b"".join(os.fsencode(word) + b"\0" for word in argv)
    assert (proc / "comm").read_text() == "containerd-shim\n"
    assert b"SECRET=of-this-sandbox-7f3a" in (proc / "environ").read_bytes().split(b"\0")
    assert "3000                 3001" in (proc / "limits").read_text()
    assert os.getpriority(os.PRIO_PROCESS, pid) == 3
    own = parent_of(pid)
    assert Path(f"/proc/{own}/cmdline").read_bytes().split(b"\0")[0] == b"kata-shim-zygote"
    assert Path(f"/proc/{own}/environ").read_bytes() == b""
    assert b"of-this-sandbox-7f3a" not in memory_of(own)
    assert shims.delete(bundle).returncode == 0


def memory_of(pid: int) -> bytes:
    """What a process can write to."""
    found = []
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            place, rights, *_ = line.split()
            first, last = (int(word, 16) for word in place.split("-"))
            if rights.startswith("rw"):
                with contextlib.suppress(OSError, OverflowError):
                    memory.seek(first)
                    found.append(memory.read(last - first))
    return b"".join(found)


async def test_two_daemons_of_one_zygote(shims: Shims) -> None:
    """Each has its own; the zygote has a next one waiting, and none of them is a zombie when it ends."""
    bundles = [shims.bundle(name) for name in ("c1", "c2")]
    for bundle in bundles:
        assert shims.start(bundle).returncode == 0
    pids = [await bundle.serving() for bundle in bundles]
    assert len(set(pids)) == 2
    assert {parent_of(pid) for pid in pids} == {parent_of(pids[0])}
    for bundle, pid in zip(bundles, pids, strict=True):
        await bundle.call("shutdown", task_v2_pb2.ShutdownRequest(id=bundle.id))
        until = time.monotonic() + 10
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < until
            time.sleep(0.01)


def test_other_users_are_not_served(refusing: Shims) -> None:
    """The kernel is asked who it is, whatever the socket's mode is; the zygote serves on."""
    refusing.zygote()
    for path, mode in ((refusing.root, 0o711), (refusing.place.parent, 0o711), (refusing.place, 0o666)):
        path.chmod(mode)
    script = (
        "import socket,sys\ns = socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\n"
        "s.sendall(b'KZ1\\n' + bytes(8))\nprint(s.recv(1))"
    )
    told = subprocess.run(
        ["/usr/bin/python3", "-c", script, str(refusing.place)],
        cwd="/",
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert told.stdout.strip() in ("b''", "")  # nothing, or a reset connection
    assert "a process of user 65534" in refusing.said.read_text()
    assert_serves(refusing)


def assert_serves(shims: Shims) -> None:
    """The next start goes through the zygote."""
    bundle = shims.bundle("next")
    assert shims.start(bundle).returncode == 0
    assert Path(f"/proc/{bundle.pid}/cmdline").read_bytes().startswith(os.fsencode(shims.program))
    assert shims.delete(bundle).returncode == 0


@pytest.mark.parametrize("text", [b"", b"KZ1\n", frame([b"p"], 1, length=1 << 31), b"\xff" * 100_000])
def test_hostile_clients_of_our_own_user(refusing: Shims, text: bytes) -> None:
    """Half a frame, too large a one, noise: they end themselves only."""
    refusing.zygote()
    with socket.socket(socket.AF_UNIX) as hostile:
        hostile.connect(str(refusing.place))
        with contextlib.suppress(ConnectionError):
            hostile.sendall(text)
        assert_serves(refusing)


def test_a_client_that_gives_up_before_go_has_no_daemon(refusing: Shims) -> None:
    """The child said READY, nobody said GO: nothing of a sandbox was made, and it ends."""
    refusing.zygote()
    bundle = refusing.bundle("c1")
    words = [os.fsencode(word) for word in refusing.argv(bundle, "start")]
    environment = [os.fsencode(f"{name}={value}") for name, value in refusing.env.items()]
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(refusing.place))
        client.sendall(frame([*words, *environment], len(words)))
        kind, pid = struct.unpack("=cI", client.recv(5))
        assert kind == b"R", refusing.said.read_text()
    assert refusing.wait_gone(pid)
    assert sorted(os.listdir(bundle.path)) == ["config.json", "log"]
    assert refusing.leftovers() == []


def test_the_locale_and_the_prefix_must_be_the_zygotes(refusing: Shims) -> None:
    """They were read when its modules were loaded; another client's `start` works without it."""
    refusing.zygote()
    bundle = refusing.bundle("c1")
    assert refusing.start(bundle, env={"LC_ALL": "C.UTF-8"}).returncode == 0
    assert "LC_ALL differs" in refusing.said.read_text()
    assert refusing.delete(bundle).returncode == 0


def test_other_actions_never_ask_the_zygote(refusing: Shims) -> None:
    """-v and delete are the launcher's, and so is everything with KATA_SHIM_ZYGOTE=off."""
    bundle = refusing.bundle("c1")
    refusing.place.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind(str(refusing.place))
        nobody.listen(1)
        nobody.setblocking(False)
        assert subprocess.run([str(refusing.program), "-v"], check=True, timeout=10).returncode == 0
        assert refusing.start(bundle, env={"KATA_SHIM_ZYGOTE": "off"}).returncode == 0
        assert refusing.delete(bundle).returncode == 0
        with pytest.raises(BlockingIOError):
            nobody.accept()


def test_a_second_zygote_leaves_and_an_idle_one_too(refusing: Shims) -> None:
    """The one that is there stays; after its time without a client it takes its socket away."""
    code = (
        f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}; sys.argv[0] = 'x'\n"
        "from shim.launch.zygote import main\nfrom shim.launch import launcher\n"
        "sys.exit(main(sys.argv[1], '/x', launcher.main, launcher.bind, float(sys.argv[2])))"
    )
    first = refusing.zygote()
    argv = [sys.executable, "-ISc", code]
    assert subprocess.run([*argv, str(refusing.place), "60"], timeout=30, check=True).returncode == 0
    assert first.poll() is None
    other = refusing.root / "y" / "s"
    assert subprocess.run([*argv, str(other), "0.2"], timeout=30, check=True).returncode == 0
    assert not other.exists()
    assert_serves(refusing)


def test_the_client_is_written_whole_or_not(tmp_path: Path) -> None:
    """What does not fit, or is no client, is refused; what is written runs from anywhere."""
    client = Path(launcher_script.CLIENT).read_bytes()
    with pytest.raises(ValueError, match="too long"):
        launcher_script.filled(client, "/p", "x" * 9000, "/s")
    with pytest.raises(ValueError, match="socket"):
        launcher_script.filled(client, "/p", "x", "/s" * 60)
    with pytest.raises(ValueError, match="not the client"):
        launcher_script.filled(b"\x7fELF", "/p", "x", "/s")
    out = tmp_path / "containerd-shim-kata-x-v2"
    argv = [sys.executable, "-m", "shim.launch.launcher_script", str(out), "--python", sys.executable]
    subprocess.run(argv, cwd=REPO, check=True, timeout=60)
    assert out.read_bytes()[:4] == b"\x7fELF"
    told = subprocess.run([str(out), "-v"], cwd="/", capture_output=True, text=True, timeout=10, check=True)
    assert "version" in told.stdout
    raw = subprocess.run([launcher_script.CLIENT], capture_output=True, text=True, timeout=10, check=False)
    assert (raw.returncode, "not installed" in raw.stderr) == (1, True)


def test_an_installation_that_has_changed(tmp_path: Path) -> None:
    """Replaced or touched, a file that was loaded is another one."""
    installation = zygote.Installation([str(tmp_path / "program")])
    assert installation.changed() == ""
    (tmp_path / "program").write_text("new")
    assert installation.changed() == str(tmp_path / "program")
