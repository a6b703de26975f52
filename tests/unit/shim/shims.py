"""Starts real shim processes as containerd would, on directories of the test's own.

`Shims` is a fixture's object: `bundle` makes a bundle, `start` and `delete` run the binary, and at
the end nothing of it may be left: `close` kills what is, and fails the test for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from proto import task_v2_pb2
from shim.launch import launcher_script
from shim.state.identity import Identity
from ttrpc import Client, RpcError

REPO = Path(__file__).parents[3]
STUB = Path(__file__).parent / "stub"
GRPC = "/run/containerd/containerd.sock"
NAMESPACE = "test-ns"
_TASK = task_v2_pb2.DESCRIPTOR.services_by_name["Task"]

_SCRIPT = """#!{python} -IS
import sys
sys.path[:0] = {paths!r}
import shim
shim.__path__.insert(0, {stub!r})
from shim.launch.launcher import main
sys.exit(main())
"""
_CODE = """import sys
sys.path[:0] = {paths!r}
del sys.argv[0]
import shim
shim.__path__.insert(0, {stub!r})
from shim.launch.launcher import main
sys.exit(main(zygote={zygote!r}))"""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle directory, the id that it is for, and whose that is."""

    id: str
    path: Path
    namespace: str = NAMESPACE
    address: str = GRPC

    def read(self, name: str) -> str:
        return (self.path / name).read_text()

    @property
    def pid(self) -> int:
        return int(self.read("shim.pid"))

    @property
    def socket(self) -> Path:
        return Path(self.read("address").removeprefix("unix://"))

    async def call(self, name: str, request: object, timeout: float = 20) -> object:
        """A call of the task service, over a connection of its own."""
        async with await Client.connect_unix(str(self.socket), timeout=5) as client:
            return await getattr(client.stub(_TASK, default_timeout=timeout), name)(request)

    async def serving(self) -> int:
        """The pid of the daemon that answers, whatever it does."""
        async with await Client.connect_unix(str(self.socket), timeout=5) as client:
            with contextlib.suppress(RpcError):
                await client.stub(_TASK, default_timeout=20).connect(task_v2_pb2.ConnectRequest(id=self.id))
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(self.socket))
                return int(struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])


class Shims:
    """See the module. `client`: the program is the compiled one, and a zygote that is started listens at
    `place`. What a zygote wrote to stderr is in the file `said`."""

    def __init__(self, *, client: bool = False) -> None:
        # Short: sockets live below. A tmpfs, as /run is: where each fsync goes to a disk, journals are slow.
        self.root = Path(tempfile.mkdtemp(prefix="ks", dir="/dev/shm"))
        self.program = self.root / "containerd-shim-kata-v2"
        site = [path for path in sys.path if path.endswith("site-packages")]
        self.place = self.root / "z" / "s"
        self.said = self.root / "zygote.log"
        self._zygotes: list[subprocess.Popen[bytes]] = []
        fields = {"paths": [str(REPO), *site], "stub": str(STUB), "zygote": str(self.place)}
        if client:
            self.program.write_bytes(
                launcher_script.filled(
                    Path(launcher_script.CLIENT).read_bytes(),
                    sys.executable,
                    _CODE.format(**fields),
                    str(self.place),
                )
            )
        else:
            self.program.write_text(_SCRIPT.format(python=sys.executable, **fields))
        self.program.chmod(0o755)
        self.env = {
            "PATH": os.environ["PATH"],
            "KATA_SHIM_PREFIX": str(self.root),
        }
        self._fifos: dict[str, int] = {}

    def zygote(self) -> subprocess.Popen[bytes]:
        """Start one, and wait until it listens."""
        with open(self.said, "ab") as said:
            process = subprocess.Popen(
                [str(self.program), "zygote"],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
        self._zygotes.append(process)
        until = time.monotonic() + 30
        while not self.place.exists():
            assert process.poll() is None, self.said.read_text()
            assert time.monotonic() < until
            time.sleep(0.01)
        return process

    def bundle(
        self,
        container_id: str,
        annotations: dict[str, str] | None = None,
        *,
        namespace: str = NAMESPACE,
        address: str = GRPC,
    ) -> Bundle:
        """A bundle as containerd makes it, with its log FIFO."""
        path = self.root / "b" / address.replace("/", "_") / namespace / container_id
        path.mkdir(parents=True)
        spec = {"ociVersion": "1.0.2", "annotations": annotations or {}}
        (path / "config.json").write_text(json.dumps(spec))
        os.mkfifo(path / "log", 0o700)
        self._fifos[str(path)] = os.open(path / "log", os.O_RDWR | os.O_NONBLOCK)
        return Bundle(container_id, path, namespace, address)

    def log(self, bundle: Bundle) -> str:
        """What the shim has logged since the last call."""
        try:
            return os.read(self._fifos[str(bundle.path)], 1 << 16).decode()
        except BlockingIOError:
            return ""

    def argv(self, bundle: Bundle, action: str, *more: str) -> list[str]:
        flags = ["-namespace", bundle.namespace, "-address", bundle.address]
        flags += ["-publish-binary", "/usr/bin/containerd"]
        return [str(self.program), *flags, "-id", bundle.id, *more, action]

    def start(
        self,
        bundle: Bundle,
        *more: str,
        env: dict[str, str] | None = None,
        stdin: bytes | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> subprocess.CompletedProcess[bytes]:
        """Run `start`; stdout is also stderr, as with containerd."""
        return subprocess.run(
            self.argv(bundle, "start", *more),
            cwd=bundle.path,
            env=self.env | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=30,
            check=False,
            pass_fds=pass_fds,
            input=stdin or b"",
        )

    def delete(self, bundle: Bundle, timeout: float = 5) -> subprocess.CompletedProcess[bytes]:
        """Run `delete` within containerd's five seconds."""
        return subprocess.run(
            self.argv(bundle, "delete", "-bundle", str(bundle.path)),
            cwd=bundle.path,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )

    def identity(self, bundle: Bundle) -> Identity:
        """The sandbox that it makes."""
        return Identity(bundle.address, bundle.namespace, bundle.id)

    def state_dir(self, bundle: Bundle) -> Path:
        return Path(str(self.root) + self.identity(bundle).state_dir)

    def share_dir(self, bundle: Bundle) -> Path:
        return Path(str(self.root) + self.identity(bundle).share_dir)

    def link(self, bundle: Bundle) -> Path:
        """Where Kata's tools look."""
        return Path(str(self.root) + self.identity(bundle).link)

    def processes(self) -> list[int]:
        """Live processes that were started with this object's environment."""
        marker = f"KATA_SHIM_PREFIX={self.root}".encode()
        found = []
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if (
                    name.isdigit()
                    and marker in Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
                    and Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
                ):
                    found.append(int(name))
        return found

    def wait_gone(self, pid: int, seconds: float = 10) -> bool:
        """Whether that process ends in time."""
        until = time.monotonic() + seconds
        while pid in self.processes():
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True

    def leftovers(self) -> list[str]:
        """Everything that shims made and that is still there: processes, sockets, directories."""
        left = [f"process {pid}" for pid in self.processes()]
        for where in (
            "/run/containerd/s",
            "/run/kata",
            "/run/kata-shim",
            "/run/kata-containers/shared/sandboxes",
        ):
            with contextlib.suppress(FileNotFoundError):
                left += [f"{where}/{name}" for name in os.listdir(f"{self.root}{where}")]
        return left

    def close(self) -> list[str]:
        """Remove everything; returns what shims had left."""
        for zygote in self._zygotes:
            zygote.kill()
            zygote.wait(10)
        left = self.leftovers()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for fd in self._fifos.values():
            os.close(fd)
        shutil.rmtree(self.root)
        return left


def shims_fixture(*, zygote: bool = False, client: bool = False) -> Iterator[Shims]:
    """The body of a fixture: fails the test if a shim left anything behind. `zygote`: each start goes through
    one; `client`: it could, if the test starts one."""
    shims = Shims(client=zygote or client)
    try:
        if zygote:
            shims.zygote()
        yield shims
    finally:
        refused = shims.said.read_text() if shims.said.exists() else ""
        left = shims.close()
    assert left == []
    assert not (zygote and refused), refused
