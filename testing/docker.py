"""Docker of one's own, over a containerd of one's own: driven by `docker` as a user drives it.

What: `Docker.start` runs one of Debian's dockerds (SUITES) with its own data, state and socket, in the
network of its containerd (`Containerd(network=True)`), where its bridges and rules of iptables touch nobody;
calling it is `docker ARGUMENTS...`. `stop` ends its containers and the daemon.
Why unpacked, not installed: Docker's package would start a daemon that changes the host's network.
Invariants: everything lives below the containerd's directory, but for the cgroups below `/TAG`, which `stop`
removes; the files go with the containerd's. The processes carry its tag.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from testing import leaks
from testing.containerd import KATA, Containerd, Result
from testing.guest import PROJECT

__all__ = ["NAMESPACE", "SUITES", "Docker", "DockerError", "missing"]

SUITES = ("trixie", "sid")
"""The Debian releases whose Docker scripts/setup.sh unpacks: 26.1.5 and 28.5.2 when this was written."""
NAMESPACE = "moby"
"""Of containerd, which Docker's containers are in."""


class DockerError(Exception):
    """A call of `docker` that had to succeed failed."""

    def __init__(self, result: Result, log: str) -> None:
        super().__init__(
            f"docker {' '.join(result.argv[3:])}: exit {result.code} after {result.seconds:.1f} s\n"
            f"stdout: {result.text[-2000:]}\nstderr: {result.error[-4000:]}\nthe daemons' logs:\n{log}"
        )


def _programs(suite: str) -> Path:
    return PROJECT / "build/docker" / suite / "usr"


def missing(suite: str) -> str:
    """What is missing to run this one, "" for nothing."""
    for program in (_programs(suite) / "sbin/dockerd", Path("/usr/sbin/iptables")):
        if not program.exists():
            return f"{program} is not there; run `make setup`"
    return ""


class Docker:
    """One dockerd over `containerd`, whose `network` and namespace (NAMESPACE) it has. Use it as a context
    manager, or call `start` and `stop`."""

    def __init__(
        self, suite: str, containerd: Containerd, settings: Mapping[str, object] | None = None
    ) -> None:
        self.suite = suite
        self.containerd = containerd
        self.root = containerd.root / "docker"
        self.log = self.root / "dockerd.log"
        self._settings = dict(settings or {})
        self._socket = f"unix://{self.root}/d.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Write daemon.json, start the daemon and wait until it answers (a minute at most)."""
        self.root.mkdir()
        os.chmod(self.root, 0o711)  # noqa: S103  as its containerd's
        settings = {
            "data-root": f"{self.root}/data",
            "exec-root": f"{self.root}/exec",
            "pidfile": f"{self.root}/d.pid",
            "hosts": [self._socket],
            "containerd": self.containerd.address,
            "cgroup-parent": f"/{self.containerd.tag}",
            "storage-driver": "overlay2",
            "default-runtime": KATA,
            "userland-proxy-path": str(_programs(self.suite) / "sbin/docker-proxy"),
            "init-path": str(_programs(self.suite) / "bin/tini-static"),
            "bip": "10.87.0.1/24",
            "default-address-pools": [{"base": "10.88.0.0/16", "size": 24}],
            "live-restore": True,
            **self._settings,
        }
        (self.root / "daemon.json").write_text(json.dumps(settings))
        self.boot()
        return self

    def boot(self) -> None:
        """Start the daemon, also again after `halt`."""
        program = str(_programs(self.suite) / "sbin/dockerd")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.containerd.in_network(program, "--config-file", f"{self.root}/daemon.json"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                cwd=self.root,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while self("version", check=False).code:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"dockerd did not come up:\n{self.log_tail()}")
            time.sleep(0.05)

    def halt(self, sig: int = signal.SIGTERM) -> None:
        """End the daemon alone."""
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(sig)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)

    def stop(self) -> None:
        """End all containers and the daemon."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                if names := self("ps", "-aq", check=False, timeout=20).text.split():
                    self("rm", "-f", *names, check=False, timeout=60)
        self.halt()
        # On a mount that is not shared dockerd mounts its data on itself, and 28.5 leaves it so when it ends.
        # What else is mounted there is somebody's leak, and stays to be seen.
        if (data := str(self.root / "data")) in leaks.mounts_below(data):
            subprocess.run(["umount", data], check=False, timeout=30)
        for hierarchy in Path("/sys/fs/cgroup").glob(f"**/{self.containerd.tag}"):
            for directory, _, _ in os.walk(hierarchy, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def environment(self) -> dict[str, str]:
        """Its containerd's. Settings of the user's own client do not count."""
        path = self.containerd.environment["PATH"]
        return {
            **self.containerd.environment,
            "PATH": f"{_programs(self.suite)}/sbin:{path}",
            "DOCKER_CONFIG": f"{self.root}/client",
        }

    def argv(self, *args: str) -> list[str]:
        """The argv of `docker` for this daemon."""
        return [str(_programs(self.suite) / "bin/docker"), "--host", self._socket, *args]

    def __call__(self, *args: str, stdin: bytes = b"", timeout: float = 120, check: bool = True) -> Result:
        """`docker args...`, to its end. Raises DockerError when `check` and the exit code is not 0,
        subprocess.TimeoutExpired after the deadline."""
        argv = self.argv(*args)
        begin = time.monotonic()
        done = subprocess.run(
            argv, check=False, capture_output=True, timeout=timeout, env=self.environment, input=stdin
        )
        result = Result(tuple(argv), done.returncode, done.stdout, done.stderr, time.monotonic() - begin)
        if check and result.code:
            raise DockerError(result, self.log_tail())
        return result

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of dockerd's log, then of containerd's, which is also the shims'."""
        with contextlib.suppress(OSError):
            own = self.log.read_text(errors="replace").splitlines()[-lines:]
            return "\n".join([*own, "--", self.containerd.log_tail(lines)])
        return ""
