"""The rows of the bench: each measures ours and a peer alternately and answers with samples.

Invariants: what is timed is checked to have happened (an exit code, a byte, an answer of the agent);
everything started is ended; no row reads a figure from anywhere but this run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ttrpc
from guest.boot import GuestVM
from proto import health_pb2, task_v2_pb2
from testing import leaks
from testing.containerd import KATA, RUNC, Containerd
from testing.guest import GUEST, PROJECT
from testing.zygote import zygote_of
from tests.bench.figures import Row, Series

__all__ = [
    "Progress",
    "alternate",
    "boot",
    "detached",
    "execs",
    "first_byte",
    "further",
    "memory",
    "pss_by_program",
    "round_trip",
    "start",
    "stdout",
]

IMAGE = "local/busybox:1"
Progress = Callable[[str], None]


def alternate(rounds: int, contenders: dict[str, Callable[[], float]], say: Progress) -> dict[str, Series]:
    """Run all contenders in each round, every other round backwards (A B, B A, ...)."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        names = list(contenders)
        for name in names if number % 2 == 0 else reversed(names):
            samples[name].append(contenders[name]())
        say(f"round {number + 1} of {rounds}: " + ", ".join(f"{n} {samples[n][-1]:.1f}" for n in names))
    return {name: Series(name, tuple(values)) for name, values in samples.items()}


# --- (a) start


def _start_once(binary: str, grpc: str, *, zygote: bool = False, answer: bool = False) -> float:
    """Milliseconds of `BINARY ... start`, or until its daemon gave an `answer`; it is told to shut down then.

    `zygote`: ours came from one, or else must not.
    """
    bundle = tempfile.mkdtemp(prefix="bench-", dir="/tmp")
    container = os.path.basename(bundle)
    try:
        Path(bundle, "config.json").write_text('{"ociVersion": "1.0.2", "annotations": {}}')
        os.mkfifo(f"{bundle}/log", 0o700)
        log = os.open(f"{bundle}/log", os.O_RDWR | os.O_NONBLOCK)
        argv = [binary, "-namespace", "bench", "-address", grpc, "-publish-binary", "/bin/true"]
        begin = time.perf_counter()
        done = subprocess.run(
            [*argv, "-id", container, "start"],
            cwd=bundle,
            capture_output=True,
            check=True,
            timeout=20,
            env={**os.environ, "TTRPC_ADDRESS": "", "KATA_SHIM_ZYGOTE": "" if zygote else "off"},
        )
        took = (time.perf_counter() - begin) * 1000
        address = done.stdout.decode().strip()
        if answer:
            took = asyncio.run(_answered(address)) - begin * 1000
        if Path(bundle, "shim.pid").exists():
            words = Path("/proc", Path(bundle, "shim.pid").read_text(), "cmdline").read_bytes().split(b"\0")
            assert (words[0] == os.fsencode(binary)) == zygote, words
        asyncio.run(_shut_down(address, container))
        os.close(log)
    finally:
        shutil.rmtree(bundle, ignore_errors=True)
    return took


async def _answered(address: str) -> float:
    """When the daemon had answered a first call, in milliseconds of `time.perf_counter`."""
    client = await ttrpc.Client.connect_unix(address.removeprefix("unix://"), timeout=10)
    method = task_v2_pb2.DESCRIPTOR.services_by_name["Task"].methods_by_name["State"]
    with contextlib.suppress(ttrpc.RpcError):  # there is no such container
        await client.call(method, task_v2_pb2.StateRequest(id="none"), timeout=10)
    when = time.perf_counter() * 1000
    await client.close()
    return when


async def _shut_down(address: str, container: str) -> None:
    """Task.Shutdown, and wait until the daemon is gone: the next start shall have the machine alone."""
    assert address.startswith("unix://"), address
    client = await ttrpc.Client.connect_unix(address.removeprefix("unix://"), timeout=10)
    method = task_v2_pb2.DESCRIPTOR.services_by_name["Task"].methods_by_name["Shutdown"]
    with contextlib.suppress(ttrpc.ConnectionClosed, ttrpc.RpcError):
        await client.call(method, task_v2_pb2.ShutdownRequest(id=container, now=True), timeout=10)
    with contextlib.suppress(Exception):
        await asyncio.wait_for(client.closed, 10)
    await client.close()


def start(containerd: Containerd, rounds: int, say: Progress) -> list[Row]:
    """(a) `start` of our shim, and `start` to its first answer, with a zygote and without, against runc's."""
    ours = str(containerd.root / "bin" / "containerd-shim-kata-v2")
    runc = shutil.which("containerd-shim-runc-v2") or "containerd-shim-runc-v2"
    grpc = containerd.address
    contenders: dict[str, Callable[[], float]] = {
        "kata-shim": lambda: _start_once(ours, grpc),
        "runc's shim": lambda: _start_once(runc, grpc),
        "kata-shim, zygote": lambda: _start_once(ours, grpc, zygote=True),
        "kata-shim, zygote, answer": lambda: _start_once(ours, grpc, zygote=True, answer=True),
        "runc's shim, answer": lambda: _start_once(runc, grpc, answer=True),
        "kata-shim, answer": lambda: _start_once(ours, grpc, answer=True),
    }
    with zygote_of(containerd):
        _start_once(ours, grpc, zygote=True)
        series = alternate(rounds, contenders, say)
    rows = [
        ("a1", "start, without a zygote", "kata-shim", "", 1.6),
        ("a2", "start, with a zygote", "kata-shim, zygote", "", 0.6),
        ("a3", "start to the first answer, with a zygote", "kata-shim, zygote, answer", ", answer", 2.0),
        ("a4", "start to the first answer, without", "kata-shim, answer", ", answer", None),
    ]
    return [
        Row(
            key=key,
            title=title,
            unit="ms",
            ours=series[name],
            peer=series[f"runc's shim{peer}"],
            target=target,
        )
        for key, title, name, peer, target in rows
    ]


# --- (b) boot to first output


class Twin(GuestVM):
    """The VM of a running shim once more, bare: the same QEMU arguments, but for sockets' paths."""

    def __init__(self, argv: list[str], share: str) -> None:
        super().__init__(GUEST, share=share)
        self._template = argv
        self.began = 0.0

    def argv(self) -> list[str]:
        """The template with its inherited descriptors replaced; QEMU is started right after this call."""
        places = {
            "qmp": f"path={self.directory}/qmp,server=on,wait=off",
            "char-vsock": f"path={self.directory}/vsock",
            "char-share-fs": f"path={self.directory}/fs",
        }
        argv = []
        for option, given in zip(["", *self._template], self._template, strict=False):
            if "-add-fd" in (option, given):
                continue  # the guest's image, which it opens itself
            word = re.sub(r"/dev/fdset/\d+", f"{GUEST}/rootfs.img", given)
            found = re.match(r"socket,id=([^,]+),fd=\d+", word)
            if found is None:
                argv.append(word)
            elif found[1] in places:
                argv.append(f"socket,id={found[1]},{places[found[1]]}")
            else:
                argv.append(f"stdio,id={found[1]}")  # the console
        self.began = time.perf_counter()
        return argv


async def _boot_bare(argv: list[str]) -> float:
    """Milliseconds from QEMU's exec to the agent's answer to Health.Check."""
    share = tempfile.mkdtemp(prefix="bench-share-")
    service = health_pb2.DESCRIPTOR.services_by_name["Health"]
    try:
        async with Twin(argv, share) as vm:
            await vm.wait_home(60)
            sock, _ = await vm.connect(1024)
            client = ttrpc.Client(sock)
            answer = await client.call(
                service.methods_by_name["Check"], health_pb2.CheckRequest(), timeout=60
            )
            took = (time.perf_counter() - vm.began) * 1000
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            await client.close()
    finally:
        shutil.rmtree(share, ignore_errors=True)
    return took


def first_byte(containerd: Containerd, runtime: str, *, options: Sequence[str] = ()) -> float:
    """Milliseconds from `ctr run --rm` to the first byte of its container's output."""
    words = ("run", "--rm", "--runtime", runtime, *options, IMAGE, containerd.new_id(), "echo", "x")
    argv = containerd.ctr_argv(*words)
    begin = time.perf_counter()
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=containerd.environment) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        took = (time.perf_counter() - begin) * 1000
        process.stdout.read()
        code = process.wait(60)
    assert first == b"x"
    assert code == 0
    return took


def _processes(containerd: Containerd, name: str, word: str = "") -> list[leaks.Process]:
    """Those of the container `name` whose program is called `word...`."""
    return [
        process
        for process in containerd.processes()
        if any(name in part or containerd.key(name) in part for part in process.argv)
        and (not word or word in process.argv[0])
    ]


@contextlib.contextmanager
def detached(containerd: Containerd, runtime: str, *, options: Sequence[str] = ()) -> Iterator[str]:
    """A container that sleeps; its name."""
    name = containerd.new_id("bench")
    words = ("run", "-d", "--runtime", runtime, *options, IMAGE, name, "sleep", "100000")
    containerd.ctr(*words, timeout=120)
    try:
        yield name
    finally:
        containerd.remove(name)


def _qemu_argv(containerd: Containerd) -> list[str]:
    """The QEMU arguments that the shim uses, from a running container."""
    with detached(containerd, KATA) as name:
        (qemu,) = _processes(containerd, name, "qemu-system")
        return list(qemu.argv)


def boot(containerd: Containerd, rounds: int, say: Progress) -> list[Row]:
    """(b) `ctr run` to the first output, against the bare boot of the same VM, and against runc."""
    os.environ.setdefault("VHOST_DEVICE_VSOCK", str(PROJECT / "build/vsock/usr/bin/vhost-device-vsock"))
    argv = _qemu_argv(containerd)
    series = alternate(
        rounds,
        {
            "kata-shim": lambda: first_byte(containerd, KATA),
            "bare QEMU to agent-ready": lambda: asyncio.run(_boot_bare(argv)),
            "runc": lambda: first_byte(containerd, RUNC),
        },
        say,
    )
    ours, bare, runc = (series[n] for n in ("kata-shim", "bare QEMU to agent-ready", "runc"))
    difference = ours.median - bare.median
    return [
        Row(
            key="b1",
            title="ctr run to first output",
            unit="ms",
            ours=ours,
            peer=bare,
            target=1.25,
            notes={"ours minus bare, ms": round(difference, 1)},
        ),
        Row(key="b2", title="ctr run to first output", unit="ms", ours=ours, peer=runc),
    ]


# --- (c) exec


def execs(containerd: Containerd, rounds: int, say: Progress) -> list[Row]:
    """(c) `ctr task exec ... true` against runc's."""
    number = iter(range(1, 1 << 30))

    def once(name: str) -> float:
        begin = time.perf_counter()
        containerd.ctr("task", "exec", "--exec-id", f"e{next(number)}", name, "true")
        return (time.perf_counter() - begin) * 1000

    with detached(containerd, KATA) as kata, detached(containerd, RUNC) as runc:
        series = alternate(rounds, {"kata-shim": lambda: once(kata), "runc": lambda: once(runc)}, say)
    return [
        Row(key="c", title="ctr task exec true", unit="ms", ours=series["kata-shim"], peer=series["runc"])
    ]


# --- (d) ttrpc


def round_trip(_containerd: Containerd, rounds: int, say: Progress) -> list[Row]:
    """(d) a ttrpc round trip against Go's implementation."""
    from tests.bench.ttrpc_roundtrip import rows

    return rows(rounds, say)


# --- (e) memory


def _pss(pid: int) -> float:
    """Proportional set size in MB (smaps_rollup)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"no Pss of {pid}")


def pss_by_program(containerd: Containerd, name: str) -> dict[str, float]:
    """MB of a container's processes, by their programs' beginnings."""
    found: dict[str, float] = {}
    for process in _processes(containerd, name):
        # The shim is an interpreter with a script; the others are themselves.
        programs = [os.path.basename(word) for word in process.argv[:4]]
        kinds = ("qemu-system", "virtiofsd", "vhost-device-vsock", "containerd-shim")
        kind = next((k for k in kinds if any(program.startswith(k) for program in programs)), "")
        if kind:
            found[kind] = found.get(kind, 0.0) + _pss(process.pid)
    return found


def memory(containerd: Containerd, rounds: int, say: Progress) -> list[Row]:
    """(e) PSS of an idle pod's processes; the shim against runc's, and the whole pod against its VMM."""
    samples: dict[str, list[float]] = {}
    for number in range(max(2, rounds // 5)):
        with detached(containerd, KATA) as kata, detached(containerd, RUNC) as runc:
            ours = pss_by_program(containerd, kata)
            for kind, value in ours.items():
                samples.setdefault(kind, []).append(value)
            samples.setdefault("pod", []).append(sum(ours.values()))
            samples.setdefault("runc", []).append(pss_by_program(containerd, runc)["containerd-shim"])
        say(f"round {number + 1}: " + ", ".join(f"{k} {v[-1]:.1f} MB" for k, v in samples.items()))
    series = {kind: Series(kind, tuple(values)) for kind, values in samples.items()}
    notes = {kind: round(each.median, 1) for kind, each in series.items()}
    return [
        Row(
            key="e1",
            title="PSS of the shim",
            unit="MB",
            ours=Series("kata-shim", series["containerd-shim"].samples),
            peer=Series("runc's shim", series["runc"].samples),
            notes=notes,
        ),
        Row(
            key="e2",
            title="PSS of the whole pod",
            unit="MB",
            ours=Series("shim + QEMU + daemons", series["pod"].samples),
            peer=Series("QEMU alone", series["qemu-system"].samples),
            notes=notes,
        ),
    ]


# --- (h) memory of each further shim

_SHIMS = 4  # pods at once


def further(containerd: Containerd, _rounds: int, say: Progress) -> list[Row]:
    """(h) PSS of several pods' shims with a zygote against runc's: at rest, and after work in one of them."""

    def shims(names: list[str]) -> list[float]:
        return [pss_by_program(containerd, name)["containerd-shim"] for name in names]

    with contextlib.ExitStack() as stack:
        stack.enter_context(zygote_of(containerd))
        kata = [stack.enter_context(detached(containerd, KATA)) for _ in range(_SHIMS)]
        runc = [stack.enter_context(detached(containerd, RUNC)) for _ in range(_SHIMS)]
        time.sleep(3)  # what a start has left to do
        rest, peers = shims(kata), shims(runc)
        say("at rest: " + ", ".join(f"{value:.1f}" for value in [*rest, *peers]))
        for number in range(20):
            containerd.ctr("task", "exec", "--exec-id", f"e{number}", kata[-1], "true", timeout=60)
        command = ("dd", "if=/dev/zero", "bs=65536", "count=1280")
        argv = containerd.ctr_argv("task", "exec", "--exec-id", "out", kata[-1], *command)
        done = subprocess.run(argv, capture_output=True, check=True, timeout=200, env=containerd.environment)
        assert len(done.stdout) == 80 << 20
        worked = shims(kata[-1:])
        say(f"after 20 execs and 80 MiB of stdout: {worked[0]:.1f}")
    peer = Series("runc's shim", tuple(peers))
    return [
        Row(key=key, title=f"PSS of each of {_SHIMS} shims, {when}", unit="MB", ours=ours, peer=peer)
        for key, when, ours in (
            ("h1", "at rest", Series("kata-shim, zygote", tuple(rest))),
            ("h2", "after 20 execs and 80 MiB", Series("kata-shim, zygote", tuple(worked))),
        )
    ]


# --- (f) stdout


def stdout(containerd: Containerd, rounds: int, say: Progress) -> list[Row]:
    """(f) MB/s through a container's stdout, from the first byte to the end."""
    size = 64 << 20

    def once(runtime: str) -> float:
        command = ("dd", "if=/dev/zero", "bs=65536", f"count={size >> 16}")
        argv = containerd.ctr_argv("run", "--rm", "--runtime", runtime, IMAGE, containerd.new_id(), *command)
        with subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=containerd.environment
        ) as process:
            assert process.stdout is not None
            got = len(os.read(process.stdout.fileno(), 1))
            begin = last = time.perf_counter()
            while chunk := os.read(process.stdout.fileno(), 1 << 20):
                got += len(chunk)
                last = time.perf_counter()
            assert process.wait(60) == 0
        assert got == size, f"{got} of {size} bytes arrived"
        return size / 1e6 / (last - begin)

    series = alternate(
        max(3, rounds // 4), {"kata-shim": lambda: once(KATA), "runc": lambda: once(RUNC)}, say
    )
    return [
        Row(
            key="f",
            title="container stdout",
            unit="MB/s",
            ours=series["kata-shim"],
            peer=series["runc"],
            more_is_better=True,
        )
    ]
