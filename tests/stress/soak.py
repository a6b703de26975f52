"""Lives of containers and pods in parallel, with random faults, for as long as one wants: `make soak`.

What: `Soak.run` lets workers create, exec, kill and delete in two namespaces that use the same ids, breaks
things meanwhile (SIGKILL and SIGSTOP of a pod's processes, a client that goes away, containerd killed), and
answers a `Tally`: cycles, faults, what was left behind, exits that were lost or told twice, lives that
somebody else's fault ended, and how long containerd was kept waiting.
Why: single faults are tested one by one; this shows what they do to one another and to bystanders.
Invariants: the same seed plans the same lives and faults; each call has a deadline; whatever fails is told,
never raised, and removed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from testing import leaks
from testing.api import Api, Task
from testing.containerd import KATA, VERSIONS, Containerd, own_version
from testing.images import busybox_image

__all__ = ["FAULTS", "Soak", "Tally"]

IMAGE = "local/busybox:1"
NAMESPACES = ("soak-a", "soak-b")
FAULTS = (
    "kill vmm",
    "kill virtiofsd",
    "kill vsock",
    "kill shim",
    "stop vmm",
    "stop virtiofsd",
    "stop vsock",
    "stop all",
    "cancel create",
    "kill twice",
    "kill under execs",
    "containerd",
)
"""What a life may suffer. The processes are those of its own VM; "containerd" is everybody's."""
LIMIT = 120.0
"""Seconds for one call on a machine that boots several VMs at once."""
ENDED = 30.0
"""Seconds from a SIGKILL to the exit of a pod that is wedged: the shim's bound, and room for a busy host."""
BLOCKED = 10.0
"""Seconds that containerd may be kept from answering others."""
_SETTLE = 270.0  # a shim whose containerd was killed before Create ends after two idle looks, 120 s apart
_END = "/testing/end"
_ANNOTATION = "io.kubernetes.cri."
_PROGRAMS = {"vmm": "qemu-system", "virtiofsd": "virtiofsd", "vsock": "vhost-device-vsock"}


@dataclass(slots=True)
class Tally:
    """What came of it. `wrong`: a line for each broken promise; empty: all is well."""

    cycles: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    exits: int = 0
    slowest: float = 0.0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """Some lines for people."""
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items()))
        return (
            f"{self.cycles} lives in {self.seconds:.0f} s, {self.faults.total()} faults ({kinds})\n"
            f"{self.exits} exits told, containerd's slowest answer {self.slowest:.1f} s\n"
            f"{len(self.wrong) or 'no'} promises broken (leaks, lost or doubled exits, lives ended by others)"
        )


@dataclass(slots=True)
class Life:
    """One container or pod. `touched`: it saw a restart of containerd, so its events may have missed us."""

    namespace: str
    name: str
    fault: str
    members: int
    created: Counter[str] = field(default_factory=Counter)
    touched: bool = False


class Soak:
    """`faults` lives with a fault among others without, `parallel` at a time."""

    def __init__(
        self,
        containerd: Containerd,
        *,
        image: str,
        faults: int,
        parallel: int,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self.tally = Tally()
        self._containerd = containerd
        self._image = image
        self._parallel = parallel
        self._say = say
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._restart = threading.Lock()  # one restart of containerd at a time
        self._restarts = 0
        self._away = threading.Event()
        self._exits: Counter[tuple[str, str]] = Counter()
        self._free = {name: [f"{containerd.tag}-{n}" for n in range(parallel)] for name in NAMESPACES}
        root = containerd.root / "fifos"
        self._apis = {name: Api(containerd.address, name, root / name) for name in NAMESPACES}
        self._plan = self._make_plan(faults)

    def _make_plan(self, faults: int) -> list[tuple[str, int, float]]:
        """(fault, members, a moment between 0 and 1) of each life; every fifth is a bystander without one."""
        plan: list[tuple[str, int, float]] = []
        for number in range(faults):
            kind = self._random.choice(FAULTS)
            if kind == "containerd" and self._random.random() < 0.7:
                kind = "kill vmm"  # a restart disturbs everybody's bookkeeping
            plan.append((kind, self._random.choice((0, 0, 0, 2)), self._random.random()))
            if number % 4 == 0:
                plan.append(("", self._random.choice((0, 0, 2)), 0.0))
        self._random.shuffle(plan)
        return plan

    def run(self) -> Tally:
        """Live them all."""
        before = self._remains()
        begin = time.monotonic()
        finished = threading.Event()
        threads = [
            threading.Thread(target=work, args=(finished,))
            for work in (self._probe, self._report, self._listen)
        ]
        for thread in threads:
            thread.start()
        try:
            with ThreadPoolExecutor(self._parallel) as pool:
                for future in [pool.submit(self._one, *each) for each in self._plan]:
                    future.result()
            time.sleep(2)
        finally:
            finished.set()
            for thread in threads:
                thread.join()
            for api in self._apis.values():
                api.close()
        self.tally.seconds = time.monotonic() - begin
        left = leaks.settle(before, self._remains, timeout=_SETTLE)
        self.tally.wrong += [f"left behind: {kind}: {item}" for kind, items in left.items() for item in items]
        return self.tally

    # --- one life

    def _one(self, fault: str, members: int, moment: float) -> None:
        namespace, name = self._take()
        life = Life(namespace, name, fault, members)
        restarts = self._restarts
        before = self._told(life)
        try:
            self._live(life, moment)
        except (grpc.RpcError, OSError, TimeoutError, subprocess.SubprocessError, RuntimeError) as error:
            what = error.details() if isinstance(error, grpc.RpcError) else str(error)
            life.touched |= self._restarts != restarts or self._away.is_set()
            if not fault and not life.touched:
                self._complain(life, f"a bystander failed: {type(error).__name__}: {str(what)[:300]}")
        self._clean(life)
        life.touched |= self._restarts != restarts
        if not life.touched:
            self._check_exits(life, before)
        with self._lock:
            self.tally.cycles += 1
            self.tally.faults.update([fault] if fault else [])
            self._free[namespace].append(name)

    def _take(self) -> tuple[str, str]:
        """An id that is free in its namespace: often one that is used in the other."""
        with self._lock:
            namespace = max(NAMESPACES, key=lambda each: (len(self._free[each]), each))
            return namespace, self._free[namespace].pop(0)

    def _live(self, life: Life, moment: float) -> None:
        script = "trap 'exit 7' USR1; echo up; while :; do sleep 1; done"
        pod = {f"{_ANNOTATION}sandbox-id": life.name} if life.members else {}
        own = pod | {f"{_ANNOTATION}container-type": "sandbox"} if pod else {}
        if life.fault == "cancel create":
            with contextlib.suppress(grpc.RpcError):
                self._task(life, life.name, script, own, timeout=0.3 + moment * 5)
            return
        tasks = [self._task(life, life.name, script, own)]
        tasks[0].start(LIMIT)
        member = pod | {f"{_ANNOTATION}container-type": "container"}
        for number in range(life.members):
            tasks.append(self._task(life, f"{life.name}-m{number}", script, member))
            tasks[-1].start(LIMIT)
        for task in tasks[1:] or tasks:  # what holds a pod together runs no program of the image
            task.io.wait_for(b"up", LIMIT)
        self._exec(tasks[-1], "first")
        if life.fault:
            self._break(life, tasks[0])
        if life.fault == "kill under execs":
            for number in range(5):
                tasks[-1].exec("sleep", "1000", exec_id=f"s{number}", stdin=False).start(LIMIT)
        for task in reversed(tasks):
            self._end(life, task)

    def _task(
        self, life: Life, name: str, script: str, annotations: dict[str, str], timeout: float = LIMIT
    ) -> Task:
        api = self._apis[life.namespace]
        self._ctr(life, "container", "create", "--runtime", KATA, self._image, name)

        def change(spec: dict[str, Any]) -> None:
            spec["process"]["args"] = ["sh", "-c", script]
            spec.setdefault("annotations", {}).update(annotations)

        api.patch_spec(name, change)
        task = api.task(name, stdin=False, timeout=timeout)
        life.created[name] += 1
        return task

    def _exec(self, task: Task, name: str) -> None:
        process = task.exec("sh", "-c", "echo $$; exit 3", exec_id=name, stdin=False)
        process.start(LIMIT)
        code = process.wait(LIMIT)
        process.delete(LIMIT)
        if code != 3:
            raise RuntimeError(f"an exec ended with {code}")

    def _end(self, life: Life, task: Task) -> None:
        """SIGKILL, and the exit within the bound, whatever state the guest is in."""
        begin = time.monotonic()
        with contextlib.suppress(grpc.RpcError):  # it may be over
            task.kill(signal.SIGKILL)
            if life.fault == "kill twice":
                task.kill(signal.SIGKILL)
        code = task.wait(ENDED + 30)
        took = time.monotonic() - begin
        if took > ENDED and not life.touched and not self._away.is_set():
            self._complain(life, f"{task.container}: {took:.0f} s from SIGKILL to its exit")
        if not life.fault and code != 137 and not life.touched:
            self._complain(life, f"a bystander's {task.container} ended with {code}")
        with contextlib.suppress(grpc.RpcError):
            task.delete(LIMIT)

    # --- faults

    def _break(self, life: Life, task: Task) -> None:
        how, _, what = life.fault.partition(" ")
        if life.fault == "containerd":
            self._restart_containerd()
            life.touched = True
        elif what in (*_PROGRAMS, "shim", "all"):
            number = signal.SIGKILL if how == "kill" else signal.SIGSTOP
            for pid in self._pids(task.pid, what):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    @staticmethod
    def _pids(vmm: int, what: str) -> list[int]:
        """Of the VM whose VMM containerd shows as `vmm`: the shim is above it, the daemons are beside it."""
        parents, names = _processes()
        shim = vmm
        while shim > 1 and "containerd-shim-kata" not in names.get(shim, ""):
            shim = parents.get(shim, 0)
        if shim <= 1:
            return []
        if what == "shim":
            return [shim]
        wanted = list(_PROGRAMS.values()) if what == "all" else [_PROGRAMS[what]]
        below = {shim}
        for pid in sorted(parents):  # children have higher numbers, unless they wrapped
            if parents[pid] in below:
                below.add(pid)
        return [pid for pid in below if pid != shim and any(name in names[pid] for name in wanted)]

    def _restart_containerd(self) -> None:
        with self._restart:
            self._away.set()
            self._containerd.halt(signal.SIGKILL)
            time.sleep(0.5)
            self._containerd.boot()
            self._restarts += 1
            self._away.clear()

    # --- clean-up and accounts

    def _ctr(self, life: Life, *args: str, check: bool = True) -> None:
        argv = self._containerd.ctr_argv(*args)
        argv[argv.index("--namespace") + 1] = life.namespace
        for attempt in range(5):
            done = subprocess.run(
                argv,
                capture_output=True,
                text=True,
                timeout=LIMIT,
                check=False,
                env=self._containerd.environment,
            )
            lost = self._away.is_set() or "connection" in done.stderr or "Unavailable" in done.stderr
            if done.returncode == 0 or not (check or lost):
                return
            if not lost:
                break
            time.sleep(1 + attempt)
        if not check:
            self._complain(life, f"not cleaned up: {' '.join(args)}: {done.stderr[-300:]}")
            return
        raise RuntimeError(f"{' '.join(args)}: {done.stderr[-300:]}")

    def _clean(self, life: Life) -> None:
        names = [f"{life.name}-m{number}" for number in range(life.members)] + [life.name]
        for name in names:
            for args in (
                ("task", "kill", "-s", "SIGKILL", name),
                ("task", "rm", "-f", name),
                ("container", "rm", name),
            ):
                try:
                    self._ctr(life, *args, check=False)
                except subprocess.TimeoutExpired:
                    self._complain(life, f"ctr {' '.join(args)} hangs")
        below = self._apis[life.namespace].directory
        for folder in [below / life.name, *below.glob(f"{life.name}-*")]:  # its own, members' and execs'
            if folder.exists():
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()

    def _told(self, life: Life) -> Counter[tuple[str, str]]:
        with self._lock:
            return Counter(self._exits)

    def _check_exits(self, life: Life, before: Counter[tuple[str, str]]) -> None:
        """Each created task was told to have ended, once. Events come a moment later."""
        until = time.monotonic() + 20
        for name, created in life.created.items():
            while True:
                with self._lock:
                    told = self._exits[life.namespace, name] - before[life.namespace, name]
                if told >= created or time.monotonic() > until:
                    break
                time.sleep(0.2)
            if told != created:
                self._complain(life, f"{name}: created {created} times, {told} exits told")

    def _complain(self, life: Life, text: str) -> None:
        with self._lock:
            self.tally.wrong.append(f"[{life.fault or 'no fault'}] {life.namespace}/{life.name}: {text}")
        self._say(self.tally.wrong[-1])

    # --- beside the lives

    def _listen(self, finished: threading.Event) -> None:
        """Count the exits of tasks (execs have ids of their own)."""
        api = self._apis[NAMESPACES[0]]
        while not finished.is_set():
            with contextlib.suppress(grpc.RpcError, TimeoutError), api.events() as next_event:
                restarts = self._restarts
                while not finished.is_set() and restarts == self._restarts:
                    with contextlib.suppress(queue.Empty):
                        event = next_event(0.5)
                        topic, message = event
                        if topic == "/tasks/exit" and message.id == message.container_id:
                            with self._lock:
                                self._exits[event.namespace, message.container_id] += 1
                                self.tally.exits += 1

    def _probe(self, finished: threading.Event) -> None:
        """How long containerd keeps others waiting: it is asked for all tasks, once a second."""
        api = self._apis[NAMESPACES[1]]
        while not finished.wait(1):
            restarts, begin = self._restarts, time.monotonic()
            with contextlib.suppress(grpc.RpcError):
                api.call("containerd.services.tasks.v1.Tasks", "List", timeout=60)
            took = time.monotonic() - begin
            if restarts == self._restarts and not self._away.is_set():
                self.tally.slowest = max(self.tally.slowest, took)
                if took > BLOCKED:
                    with self._lock:
                        self.tally.wrong.append(f"containerd took {took:.1f} s to list its tasks")

    def _report(self, finished: threading.Event) -> None:
        begin = time.monotonic()
        while not finished.wait(30):
            self._say(
                f"{self.tally.cycles}/{len(self._plan)} lives, {self.tally.faults.total()} faults,"
                f" {len(self.tally.wrong)} wrong, {time.monotonic() - begin:.0f} s"
            )

    def _remains(self) -> dict[str, set[str]]:
        daemon = self._containerd
        sockets = [
            leaks.shim_socket(daemon.address, space, name) for space in NAMESPACES for name in self._names()
        ]
        return leaks.snapshot(tag=daemon.tag, root=str(daemon.root), sockets=sockets, ignore=[daemon.pid])

    def _names(self) -> Iterator[str]:
        for number in range(self._parallel):
            yield f"{self._containerd.tag}-{number}"


def _processes() -> tuple[dict[int, int], dict[int, str]]:
    """(parent, command line) of each process, by pid."""
    parents, names = {}, {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parents[int(entry)] = int(
                    Path("/proc", entry, "stat").read_bytes().rpartition(b")")[2].split()[1]
                )
                names[int(entry)] = os.fsdecode(Path("/proc", entry, "cmdline").read_bytes()).replace(
                    "\0", " "
                )[:200]
    return parents, names


def main() -> int:
    """Soak; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=500, help="lives with a fault (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=6, help="lives at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the plan (default: %(default)s)")
    parser.add_argument("--containerd", choices=VERSIONS, default=own_version(), help="default: %(default)s")
    parser.add_argument(
        "--debug", action="store_true", help="show the log of containerd and shims in the end"
    )
    options = parser.parse_args()
    if os.geteuid():
        print("soak: run it as root", file=sys.stderr)
        return 2
    # What is tried is not whether a busy host boots in time.
    slow = {"agent.kata": {"create_container_timeout": 120}}
    with Containerd(debug=options.debug, version=options.containerd, overrides=slow) as containerd:
        archive = containerd.root / "busybox.tar"
        busybox_image(archive, IMAGE)
        for namespace in NAMESPACES:
            containerd.ctr("--namespace", namespace, "image", "import", str(archive))
        tally = Soak(
            containerd,
            image=IMAGE,
            faults=options.faults,
            parallel=options.parallel,
            seed=options.seed,
            say=lambda line: print(f"soak: {line}", flush=True),
        ).run()
        if tally.wrong and options.debug:
            print(containerd.log_tail(100_000), file=sys.stderr)
    for line in tally.wrong:
        print(f"soak: wrong: {line}")
    print(f"soak: {tally.summary()}")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
