"""After kill -9 at any phase `delete` leaves nothing behind, answers 137, and may be run again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from devices.mounts import bind, mounts_below
from proto import sandbox_v1_pb2, task_v2_pb2
from shim.state.journalfile import encode, header_of, load
from shim.state.procfs import start_time
from tests.unit.shim.shims import Bundle, Shims, shims_fixture
from ttrpc import Client, Code, RpcError

_KEY = "io.kubernetes.cri."


@pytest.fixture(params=["launcher", "zygote"])
def shims(request: pytest.FixtureRequest) -> Iterator[Shims]:
    yield from shims_fixture(zygote=request.param == "zygote")


async def _create(bundle: Bundle, *, helper: bool = True) -> int:
    request = task_v2_pb2.CreateTaskRequest(
        id=bundle.id, bundle=str(bundle.path), stdin="helper" if helper else ""
    )
    response = await bundle.call("create", request)
    assert isinstance(response, task_v2_pb2.CreateTaskResponse)
    return response.pid


def _wait_removed(path: Path) -> None:
    until = time.monotonic() + 10
    while path.exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def _response(result: subprocess.CompletedProcess[bytes]) -> task_v2_pb2.DeleteResponse:
    assert (result.returncode, result.stderr) == (0, b"")
    response = task_v2_pb2.DeleteResponse.FromString(result.stdout)
    assert response.exit_status == 137
    assert abs(response.exited_at.ToNanoseconds() / 1e9 - time.time()) < 30
    return response


async def test_killed_with_a_container(shims: Shims) -> None:
    """The helper dies, mount and directories go, the response names the helper; a new start works."""
    bundle = shims.bundle("c1")
    shims.start(bundle)
    helper = await _create(bundle)
    os.kill(bundle.pid, signal.SIGKILL)
    assert shims.wait_gone(bundle.pid)
    assert helper in shims.processes()

    assert _response(shims.delete(bundle)).pid == helper
    assert shims.leftovers() == []
    _response(shims.delete(bundle))  # idempotent

    assert shims.start(bundle).returncode == 0
    await _create(bundle, helper=False)
    await bundle.call("delete", task_v2_pb2.DeleteRequest(id="c1"))
    await bundle.call("shutdown", task_v2_pb2.ShutdownRequest(id="c1"))
    _response(shims.delete(bundle))


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1, 0.2, 0.4])
def test_killed_while_starting(shims: Shims, delay: float) -> None:
    """Killed at any moment of its own start, the daemon leaves nothing that `delete` does not find."""
    bundle = shims.bundle("c1")
    shims.start(bundle)
    time.sleep(delay)  # the point in time is the parameter
    os.kill(bundle.pid, signal.SIGKILL)

    _response(shims.delete(bundle))

    assert shims.leftovers() == []


@pytest.mark.parametrize("stopped", [False, True])
async def test_delete_of_a_live_shim(shims: Shims, stopped: bool) -> None:
    """containerd has given up on a shim that lives (or hangs): `delete` ends it and its helper."""
    bundle = shims.bundle("c1")
    shims.start(bundle)
    await _create(bundle)
    if stopped:
        os.kill(bundle.pid, signal.SIGSTOP)

    _response(shims.delete(bundle))

    assert shims.leftovers() == []


async def test_delete_waits_for_a_clean_end(shims: Shims) -> None:
    """A shim that is shutting down gets the time to finish by itself."""
    bundle = shims.bundle("c1")
    shims.start(bundle, env={"STUB_CLOSE_SECONDS": "1"})
    await _create(bundle, helper=False)
    await bundle.call("delete", task_v2_pb2.DeleteRequest(id="c1"))
    await bundle.call("shutdown", task_v2_pb2.ShutdownRequest(id="c1"))
    _wait_removed(bundle.socket)

    _response(shims.delete(bundle))

    assert "done" in shims.log(bundle)
    assert shims.leftovers() == []


async def test_shutdown_that_hangs(shims: Shims) -> None:
    """A shim that does not finish is killed within containerd's five seconds."""
    bundle = shims.bundle("c1")
    shims.start(bundle, env={"STUB_CLOSE_SECONDS": "100"})
    await bundle.call("shutdown", task_v2_pb2.ShutdownRequest(id="c1"))
    _wait_removed(bundle.socket)

    _response(shims.delete(bundle))

    assert shims.leftovers() == []


async def test_member_of_a_live_pod(shims: Shims) -> None:
    """Deleting one container does not touch the pod that lives on."""
    pod = shims.bundle("p1", {_KEY + "container-type": "sandbox", _KEY + "sandbox-id": "p1"})
    member = shims.bundle("c1", {_KEY + "container-type": "container", _KEY + "sandbox-id": "p1"})
    shims.start(pod)
    shims.start(member)
    helper = await _create(pod)
    await _create(member, helper=False)

    _response(shims.delete(member))

    assert helper in shims.processes()
    await pod.call("state", task_v2_pb2.StateRequest(id="p1"))
    (member.path / "config.json").unlink()  # half-made
    _response(shims.delete(member))
    assert helper in shims.processes()
    assert pod.socket.exists()
    _response(shims.delete(pod))


@pytest.mark.parametrize("folder", ["rw/passthrough", "roots/rw"])
async def test_member_of_a_dead_pod(shims: Shims, folder: str) -> None:
    """With the shim dead, a member's share goes with the member, the rest with the pod."""
    pod = shims.bundle("p1", {_KEY + "container-type": "sandbox", _KEY + "sandbox-id": "p1"})
    member = shims.bundle("c1", {_KEY + "container-type": "container", _KEY + "sandbox-id": "p1"})
    shims.start(pod)
    helper = await _create(pod)
    share = shims.share_dir(pod) / folder
    for name in ("p1", "c1"):
        (share / name / "rootfs").mkdir(parents=True)
    os.kill(pod.pid, signal.SIGKILL)
    assert shims.wait_gone(pod.pid)

    _response(shims.delete(member))

    assert [path.name for path in share.iterdir()] == ["p1"]
    assert helper in shims.processes()
    _response(shims.delete(pod))
    assert shims.leftovers() == []


def test_nothing_there(shims: Shims) -> None:
    """`delete` without any state, or even the config.json, succeeds."""
    bundle = shims.bundle("c1")
    (bundle.path / "config.json").unlink()

    _response(shims.delete(bundle))


@pytest.mark.parametrize("journal", [b"garbage\n", encode({"journal": 99, "sandbox": "c1"})])
def test_unreadable_journal(shims: Shims, journal: bytes) -> None:
    """A journal that tells nothing stays, and is told by exit code and text each time, until a person removes
    it; what lies at known places goes."""
    bundle = shims.bundle("c1")
    directory = shims.state_dir(bundle)
    directory.mkdir(parents=True)
    (directory / "journal").write_bytes(journal)
    (directory / "qmp.sock").touch()
    (shims.share_dir(bundle) / "rw").mkdir(parents=True)

    for _ in range(2):
        result = shims.delete(bundle)
        assert result.returncode == 1
        assert f"{directory}/journal".encode() in result.stderr
        assert f"then remove {directory}".encode() in result.stderr
        assert task_v2_pb2.DeleteResponse.FromString(result.stdout).exit_status == 137
        assert [path.name for path in directory.iterdir()] == ["journal"]
        assert (directory / "journal").read_bytes() == journal
        assert not shims.share_dir(bundle).exists()

    shutil.rmtree(directory)
    _response(shims.delete(bundle))


def _write_journal(shims: Shims, bundle: Bundle, *changes: dict[str, object] | bytes) -> Path:
    directory = shims.state_dir(bundle)
    directory.mkdir(parents=True)
    lines = [change if isinstance(change, bytes) else encode(change) for change in changes]
    header = encode(header_of(shims.identity(bundle), str(bundle.path)))
    (directory / "journal").write_bytes(header + b"".join(lines))
    return directory


def _record(number: int, kind: str, **facts: str | int) -> dict[str, object]:
    return {"op": "record", "n": number, "kind": kind, "facts": facts}


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def test_pid_of_somebody_else(shims: Shims, sleeper: subprocess.Popen[bytes]) -> None:
    """A recorded pid that now belongs to another process is left alone."""
    bundle = shims.bundle("c1")
    start = start_time(sleeper.pid) - 1
    _write_journal(shims, bundle, _record(1, "process", name="qemu", pid=sleeper.pid, start=start))

    _response(shims.delete(bundle))

    assert sleeper.poll() is None


def test_helper_that_never_reached_the_journal(shims: Shims) -> None:
    """Recorded without a pid: the process is known by its mark, whatever it is called; another sandbox's, and
    an administrator who looks at this one's files, go on."""
    bundle, other = shims.bundle("c1"), shims.bundle("c1", namespace="other")
    directory = _write_journal(shims, bundle, _record(1, "process", name="x"))
    key = shims.identity(bundle).key
    sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
    with contextlib.ExitStack() as processes:

        def start(argv: list[str], *, leads: bool = True, **env: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                argv, env={**os.environ, **env}, stdin=subprocess.DEVNULL, start_new_session=leads
            )
            processes.callback(process.wait)
            processes.callback(process.kill)
            return process

        strays = [
            start(sleep, KATA_SHIM_CHILD=f"{key}.12345"),
            start([*sleep, "--id", key]),  # a jail's environment is empty
            start([*sleep, f"--id={key}"]),
        ]
        innocent = [
            start(["tail", "-f", str(directory / "journal")]),
            start([*sleep, f"{directory}/qmp.sock", "sandbox-c1,debug-threads=on"]),
            start(sleep, KATA_SHIM_CHILD=f"{shims.identity(other).key}.12345"),
            start(sleep, OTHER=key),
            start([*sleep, key, "-id", "c1"]),
            start([*sleep, "--id", key], leads=False),
        ]
        _wait_for_exec([*strays, *innocent])

        _response(shims.delete(bundle))

        assert [process.wait(5) for process in strays] == [-9] * 3
        assert [process.poll() for process in innocent] == [None] * 6


def _wait_for_exec(processes: list[subprocess.Popen[bytes]]) -> None:
    """Popen may return before exec: until then it has our own environment and command line."""
    own = Path("/proc/self/cmdline").read_bytes()
    until = time.monotonic() + 10
    while any(Path(f"/proc/{process.pid}/cmdline").read_bytes() in (b"", own) for process in processes):
        assert time.monotonic() < until
        time.sleep(0.01)


def test_hostile_journal_paths(shims: Shims, tmp_path: Path) -> None:
    """Records that do not name what they should are reported, stay recorded, and nothing else happens."""
    precious = tmp_path / "precious"
    precious.mkdir()
    bundle = shims.bundle("c1")
    gone = tmp_path / "gone"
    gone.touch()
    directory = _write_journal(
        shims,
        bundle,
        _record(1, "file", path=str(precious)),
        _record(2, "dir", path=f"{tmp_path}/x/../precious"),
        _record(3, "process", pid=1, start=0),
        _record(4, "unheard-of"),
        _record(5, "file", path=str(gone)),
    )

    for _ in range(2):
        result = shims.delete(bundle)
        assert result.returncode == 1
        for text in (b"recorded as a file", b"not an absolute path", b"pid 1", b"unheard-of"):
            assert text in result.stderr
        assert precious.exists()
        assert not gone.exists()
        assert [record.number for record in load(str(directory)).records] == [1, 2, 3, 4]
    shutil.rmtree(directory)


def test_mount_of_a_volume_survives(shims: Shims) -> None:
    """What is mounted below the share is detached, its content is not removed."""
    bundle = shims.bundle("c1")
    volume = shims.root / "volume"
    volume.mkdir()
    (volume / "data").write_text("precious")
    target = shims.share_dir(bundle) / "rw/passthrough/c1/data"
    target.mkdir(parents=True)
    bind(str(volume), str(target))

    _response(shims.delete(bundle))

    assert (volume / "data").read_text() == "precious"
    assert mounts_below(str(shims.root)) == []
    assert shims.leftovers() == []


async def test_next_start_without_a_delete(shims: Shims) -> None:
    """When `delete` never came, the next shim of the same id cleans up after the killed one and serves."""
    bundle = shims.bundle("c1")
    shims.start(bundle)
    helper = await _create(bundle)
    os.kill(bundle.pid, signal.SIGKILL)
    assert shims.wait_gone(bundle.pid)

    assert shims.start(bundle).returncode == 0
    await _create(bundle)

    assert helper not in shims.processes()
    assert "remains of an earlier shim" in shims.log(bundle)
    _response(shims.delete(bundle))


async def test_daemon_that_cannot_work_says_why(shims: Shims) -> None:
    """A journal of another version: Create is answered with the reason, Shutdown ends the daemon."""
    bundle = shims.bundle("c1")
    directory = _write_journal(shims, bundle)
    (directory / "journal").write_bytes(encode({"journal": 99, "sandbox": "c1"}))
    shims.start(bundle)

    with pytest.raises(RpcError, match=r"version 99.*try: see what it records.*then remove") as caught:
        await _create(bundle)
    assert caught.value.code is Code.FAILED_PRECONDITION
    method = sandbox_v1_pb2.DESCRIPTOR.services_by_name["Sandbox"].methods_by_name["CreateSandbox"]
    async with await Client.connect_unix(str(bundle.socket), timeout=10) as client:
        with pytest.raises(RpcError, match="version 99"):
            await client.call(method, sandbox_v1_pb2.CreateSandboxRequest(sandbox_id="c1"), timeout=10)
    with pytest.raises(RpcError, match="no container"):
        await bundle.call("delete", task_v2_pb2.DeleteRequest(id="c1"))
    await bundle.call("shutdown", task_v2_pb2.ShutdownRequest(id="c1"))

    assert shims.wait_gone(bundle.pid)
    assert not bundle.socket.exists()
    assert shims.delete(bundle).returncode == 1
    shutil.rmtree(directory)
