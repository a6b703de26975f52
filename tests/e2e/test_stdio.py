"""Standard streams through a real VM: every form that containerd's clients ask for, slow readers included.

`KATA_E2E_BYTES` is how much output the memory test sends (32 MiB; `make test-containerds`: 1 GiB).
"""

from __future__ import annotations

import ast
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import ttrpc
from proto import agent_pb2
from shim.state.journalfile import load
from testing import leaks
from testing.api import Api
from testing.containerd import Containerd

BUSYBOX = "local/busybox:1"
TASKS = "containerd.services.tasks.v1.Tasks"
FLOOD = int(os.environ.get("KATA_E2E_BYTES") or 32 << 20)
GROWTH = 8 << 20  # bytes that a daemon may grow by while any amount of output flows


def wait_until(condition: Callable[[], Any], what: str, timeout: float = 60) -> Any:
    """The condition's value as soon as it is true."""
    until = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < until, what
        time.sleep(0.02)
    return value


@dataclass
class Exec:
    """A started process of the sleeping container, with streams of the test's choice."""

    api: Api
    container: str
    exec_id: str

    def wait(self, timeout: float = 60) -> int:
        return int(self._call("Wait", timeout).exit_status)

    def delete(self) -> None:
        self._call("DeleteProcess", 60)

    def _call(self, method: str, timeout: float) -> Any:
        return self.api.call(
            TASKS, method, timeout=timeout, container_id=self.container, exec_id=self.exec_id
        )


@pytest.fixture
def start(api: Api, containerd: Containerd, sleeper: str) -> Callable[..., Exec]:
    """Run a process in the sleeping container, its stdout and stderr as given."""

    def _start(*command: str, **streams: object) -> Exec:
        exec_id = containerd.new_id("stdio")
        spec = {"args": list(command), "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}}
        body = {
            "type_url": "types.containerd.io/opencontainers/runtime-spec/1/Process",
            "value": json.dumps(spec).encode(),
        }
        api.call(TASKS, "Exec", timeout=60, container_id=sleeper, exec_id=exec_id, spec=body, **streams)
        api.call(TASKS, "Start", container_id=sleeper, exec_id=exec_id)
        return Exec(api, sleeper, exec_id)

    return _start


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path, 0o600)
    return path


# --- loggers

_LOGGER = """\
#!{python} -ISE
import os, select, sys, threading, time
log = sys.argv[sys.argv.index("log") + 1]
def save(name, text):
    with open(log + "." + name + ".new", "w") as file:
        file.write(text)
    os.rename(log + "." + name + ".new", log + "." + name)
save("argv", repr((sys.argv[1:], os.environ["CONTAINER_ID"], os.environ["CONTAINER_NAMESPACE"])))
save("pid", str(os.getpid()))
def copy(fd, name):
    with open(log + "." + name, "wb", buffering=0) as file:
        while data := os.read(fd, 1 << 16):
            file.write(data)
errors = threading.Thread(target=copy, args=(4, "stderr"))
errors.start()
{before}
os.close(5)
{wait}
copy(3, "stdout")
errors.join()
{after}
"""
# Full is a pipe whose 16 pages are all begun: how many bytes they hold depends on the size of the writes.
_UNTIL_FULL_AND_TOLD = """\
end = os.open("/proc/self/fd/3", os.O_WRONLY | os.O_NONBLOCK)
while select.select([], [end], [], 0)[1]:
    time.sleep(0.01)
os.close(end)
save("full", "")
while not os.path.exists(log + ".go"):
    time.sleep(0.01)
"""
_STUBBORN = """\
import signal
signal.signal(signal.SIGTERM, lambda *_: save("term", ""))
while True:
    time.sleep(1)
"""


def _logger(tmp_path: Path, *, before: str = "", wait: str = "", after: str = "") -> tuple[str, str]:
    """(the URL of a logger of our own, the prefix of the files that it writes)."""
    program = tmp_path / "logger"
    program.write_text(_LOGGER.format(python=sys.executable, before=before, wait=wait, after=after))
    program.chmod(0o755)
    log = str(tmp_path / "log")
    return f"binary://{program}?log={log}&flag=", log


def test_a_binary_logger_of_a_detached_container(
    containerd: Containerd, runtime: str, tmp_path: Path, no_leaks: Callable[[], None]
) -> None:
    """The way of `nerdctl run -d`: the container waits for the logger to be ready, and for it to read."""
    url, log = _logger(
        tmp_path,
        before="time.sleep(0.5)\nsave('ready', str(time.time()))\n"
        "fds = os.listdir('/proc/self/fd')[:-1]\n"
        "save('has', repr((list(os.environ), {fd: os.readlink('/proc/self/fd/' + fd) for fd in fds})))",
        wait=_UNTIL_FULL_AND_TOLD,
    )
    name = containerd.new_id("logged")
    script = "date +%s >&2; head -c 8388608 /dev/zero; echo done >&2; exit 7"
    containerd.ctr("run", "-d", "--runtime", runtime, "--log-uri", url, BUSYBOX, name, "sh", "-c", script)
    try:
        environment, descriptors = ast.literal_eval(Path(log + ".has").read_text())
        assert set(environment) - {"LC_CTYPE"} == {"CONTAINER_ID", "CONTAINER_NAMESPACE"}  # Python's own
        inherited = {fd for fd, link in descriptors.items() if not link.startswith(log)}
        assert inherited <= {"0", "1", "2", "3", "4", "5"}
        assert Path(log + ".argv").read_text() == repr((["log", log, "flag", ""], name, containerd.namespace))
        wait_until(lambda: os.path.exists(log + ".full"), "the logger's pipe did not fill")
        begin = wait_until(Path(log + ".stderr").read_text, "nothing on stderr")
        assert float(begin) >= float(Path(log + ".ready").read_text()) - 2, (
            "it ran before the logger was ready"
        )
        assert "done" not in begin, "eight megabytes fit into nothing between them"
        Path(log + ".go").touch()
        wait_until(lambda: "STOPPED" in _status(containerd, name), "it did not end")
        assert "done" in Path(log + ".stderr").read_text()
        assert Path(log + ".stdout").stat().st_size == 8 << 20
        removed = containerd.ctr("task", "rm", name, check=False)
        assert removed.code == 7 or not removed.code, removed.error
        pid = int(Path(log + ".pid").read_text())
        wait_until(lambda: not leaks.lives(pid), "the logger outlived its container")
    finally:
        containerd.remove(name)
    no_leaks()


def _status(containerd: Containerd, name: str) -> str:
    return next(
        (line for line in containerd.ctr("task", "ls").text.splitlines() if line.startswith(name)), ""
    )


@pytest.mark.kata_only
def test_a_logger_that_does_not_end_is_killed_at_delete(start: Callable[..., Exec], tmp_path: Path) -> None:
    url, log = _logger(tmp_path, after=_STUBBORN)
    process = start("echo", "hello", stdout=url)
    assert process.wait() == 0
    pid = int(Path(log + ".pid").read_text())
    assert leaks.lives(pid), "a logger has time to finish until the delete"
    process.delete()
    assert Path(log + ".stdout").read_text() == "hello\n"
    assert os.path.exists(log + ".term"), "it was asked first"
    assert not leaks.lives(pid)


_SLOW = "time.sleep(0.5)\nsave('all', open(log + '.stdout').read())"


@pytest.mark.kata_only
@pytest.mark.parametrize(("after", "left"), [(_SLOW, "all"), (_STUBBORN, "term")], ids=["slow", "stubborn"])
def test_kill_9_of_the_shim_leaves_no_logger(
    containerd: Containerd,
    runtime: str,
    tmp_path: Path,
    no_leaks: Callable[[], None],
    after: str,
    left: str,
) -> None:
    """`delete` gives it the time to write down what it has got, then ends it."""
    url, log = _logger(tmp_path, after=after)
    name = containerd.new_id("logged")
    script = "echo hello; sleep 1000"
    containerd.ctr("run", "-d", "--runtime", runtime, "--log-uri", url, BUSYBOX, name, "sh", "-c", script)
    try:
        pid = int(Path(log + ".pid").read_text())
        wait_until(lambda: Path(log + ".stdout").read_text() == "hello\n", "nothing was logged")
        bundle = containerd.state / "io.containerd.runtime.v2.task" / containerd.namespace / name
        os.kill(int((bundle / "shim.pid").read_text()), signal.SIGKILL)
        wait_until(lambda: not bundle.exists(), "containerd did not clean up")
        assert not leaks.lives(pid), "it outlived its shim"
        assert os.path.exists(f"{log}.{left}")
    finally:
        containerd.remove(name)
    no_leaks()


@pytest.mark.kata_only
def test_a_logger_that_cannot_start_is_named(start: Callable[..., Exec], tmp_path: Path) -> None:
    url, _ = _logger(tmp_path, before="os._exit(1)")
    with pytest.raises(Exception, match="ended at once"):
        start("true", stdout=url)
    with pytest.raises(Exception, match="/no/such/logger"):
        start("true", stdout="binary:///no/such/logger")


# --- files and pipes


@pytest.mark.kata_only  # runc's shim loses lines when both streams have the same file
def test_a_file_is_made_with_its_directories_and_appended_to(
    start: Callable[..., Exec], tmp_path: Path
) -> None:
    log = tmp_path / "a/b/log"
    for word in ("one", "two"):
        process = start(
            "sh", "-c", f"echo {word}; echo {word}-err >&2", stdout=f"file://{log}", stderr=f"file://{log}"
        )
        assert process.wait() == 0
        process.delete()
    assert sorted(log.read_text().split()) == ["one", "one-err", "two", "two-err"]
    assert [path.stat().st_mode & 0o777 for path in (log, log.parent)] == [0o644, 0o755]


@pytest.mark.kata_only
@pytest.mark.parametrize("scheme", ["pipe", "fifo"])
def test_a_fifo_by_url(start: Callable[..., Exec], fifo: Path, scheme: str) -> None:
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        process = start("echo", "hello", stdout=f"{scheme}://{fifo}")
        assert process.wait() == 0
        assert os.read(reader, 100) == b"hello\n"
        process.delete()
        assert os.read(reader, 100) == b""
    finally:
        os.close(reader)


@pytest.mark.kata_only
def test_output_is_readable_after_the_exit(start: Callable[..., Exec], fifo: Path) -> None:
    """Nobody reads while it runs; who comes between its end and its deletion finds everything."""
    process = start("sh", "-c", "seq 1 1000; exit 5", stdout=str(fifo))
    assert process.wait() == 5
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        found = b""
        while data := os.read(reader, 1 << 16):
            found += data
    finally:
        os.close(reader)
    assert found == b"".join(b"%d\n" % number for number in range(1, 1001))
    process.delete()


@pytest.mark.kata_only
def test_a_background_process_does_not_hold_up_the_exit(start: Callable[..., Exec], fifo: Path) -> None:
    """It keeps the pipe open, for longer than anybody waits."""
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        process = start("sh", "-c", "sleep 10000 & echo $!; exit 4", stdout=str(fifo))
        begin = time.monotonic()
        assert process.wait(timeout=60) == 4
        waited = time.monotonic() - begin
        left = int(os.read(reader, 100))
        process.delete()
    finally:
        os.close(reader)
    killer = start("kill", "-9", str(left))
    assert killer.wait() == 0, "the background process itself lives on"
    killer.delete()
    assert waited < 30


# --- memory


def _resident(pid: int) -> int:
    """Bytes that were resident at most since `_forget_peak`."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def _agent_resident(sandbox: str) -> int:
    """Bytes that the agent has resident now, asked over a connection of our own."""
    import asyncio
    import socket

    async def ask() -> str:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        (shim,) = [
            each.facts for each in load(f"/run/kata/{sandbox}").records if each.facts.get("name") == "shim"
        ]
        sock.connect(f"/proc/{shim['pid']}/root/run/kata/{sandbox}/v/kata.hvsock")  # in its own mounts
        sock.sendall(b"CONNECT 1024\n")
        while not sock.recv(1).endswith(b"\n"):
            pass
        sock.setblocking(False)
        service = agent_pb2.DESCRIPTOR.services_by_name["AgentService"]
        async with ttrpc.Client(sock) as client:
            method = service.methods_by_name["GetMetrics"]
            answer: Any = await client.call(method, agent_pb2.GetMetricsRequest(), timeout=30)
        return str(answer.metrics)

    for line in asyncio.run(ask()).splitlines():
        if line.startswith("kata_agent_resident_bytes "):
            return int(float(line.split()[1]))
    raise AssertionError("the agent does not tell its size")


@pytest.mark.kata_only
@pytest.mark.timeout(900)
def test_memory_does_not_grow_with_the_output(
    containerd: Containerd, sleeper: str, start: Callable[..., Exec], fifo: Path
) -> None:
    bundle = containerd.state / "io.containerd.runtime.v2.task" / containerd.namespace / sleeper
    shim = int((bundle / "shim.pid").read_text())
    warm = start("head", "-c", "1000000", "/dev/zero", stdout="file:///dev/null")
    assert warm.wait() == 0
    warm.delete()
    Path(f"/proc/{shim}/clear_refs").write_text("5")  # forget the peak: proc(5)
    before, agent_before = _resident(shim), _agent_resident(sleeper)

    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(reader, fcntl.F_SETFL, 0)
    process = start("dd", "if=/dev/zero", "bs=65536", f"count={FLOOD >> 16}", stdout=str(fifo))
    received = 0
    begin = time.monotonic()

    def read() -> None:
        nonlocal received
        while data := os.read(reader, 1 << 20):
            received += len(data)

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: received > FLOOD // 4, "the output does not flow", timeout=600)
    agent_while = _agent_resident(sleeper)
    assert received < FLOOD, "it was measured too late"
    assert process.wait(timeout=600) == 0
    process.delete()
    thread.join(60)
    os.close(reader)
    seconds = time.monotonic() - begin
    grown, agent_grown = _resident(shim) - before, agent_while - agent_before
    print(
        f"{FLOOD >> 20} MiB in {seconds:.1f} s, {(FLOOD >> 20) / seconds:.0f} MiB/s;"
        f" shim {before >> 10} + {grown >> 10} KiB, agent {agent_before >> 10} + {agent_grown >> 10} KiB"
    )
    assert received == FLOOD
    assert grown < GROWTH
    assert agent_grown < GROWTH
