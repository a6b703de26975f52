"""Walks each failpoint of a container's life: `make test-failpoints`, or `python -m tests.fault.walk --help`.

What: one life without a fault counts the passages (tests/fault/points.py); then one life for each passage and
action. A life is Create with a volume and a disk, Start, Exec, Kill, Wait, Delete, through containerd.
Promise: whatever is broken, each call ends in time, an exit that was promised is told once, afterwards
nothing is left on the host, and the next life under the same id works.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from testing import leaks
from testing.api import Api, Task
from testing.containerd import KATA, Containerd, CtrError
from testing.guest import PROJECT
from testing.images import busybox_image
from tests.fault.points import ACTIONS, VARIABLE

__all__ = ["Walk", "walk_launcher"]

IMAGE = "local/busybox:1"
NAME = "walked"
LIMIT = 90.0
"""Seconds that any one call of a life may take, on a busy machine; what the shim promises is less."""
_SETTLE = 15.0  # seconds for what is told or taken away a moment later
_END = "/testing/end"

_LAUNCHER = """\
#!{python} -IS
import os, sys

{first}
sys.path[:0] = {paths!r}
from shim.launch.launcher import main


def install():
    from tests.fault.points import install

    install()


os.register_at_fork(after_in_child=install)
sys.exit(main())
"""


def walk_launcher(containerd: Containerd, first: str = "") -> None:
    """Let this containerd's shims have failpoints, from now on. `first`: what they do before all else."""
    site = subprocess.run(
        [sys.executable, "-c", "import sysconfig as s; print(s.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    shim = containerd.root / "bin" / "containerd-shim-kata-v2"
    shim.write_text(_LAUNCHER.format(python=sys.executable, paths=[str(PROJECT), site], first=first))


@dataclass(slots=True)
class Life:
    """What came of one life. `wrong`: what broke a promise, a line each."""

    steps: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Walk:
    """The failpoints of one containerd's shims. `points`: their directory."""

    def __init__(self, containerd: Containerd, points: Path, disk: str, volume: Path) -> None:
        self.containerd = containerd
        self._points = points
        self._disk = disk
        self._volume = volume
        self._api = Api(containerd.address, containerd.namespace, containerd.root / "fifos")

    def close(self) -> None:
        """Close the connection."""
        self._api.close()

    def count(self) -> list[str]:
        """The passages of a life in which nothing is broken, by name. Raises AssertionError if it fails."""
        life = self.live()
        assert not life.wrong, life.wrong
        assert life.steps[-1] == "delete", life.steps
        return [line.split(" ", 1)[1] for line in self._passages()]

    def broken(self, number: int, action: str) -> Life:
        """A life in which passage `number` (from 1) goes wrong."""
        (self._points / "plan").write_text(f"{number} {action}")
        try:
            return self.live()
        finally:
            (self._points / "plan").unlink(missing_ok=True)

    @contextlib.contextmanager
    def over(self, directory: str, options: str) -> Iterator[None]:
        """Meanwhile a tmpfs with these options hides the directory."""
        os.makedirs(directory, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "walk", directory], check=True)
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", directory], check=True)

    @contextlib.contextmanager
    def shims_with(self, first: str) -> Iterator[None]:
        """Meanwhile shims begin with this line of Python."""
        walk_launcher(self.containerd, first)
        try:
            yield
        finally:
            walk_launcher(self.containerd)

    def hit(self) -> str:
        """The name of the passage that was broken, which may be another than in the counted life: tasks of
        the daemon overtake each other. "" if the life did not come so far."""
        broken = [line for line in self._passages() if " <- " in line]
        return broken[0].split(" ", 1)[1].rpartition(" <- ")[0] if broken else ""

    def _passages(self) -> list[str]:
        return (self._points / "passages").read_text().splitlines()

    def live(self) -> Life:
        """One life, with its clean-up and the leak count."""
        (self._points / "passages").write_text("")
        life = Life()
        before = self._remains()
        begin = time.monotonic()
        with self._api.events() as next_event:
            task = self._attempt(life)
            self._remove(life)
            self._check_exits(life, next_event, task is not None)
        life.seconds = time.monotonic() - begin
        left = leaks.settle(before, self._remains, timeout=_SETTLE)
        life.wrong += [f"left behind: {kind}: {item}" for kind, items in left.items() for item in items]
        return life

    def _attempt(self, life: Life) -> Task | None:
        """The steps, until one fails; the task if it was created."""
        mount = f"type=bind,src={self._volume},dst=/vol,options=rbind:rw"
        options = ("--runtime", KATA, "--mount", mount, "--device", self._disk)
        self.containerd.ctr("container", "create", *options, IMAGE, NAME, "sleep", "1000")
        task = more = None
        try:
            task = self._api.task(NAME, stdin=False, timeout=LIMIT)
            life.steps.append("create")
            task.start(LIMIT)
            life.steps.append("start")
            more = task.exec("sh", "-c", "echo hello; exit 3", exec_id="e", stdin=False)
            more.start(LIMIT)
            code = more.wait(LIMIT)
            more.delete(LIMIT)
            life.steps.append(f"exec {code}")
            task.kill(9)
            life.steps.append(f"wait {task.wait(LIMIT)}")
            task.delete(LIMIT)
            life.steps.append("delete")
        except grpc.RpcError as error:
            code = error.code()
            life.steps.append(f"{code.name}: {error.details()[-150:]}")
            if code is grpc.StatusCode.DEADLINE_EXCEEDED and "failpoint" not in error.details():
                life.wrong.append(f"a call took longer than {LIMIT:g} s")
            for each in (more, task):
                if each is not None and each.io.directory.exists():
                    each.io.close()
        return task

    def _remove(self, life: Life) -> None:
        begin = time.monotonic()
        try:
            self.containerd.remove(NAME, timeout=LIMIT)
        except subprocess.TimeoutExpired as error:
            life.wrong.append(f"the clean-up hangs: {error}")
        except CtrError as error:
            life.wrong.append(str(error))
        if time.monotonic() - begin > LIMIT / 2:
            life.wrong.append(f"the clean-up took {time.monotonic() - begin:.0f} s")

    def _check_exits(self, life: Life, next_event: Any, created: bool) -> None:
        ends, pids = 0, list[int]()
        until = time.monotonic() + _SETTLE
        self._api.publish(_END)
        with contextlib.suppress(queue.Empty):
            while True:
                topic, event = next_event(_SETTLE)
                if topic == "/tasks/exit" and event.container_id == NAME and event.id == NAME:
                    pids.append(event.pid)
                ends += topic == _END
                # containerd tells the exit of a task whose shim died when its `delete` has ended.
                if ends and (len(pids) >= created or time.monotonic() > until):
                    break
                if topic == _END:
                    time.sleep(0.1)
                    self._api.publish(_END)
        # Of a shim that is gone before its task was deleted containerd tells an exit, with the shim's pid,
        # whether one was told before or not.
        if created and not pids:
            life.wrong.append("no exit was told of a task that was created")
        if len(pids) != len(set(pids)) or len(pids) > 2:
            life.wrong.append(f"{len(pids)} exits were told, by the processes {pids}")

    def _remains(self) -> dict[str, set[str]]:
        daemon = self.containerd
        sockets = [leaks.shim_socket(daemon.address, daemon.namespace, NAME)]
        return leaks.snapshot(tag="", root=str(daemon.root), sockets=sockets, ignore=[daemon.pid])


@contextlib.contextmanager
def walking() -> Iterator[Walk]:
    """A containerd, an image, a disk, a volume: all that lives need."""
    with tempfile.TemporaryDirectory(prefix="kata-walk-", dir="/tmp") as folder:
        points = Path(folder, "points")
        points.mkdir()
        volume = Path(folder, "volume")
        volume.mkdir()
        image = Path(folder, "disk")
        with image.open("wb") as file:
            file.truncate(16 << 20)
        disk = subprocess.run(
            ["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=True
        ).stdout.strip()
        try:
            with Containerd(env={VARIABLE: str(points)}) as containerd:
                archive = Path(folder, "image.tar")
                busybox_image(archive, IMAGE)
                containerd.ctr("image", "import", str(archive))
                walk_launcher(containerd)
                walk = Walk(containerd, points, disk, volume)
                try:
                    yield walk
                finally:
                    walk.close()
        finally:
            subprocess.run(["losetup", "-d", disk], check=False)


def main() -> int:
    """Walk; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault.walk", description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="only every Nth pair of passage and action")
    parser.add_argument("--action", choices=ACTIONS, action="append", help="default: all")
    parser.add_argument("--passage", type=int, help="this one only")
    parser.add_argument("--first", type=int, default=1, help="begin at this passage (default: %(default)s)")
    options = parser.parse_args()
    wrong = 0
    with walking() as walk:
        names = walk.count()
        numbers = [options.passage] if options.passage else range(options.first, len(names) + 1)
        pairs = [(number, action) for number in numbers for action in options.action or ACTIONS]
        pairs = pairs[:: options.every]
        print(f"{len(names)} passages, {len(pairs)} lives", flush=True)
        for number, action in pairs:
            life = walk.broken(number, action)
            wrong += bool(life.wrong)
            verdict = "; ".join(life.wrong) or "ok"
            passage = walk.hit() or f"({names[number - 1]})"
            line = f"{number:3} {passage:34} {action:8} {life.seconds:5.1f} s  {life.steps[-1][:60]:60} "
            print(line + verdict, flush=True)
    print(f"{len(pairs)} lives, {wrong} broke a promise")
    return 1 if wrong else 0


if __name__ == "__main__":
    if os.geteuid():
        sys.exit("walk: run it as root")
    sys.exit(main())
