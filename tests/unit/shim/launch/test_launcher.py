"""`start` as containerd runs it: the address on stdout, a daemon that serves, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from proto import bootstrap_pb2, introspection_pb2, task_v2_pb2, task_v3_pb2
from shim.launch import launcher_script
from shim.launch.launcher import VERSION
from shim.state.bundle import socket_path
from tests.unit.shim.shims import GRPC, NAMESPACE, REPO, Bundle, Shims, shims_fixture
from ttrpc import Client, Code, RpcError


@pytest.fixture(params=["launcher", "zygote"])
def shims(request: pytest.FixtureRequest) -> Iterator[Shims]:
    yield from shims_fixture(zygote=request.param == "zygote")


async def _shut_down(shims: Shims, bundle: Bundle) -> None:
    pid = bundle.pid
    await bundle.call("shutdown", task_v2_pb2.ShutdownRequest(id=bundle.id))
    assert shims.wait_gone(pid)


async def test_start(shims: Shims) -> None:
    """The address is printed bare; socket, files, session, descriptors and score are as agreed."""
    bundle = shims.bundle("c1")
    leak, other = os.pipe()
    leaked = os.readlink(f"/proc/self/fd/{leak}")
    result = shims.start(bundle, pass_fds=(leak,))
    os.close(leak)
    os.close(other)

    assert result.returncode == 0, result.stdout
    path = socket_path(GRPC, NAMESPACE, "c1", f"{shims.root}/run/containerd/s")
    assert result.stdout.decode() == f"unix://{path}"
    assert bundle.read("address") == f"unix://{path}"
    assert Path(path).stat().st_mode & 0o777 == 0o600
    assert Path(path).parent.stat().st_mode & 0o777 == 0o700

    await bundle.call("connect", task_v2_pb2.ConnectRequest(id="c1"))  # the daemon has settled

    proc = Path(f"/proc/{bundle.pid}")
    assert os.getsid(bundle.pid) == bundle.pid
    assert (proc / "cwd").readlink() == bundle.path
    assert (proc / "comm").read_text() == "containerd-shim\n"
    fds = {int(fd.name): os.readlink(fd) for fd in (proc / "fd").iterdir()}
    assert (fds[0], fds[1], fds[2]) == ("/dev/null", "/dev/null", str(bundle.path / "log"))
    assert leaked not in fds.values()
    assert (proc / "ns" / "mnt").readlink() != Path("/proc/self/ns/mnt").readlink()
    own_score = int(Path("/proc/self/oom_score_adj").read_text())
    assert int((proc / "oom_score_adj").read_text()) == min(1000, own_score + 1)
    assert "Umask:\t0077" in (proc / "status").read_text()

    await _shut_down(shims, bundle)


async def test_daemon_serves_and_ends(shims: Shims) -> None:
    """Calls made right after `start` are answered; Shutdown removes socket, journal and process."""
    bundle = shims.bundle("c1")
    shims.start(bundle, "-debug")

    with pytest.raises(RpcError) as caught:
        await bundle.call("state", task_v2_pb2.StateRequest(id="c1"))
    assert caught.value.code is Code.NOT_FOUND
    assert shims.state_dir(bundle).stat().st_mode & 0o777 == 0o700
    pid = bundle.pid

    await _shut_down(shims, bundle)

    assert pid not in shims.processes()
    assert shims.leftovers() == []
    messages = [json.loads(line)["msg"] for line in shims.log(bundle).splitlines()]
    assert messages[0] == "serving"
    assert messages[-1] == "done"


def test_version_and_help(shims: Shims) -> None:
    """-v and -help answer without any other flag."""
    run = [str(shims.program)]
    version = subprocess.run([*run, "-v"], capture_output=True, text=True, check=True, timeout=10)
    usage = subprocess.run([*run, "-help"], capture_output=True, text=True, check=True, timeout=10)

    assert version.stdout.startswith("containerd-shim-kata-v2 ")
    assert "-publish-binary" in usage.stdout


def test_version_is_the_distribution() -> None:
    """The number that -v prints is the one that pyproject.toml gives the distribution."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())

    assert project["project"]["version"] == VERSION


def test_info(shims: Shims) -> None:
    """-info prints RuntimeInfo, with options on stdin or without."""
    for stdin in (b"", b"\n\x19runtimeoptions.v1.Options"):
        result = subprocess.run(
            [str(shims.program), "-info"], input=stdin, capture_output=True, check=True, timeout=10
        )
        info = introspection_pb2.RuntimeInfo.FromString(result.stdout)
        assert info.name == "io.containerd.kata.v2"
        assert info.version.version


def test_a_link_is_a_runtime_class(shims: Shims, tmp_path: Path) -> None:
    """io.containerd.kata-fc.v2 is our program under another name: the daemon is told which."""
    link = tmp_path / "containerd-shim-kata-fc-v2"
    link.symlink_to(shims.program)
    result = subprocess.run([str(link), "-info"], capture_output=True, check=True, timeout=10)
    assert introspection_pb2.RuntimeInfo.FromString(result.stdout).name == "io.containerd.kata-fc.v2"


async def test_bootstrap_of_containerd_2_3(shims: Shims) -> None:
    """A containerd that sends BootstrapParams gets BootstrapResult, and the task service that it promises."""
    bundle = shims.bundle("c1")
    sockets = shims.root / "s"
    params = bootstrap_pb2.BootstrapParams(
        instance_id="c1",
        containerd_version="2.3.4",
        socket_dir=str(sockets),
        log_level=bootstrap_pb2.LOG_LEVEL_DEBUG,
    )

    started = shims.start(bundle, stdin=params.SerializeToString())

    assert started.returncode == 0
    result = bootstrap_pb2.BootstrapResult.FromString(started.stdout)
    assert (result.version, result.protocol) == (3, "ttrpc")
    assert Path(result.address.removeprefix("unix://")).parent == sockets
    assert bundle.read("address") == result.address  # for a 1.x that comes back to it, or `delete`
    async with await Client.connect_unix(result.address.removeprefix("unix://"), timeout=5) as client:
        service = task_v3_pb2.DESCRIPTOR.services_by_name["Task"]
        reply = await client.stub(service, default_timeout=20).connect(task_v3_pb2.ConnectRequest(id="c1"))
        assert reply.shim_pid == bundle.pid
        pid = bundle.pid
        await client.stub(service, default_timeout=20).shutdown(task_v3_pb2.ShutdownRequest(id="c1"))
    assert shims.wait_gone(pid)
    assert shims.delete(bundle).returncode == 0
    assert shims.leftovers() == []


async def test_pod_member(shims: Shims) -> None:
    """A container of a pod gets the pod's address and no daemon of its own."""
    key = "io.kubernetes.cri."
    pod = shims.bundle("p1", {key + "container-type": "sandbox", key + "sandbox-id": "p1"})
    member = shims.bundle("c1", {key + "container-type": "container", key + "sandbox-id": "p1"})
    shims.start(pod)

    result = shims.start(member)

    assert result.returncode == 0
    assert result.stdout.decode() == pod.read("address") == member.read("address")
    assert not (member.path / "shim.pid").exists()
    assert shims.processes() == [pod.pid]
    await _shut_down(shims, pod)


def test_pod_member_without_pod(shims: Shims) -> None:
    """A member whose pod's shim is gone is refused, with the reason."""
    key = "io.kubernetes.cri."
    member = shims.bundle("c1", {key + "container-type": "container", key + "sandbox-id": "p1"})

    result = shims.start(member)

    assert result.returncode == 1
    assert b"the shim of sandbox p1 does not answer" in result.stdout
    assert not (member.path / "address").exists()


async def test_second_start_reuses(shims: Shims) -> None:
    """When a live shim listens already its address is printed, and no second daemon starts."""
    bundle = shims.bundle("c1")
    first = shims.start(bundle)
    pid = bundle.pid

    second = shims.start(bundle)

    assert second.stdout == first.stdout
    assert bundle.pid == pid
    assert shims.processes() == [pid]
    await _shut_down(shims, bundle)


async def test_stale_socket(shims: Shims) -> None:
    """A socket that a killed shim left is replaced."""
    bundle = shims.bundle("c1")
    path = Path(socket_path(GRPC, NAMESPACE, "c1", f"{shims.root}/run/containerd/s"))
    path.parent.mkdir(parents=True)
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()

    assert shims.start(bundle).returncode == 0
    await bundle.call("connect", task_v2_pb2.ConnectRequest(id="c1"))
    await _shut_down(shims, bundle)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, b"config.json does not exist"), ("{", b"is not a JSON object"), ("", b"is not a JSON object")],
)
def test_bad_bundles(shims: Shims, text: str | None, message: bytes) -> None:
    """A bundle that cannot be used is refused in one line, and nothing is made."""
    bundle = shims.bundle("c1")
    (bundle.path / "config.json").unlink()
    if text is not None:
        (bundle.path / "config.json").write_text(text)

    result = shims.start(bundle)

    assert result.returncode == 1
    assert message in result.stdout
    assert result.stdout.count(b"\n") == 1
    assert shims.leftovers() == []


@pytest.mark.parametrize("sandbox_id", ["../../etc", "a/b", "x" * 200, "p 1"])
def test_hostile_sandbox_id(shims: Shims, sandbox_id: str) -> None:
    """A sandbox id from an annotation is held to the same rules as one from the command line."""
    key = "io.kubernetes.cri."
    bundle = shims.bundle("c1", {key + "container-type": "sandbox", key + "sandbox-id": sandbox_id})

    result = shims.start(bundle)

    assert result.returncode == 1
    assert b"sandbox-id" in result.stdout
    assert shims.leftovers() == []


def test_environment_cannot_add_modules(shims: Shims) -> None:
    """Neither PYTHONPATH nor the bundle can put code into the shim."""
    bundle = shims.bundle("c1")
    (bundle.path / "errno.py").write_text("raise SystemExit('evil')")
    (bundle.path / "shim").mkdir()
    (bundle.path / "shim" / "__init__.py").write_text("raise SystemExit('evil')")
    (bundle.path / "config.json").unlink()

    result = shims.start(bundle, env={"PYTHONPATH": str(bundle.path), "PYTHONSTARTUP": "x"})

    assert b"evil" not in result.stdout
    assert b"config.json does not exist" in result.stdout


async def test_signals(shims: Shims) -> None:
    """SIGTERM does not end a shim with containers; SIGHUP and SIGPIPE never do; idle ones end cleanly."""
    bundle = shims.bundle("c1")
    shims.start(bundle)
    await bundle.call("create", task_v2_pb2.CreateTaskRequest(id="c1", bundle="/b"))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        os.kill(bundle.pid, number)
    await bundle.call("state", task_v2_pb2.StateRequest(id="c1"))
    assert "signal ignored" in shims.log(bundle)

    await bundle.call("delete", task_v2_pb2.DeleteRequest(id="c1"))
    os.kill(bundle.pid, signal.SIGTERM)
    assert shims.wait_gone(bundle.pid)


_COLD_START = """
import os, sys
before = set(sys.modules)  # which are Python's own business: os imports errno since 3.13
sys.path[:0] = [{repo!r}]
import shim.launch.launcher as launcher
launcher._fork_daemon = lambda *args: os.getpid()
launcher._adjust_daemon = lambda *args: None
class Done(Exception): pass
def leave(code): raise Done
os._exit, exit_now = leave, os._exit
try:
    launcher.main({argv!r})
except Done:
    pass
os.write(2, " ".join(sorted(set(sys.modules) - before)).encode())
exit_now(0)
"""


async def test_the_daemon_loads_no_openssl(shims: Shims) -> None:
    """It speaks no TLS, and Python's own digests will do."""
    bundle = shims.bundle("c1")
    shims.start(bundle)
    pid = await bundle.serving()
    libraries = Path(f"/proc/{pid}/maps").read_text()
    assert "libc.so" in libraries
    assert "libssl" not in libraries
    assert "libcrypto" not in libraries
    assert shims.delete(bundle).returncode == 0


@pytest.mark.parametrize("pod", [False, True])
def test_start_loads_little(shims: Shims, pod: bool) -> None:
    """`start` loads none of the modules that cost milliseconds (for pods: the JSON parser, no more)."""
    key = "io.kubernetes.cri."
    annotations = {key + "container-type": "sandbox", key + "sandbox-id": "c1"} if pod else None
    bundle = shims.bundle("c1", annotations)
    argv = shims.argv(bundle, "start")[1:]
    result = subprocess.run(
        [sys.executable, "-IS", "-c", _COLD_START.format(repo=str(REPO), argv=argv)],
        cwd=bundle.path,
        env=shims.env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    bundle.socket.unlink()

    loaded = set(result.stderr.split())
    heavy = {"asyncio", "argparse", "typing", "pathlib", "subprocess", "socket", "hashlib", "ctypes"}
    heavy |= {"dataclasses", "logging", "contextlib", "threading", "google", "structlog"}
    assert loaded & heavy == set()
    assert pod or not loaded & {"json", "re", "enum", "__future__", "errno"}
    assert "shim.launch.launcher" in loaded


def test_launcher_script(shims: Shims, tmp_path: Path) -> None:
    """The generated program runs from anywhere, isolated, and prints the version."""
    out = tmp_path / "containerd-shim-kata-v2"
    argv = [sys.executable, "-m", "shim.launch.launcher_script", str(out), "--python", sys.executable]
    subprocess.run([*argv, "--script"], cwd=REPO, check=True, timeout=60)

    assert out.read_text().startswith(f"#!{sys.executable} -IS\n")
    result = subprocess.run([str(out), "-v"], cwd="/", capture_output=True, text=True, timeout=10, check=True)
    assert "version" in result.stdout


@pytest.mark.parametrize(("python", "path"), [("python3", "/x"), ("/a b/python", "/x"), ("/p", "x")])
def test_launcher_script_refuses(python: str, path: str) -> None:
    """Paths that would not work in a #! line or depend on the working directory are refused."""
    with pytest.raises(ValueError, match="path"):
        launcher_script.render(python, [path])
