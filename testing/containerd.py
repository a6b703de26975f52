"""A containerd of one's own: started, driven by `ctr`, and taken away without a trace.

What: `Containerd.start()` runs one of Debian's containerds (VERSIONS) with its own root, state, socket and
plugins, and with our shim in front of its PATH; `ctr()` drives it as a user would, with the ctr of the same
version; `stop()` ends everything that it started and removes its files.
Why: the demo, the tests and the bench must never touch a system containerd, nor depend on its settings.
Invariants: everything lives below one private directory, but for the two places that containerd and
Kata fix: /run/containerd/s (shim sockets) and /run/kata-shim, /run/kata, /run/kata-containers (sandboxes:
`key`, `state_dir`, `share_dir`). Processes that descend from it carry the variable KATA_TEST_TAG=<tag> in
their environment, and container names made by `new_id` carry the tag, so that what a run leaves behind can
be told from other people's.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from testing import leaks
from testing.guest import PROJECT, Value, write_configuration

__all__ = [
    "KATA",
    "PAUSE",
    "RUNC",
    "VERSIONS",
    "Containerd",
    "CtrError",
    "Result",
    "chosen_version",
    "docker_exit_code",
    "install_shim",
    "own_version",
    "programs",
]

KATA = "io.containerd.kata.v2"
RUNC = "io.containerd.runc.v2"
TAG_VARIABLE = "KATA_TEST_TAG"
PAUSE = "docker.io/local/pause:1"
"""The image that the CRI plugin takes for sandboxes. CRI completes short names as Docker does."""

VERSIONS = ("1.6", "1.7", "2")
"""The containerds that there are: the host's own, and those that scripts/setup.sh unpacks beside it."""

BUILT = ("2.3",)
"""Those that no Debian package has yet: `make containerd-2.3` builds them where there is a Go."""

_OWN_NETWORK = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$0" "$@"')
# What `ctr --cni` reads is fixed, /etc/cni/net.d and /opt/cni/bin: in mounts of its own it finds ours there.
_OWN_CNI = (
    "mount -t overlay overlay -o lowerdir=$0/etc:/etc /etc"
    " && mount -t overlay overlay -o lowerdir=$0/opt:/opt /opt"
    ' && exec "$@"'
)
_BLOCKFILE = "io.containerd.snapshotter.v1.blockfile"
_CRI = "io.containerd.grpc.v1.cri"
_CRI_PARTS = ("io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", _CRI)
# Snapshotters and services that are neither needed nor present everywhere; `nri` wants a socket at a place
# that all share. Names that a version does not know do no harm.
_DISABLED = (
    "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.restart",
    "io.containerd.internal.v1.tracing",
    "io.containerd.monitor.container.v1.restart",
    "io.containerd.nri.v1.nri",
    "io.containerd.snapshotter.v1.aufs",
    _BLOCKFILE,
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.erofs",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
)


@dataclass(frozen=True, slots=True)
class Result:
    """The end of one `ctr` call."""

    argv: tuple[str, ...]
    code: int
    out: bytes
    err: bytes
    seconds: float

    @property
    def text(self) -> str:
        """stdout as text, without the white space at its ends."""
        return self.out.decode(errors="replace").strip()

    @property
    def error(self) -> str:
        """stderr as text, without the white space at its ends."""
        return self.err.decode(errors="replace").strip()


class CtrError(Exception):
    """A `ctr` call that had to succeed failed."""

    def __init__(self, result: Result, log_tail: str) -> None:
        super().__init__(
            f"{' '.join(result.argv)}: exit {result.code} after {result.seconds:.1f} s\n"
            f"stdout: {result.text[-2000:]}\nstderr: {result.error[-4000:]}\ncontainerd's log:\n{log_tail}"
        )
        self.result = result


@functools.cache
def own_version() -> str:
    """Which of VERSIONS the host's own is: Debian 12 has 1.6, 13 has 1.7, sid 2. Raises LookupError."""
    asked = subprocess.run(
        ["/usr/bin/containerd", "--version"], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    found = re.search(r"\s[v]?(\d+)\.(\d+)\.", asked)
    version = f"{found[1]}.{found[2]}" if found and found[1] == "1" else found[1] if found else asked
    if version not in VERSIONS:
        raise LookupError(f"/usr/bin/containerd says {asked.strip()!r}: there are {', '.join(VERSIONS)}")
    return version


def chosen_version() -> str:
    """The containerd for tests: KATA_E2E_CONTAINERD, or else the host's own."""
    return os.environ.get("KATA_E2E_CONTAINERD") or own_version()


def programs(version: str) -> Path:
    """The directory of this version's containerd, ctr and runc shim. Raises LookupError if it is not here."""
    if version not in VERSIONS + BUILT:
        raise LookupError(f"no containerd {version!r}: there are {', '.join(VERSIONS + BUILT)}")
    directory = PROJECT / "build/containerd" / version / "usr/bin"
    if not directory.exists() and version == own_version():
        return Path("/usr/bin")
    if not (directory / "containerd").exists():
        target = f"containerd-{version}" if version in BUILT else "setup"
        raise LookupError(f"{directory}/containerd is not there; run `make {target}`")
    return directory


def install_shim(directory: Path) -> Path:
    """Put `containerd-shim-kata-v2` of this checkout into `directory`, as `make install` does; its path."""
    target = directory / "containerd-shim-kata-v2"
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "shim.launch.launcher_script", str(target)],
        check=True,
        cwd=PROJECT,
        stdin=subprocess.DEVNULL,
        timeout=30,
    )
    return target


def _cri_section(root: Path) -> str:
    """The CRI plugin's configuration: nothing of it may lie outside `root`, nor be pulled."""
    plugin = f'plugins."{_CRI}"'
    runtimes = f"{plugin}.containerd.runtimes"
    kata = f'runtime_type = "{KATA}"\n  privileged_without_host_devices = true\n'
    # 1.7's name and 2.x's; each ignores the other's, and 1.6 both.
    shim = kata + '  sandbox_mode = "shim"\n  sandboxer = "shim"\n'
    return (
        f"[{plugin}]\n"
        f'  sandbox_image = "{PAUSE}"\n  disable_tcp_service = true\n  stream_server_port = "0"\n'
        f'[{plugin}.cni]\n  bin_dir = "/usr/lib/cni"\n  conf_dir = "{root}/cni"\n'
        f'[{plugin}.containerd]\n  default_runtime_name = "kata"\n'
        f'[{runtimes}.kata]\n  {kata}  pod_annotations = ["io.katacontainers.*"]\n'
        f"[{runtimes}.kata-shim]\n  {shim}"
        f'[{runtimes}.kata-streaming]\n  {shim}  io_type = "streaming"\n'
        f'[{runtimes}.runc]\n  runtime_type = "{RUNC}"\n'
    )


def _blockfile_section(root: Path) -> str:
    return (
        f'[plugins."{_BLOCKFILE}"]\n  root_path = "{root}/blockfile"\n'
        f'  scratch_file = "{root}/scratch.ext4"\n  fs_type = "ext4"\n  mount_options = []\n'
    )


def _make_ext4(path: Path) -> None:
    """An image file of 64 MiB, most of it sparse."""
    command = ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", str(path), "64M"]
    subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL)


def _cni_network(root: Path, plugin: Mapping[str, object], number: int) -> str:
    """A network with IPv4 and IPv6, addresses counted below `root`."""
    ranges = [[{"subnet": f"10.{number}.0.0/16"}], [{"subnet": f"fd00:{number}::/64"}]]
    routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    ipam = {"type": "host-local", "ranges": ranges, "routes": routes, "dataDir": f"{root}/ipam"}
    plugins = [{**plugin, "ipam": ipam}]
    return json.dumps({"cniVersion": "0.4.0", "name": f"net{number}", "plugins": plugins})


def docker_exit_code(text: str) -> int:
    """What `docker run` ends with when a start fails with this text, by the rules of Docker's client."""
    if any(
        words in text
        for words in (
            "executable file not found",
            "no such file or directory",
            "system cannot find the file specified",
        )
    ):
        return 127
    return 126 if "permission denied" in text or "is a directory" in text else 125


class Containerd:
    """One private containerd. Use it as a context manager, or call `start` and `stop`.

    Shims use `configuration` (KATA_CONF_FILE), written for this checkout's guest with `overrides`
    ({section: {key: value}}); `env` is added to the environment that they inherit; `debug` makes
    containerd, and so the shims, log at debug level; `version` is one of VERSIONS or BUILT, "" the host's
    own; `cri` enables the CRI plugin (testing.cri) and gives the daemon a network of its own, in which
    CNI may do what it likes. Its handlers: `kata` and `runc` with pause containers, `kata-shim` with the
    Sandbox API, `kata-streaming` with that and stdio over ttrpc. `cni` is for `ctr run --cni`: a bridge,
    in a network that the daemon then has of its own too (`in_network`); `network` gives it that one
    alone. `blockfile` (not with 1.6) enables the snapshotter that gives each container an image file of
    64 MiB with ext4 in it.
    """

    def __init__(
        self,
        *,
        overrides: Mapping[str, Mapping[str, Value | None]] | None = None,
        env: Mapping[str, str] | None = None,
        debug: bool = False,
        version: str = "",
        namespace: str = "default",
        cri: bool = False,
        cni: bool = False,
        network: bool = False,
        blockfile: bool = False,
    ) -> None:
        self.version = version or own_version()
        self.programs = programs(self.version)
        self.tag = "k" + secrets.token_hex(3)
        self.root = Path(tempfile.mkdtemp(prefix=f"kata-{self.tag}-", dir="/tmp"))
        self.namespace = namespace
        self.address = str(self.root / "c.sock")
        self.log = self.root / "containerd.log"
        self.configuration = self.root / "configuration.toml"
        self.state = self.root / "state"
        self.ids: list[str] = []
        self._numbers = itertools.count(1)
        self._debug = debug
        self._cri = cri
        self._cni = cni
        self._blockfile = blockfile
        self._own_network = cri or cni or network
        self._env = dict(env or {})
        self._overrides = overrides
        self._process: subprocess.Popen[bytes] | None = None

    # -- where its sandboxes are -----------------------------------------------------------------

    def key(self, name: str, namespace: str = "") -> str:
        """What names the sandbox of the container `name` on the host."""
        return leaks.sandbox_key(self.address, namespace or self.namespace, name)

    def state_dir(self, name: str, namespace: str = "") -> Path:
        """Its journal and private sockets."""
        return Path("/run/kata-shim", self.key(name, namespace))

    def share_dir(self, name: str, namespace: str = "") -> Path:
        """What it shares with its guest."""
        return Path("/run/kata-containers/shared/sandboxes", self.key(name, namespace))

    def processes(self) -> list[leaks.Process]:
        """Its own, those of its shims and of their children."""
        return leaks.own_processes(self.tag, str(self.root), [self.key(name) for name in self.ids])

    # -- life ------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """The daemon's pid; 0 while it is halted."""
        return self._process.pid if self._process else 0

    @property
    def environment(self) -> dict[str, str]:
        """The environment of this containerd and all that it starts."""
        return {
            **os.environ,
            **self._env,
            TAG_VARIABLE: self.tag,
            "KATA_CONF_FILE": str(self.configuration),
            "CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS": "1",  # of cgroup v1, before all that 2.3's ctr says
            "PATH": f"{self.root / 'bin'}:{self.programs}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"
            ":/sbin:/bin",
        }

    def start(self) -> Self:
        """Write the configuration, start the daemon and wait until it answers (a minute at most)."""
        os.chmod(self.root, 0o711)  # noqa: S103  containers of other users reach their root file system through it
        install_shim(self.root / "bin")
        write_configuration(self.configuration, self._overrides)
        config = self.root / "config.toml"
        names = [*_DISABLED, *(() if self._cri else _CRI_PARTS)]
        if self._blockfile:
            names.remove(_BLOCKFILE)
            _make_ext4(self.root / "scratch.ext4")
        disabled = ", ".join(f'"{name}"' for name in names)
        config.write_text(
            # 2.x itself moves what 1.x calls the CRI plugin's sections to where it has them.
            f"version = {3 if self.version[0] == '2' and not self._cri else 2}\n"
            f'root = "{self.root}/root"\nstate = "{self.state}"\n'
            f"disabled_plugins = [{disabled}]\n"
            f'[grpc]\n  address = "{self.address}"\n'
            f'[debug]\n  level = "{"debug" if self._debug else "info"}"\n'
            + (_cri_section(self.root) if self._cri else "")
            + (_blockfile_section(self.root) if self._blockfile else "")
        )
        if self._cri:
            (self.root / "cni").mkdir()
            (self.root / "cni/pods.conflist").write_text(_cni_network(self.root, {"type": "ptp"}, 88))
        if self._cni:
            conf = self.root / "ctr-cni/etc/cni/net.d"
            conf.mkdir(parents=True)
            bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True}
            (conf / "net.conflist").write_text(_cni_network(self.root, bridge, 89))
            (self.root / "ctr-cni/opt/cni").mkdir(parents=True)
            (self.root / "ctr-cni/opt/cni/bin").symlink_to("/usr/lib/cni")
        self.boot()
        return self

    def boot(self) -> None:
        """Start the daemon, also again after `halt`: its state is kept."""
        arguments = ["--config", str(self.root / "config.toml")]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(_OWN_NETWORK if self._own_network else ()),
                    str(self.programs / "containerd"),
                    *arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.root,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while self.ctr("version", check=False, timeout=60).code:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"containerd did not come up:\n{self.log_tail()}")
            time.sleep(0.05)

    def upgrade(self, version: str) -> None:
        """Let the next `boot` start another version over this one's state. 2.x reads 1.x settings too."""
        self.version, self.programs = version, programs(version)

    def halt(self, sig: int = signal.SIGTERM) -> None:
        """End the daemon alone; its shims go on."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(sig)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)

    def stop(self) -> None:
        """End all containers, the daemon, its shims and their children, and remove its files."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                for line in self.ctr("task", "ls", check=False, timeout=10).text.splitlines()[1:]:
                    self.remove(line.split()[0])
        self.halt()
        for name in self.ids:
            if self.state_dir(name).exists():  # cut off while it started or ended
                self._undo(name)
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        for path in leaks.mounts_below(str(self.root)):
            subprocess.run(["umount", "-l", path], check=False, timeout=10, stderr=subprocess.DEVNULL)
        if leaks.mounts_below(str(self.root)):
            raise RuntimeError(f"mounts below {self.root} remain; it is not removed")
        shutil.rmtree(self.root, ignore_errors=True)

    def _undo(self, name: str) -> None:
        """What containerd does when a shim is gone: the shim binary's `delete`."""
        bundle = self.state / "io.containerd.runtime.v2.task" / self.namespace / name
        flags = ["-namespace", self.namespace, "-address", self.address, "-id", name, "-bundle", str(bundle)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [str(self.root / "bin/containerd-shim-kata-v2"), *flags, "delete"],
                check=False,
                cwd=bundle if bundle.is_dir() else self.root,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                timeout=20,
            )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- use -------------------------------------------------------------------------------------

    def new_id(self, hint: str = "c") -> str:
        """A container name that nobody else has."""
        name = f"{self.tag}-{hint}-{next(self._numbers)}"
        self.ids.append(name)
        return name

    def ctr_argv(self, *args: str) -> list[str]:
        """The argv of `ctr` with this daemon's address and namespace."""
        return [str(self.programs / "ctr"), "--address", self.address, "--namespace", self.namespace, *args]

    def in_network(self, *argv: str) -> list[str]:
        """The argv that runs a program in the daemon's network, where CNI's host ends are."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", *argv]

    def ctr(self, *args: str, stdin: bytes | None = None, timeout: float = 120, check: bool = True) -> Result:
        """Run `ctr args...` to its end, `timeout` seconds at most.

        `stdin` is written to its stdin, and closed; without it stdin is empty. Raises CtrError when
        `check` and the exit code is not 0, subprocess.TimeoutExpired after the deadline.
        """
        argv = self.ctr_argv(*args)
        if "--cni" in args:
            etc = str(self.root / "ctr-cni")
            argv = self.in_network("unshare", "--mount", "sh", "-c", _OWN_CNI, etc, *argv)
        begin = time.monotonic()
        done = subprocess.run(
            argv,
            check=False,
            capture_output=True,
            timeout=timeout,
            env=self.environment,
            input=stdin or b"",
        )
        result = Result(tuple(argv), done.returncode, done.stdout, done.stderr, time.monotonic() - begin)
        if check and result.code:
            raise CtrError(result, self.log_tail())
        return result

    def run(
        self,
        image: str,
        *command: str,
        runtime: str = KATA,
        options: Sequence[str] = (),
        stdin: bytes | None = None,
        timeout: float = 120,
        check: bool = True,
        name: str | None = None,
    ) -> Result:
        """`ctr run --rm --runtime RUNTIME OPTIONS IMAGE NAME COMMAND`."""
        name = name or self.new_id()
        return self.ctr(
            "run", "--rm", "--runtime", runtime, *options, image, name, *command,
            stdin=stdin, timeout=timeout, check=check,
        )  # fmt: skip

    def remove(self, name: str, timeout: float = 30) -> None:
        """Kill a container's task if it runs, and remove task and container. Never fails."""
        self.ctr("task", "kill", "-s", "SIGKILL", name, check=False, timeout=timeout)
        self.ctr("task", "rm", "-f", name, check=False, timeout=timeout)
        self.ctr("container", "rm", name, check=False, timeout=timeout)

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of the daemon's log, which is also its shims'."""
        with contextlib.suppress(OSError):
            if stat.S_ISREG(self.log.stat().st_mode):
                return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""
