"""A storm of short containers, several at a time: alone in a VM each, and as members of pods.

What: `Storm.run` creates, starts, waits for and deletes each container through containerd's API, and
answers an `Outcome`: which exit codes, outputs, events and remains were not as they must be.
Why: what is lost or left behind once in a hundred times shows in numbers only.
Invariants: every container prints its own name and ends with a code of its own, so that a mix-up shows;
at most `parallel` of them (a pod's sandbox container not counted) exist at a time; each has one deadline,
and what fails is removed and told, never raised.
"""

from __future__ import annotations

import queue
import random
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from testing import leaks
from testing.api import Api, Task
from testing.containerd import KATA, Containerd, CtrError

__all__ = ["Outcome", "Storm"]

DEADLINE = 300.0
"""Seconds that one step of one container may take: eight VMs boot on two cores."""
_PROGRESS = 10.0  # seconds between lines
_SETTLE = 30.0  # seconds in which what the last one held must be gone
_END = "/testing/end"
_ANNOTATION = "io.kubernetes.cri."
_LIFE = ["create", "start", "exit", "delete"]


@dataclass(slots=True)
class Outcome:
    """What came of it. `wrong`: one line for each thing that is not as it must be; empty: all is well."""

    containers: int
    pods: int
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line for people."""
        kinds = f"{self.containers} containers, {self.pods} pods"
        verdict = (
            f"{len(self.wrong)} things wrong" if self.wrong else "all exit codes, events and remains right"
        )
        return f"{kinds}: {verdict}; {self.seconds:.0f} s, {self.seconds / self.containers:.2f} s each"


class Storm:
    """`count` containers of `image`, `members` in each of `pods` pods and the others alone.

    Raises ValueError if the pods hold more than `count`.
    """

    def __init__(
        self,
        containerd: Containerd,
        directory: Path,
        *,
        image: str,
        count: int,
        parallel: int,
        pods: int = 0,
        members: int = 0,
        runtime: str = KATA,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        if pods * members > count:
            raise ValueError(f"{pods} pods of {members} are more than {count} containers")
        self.containerd = containerd
        self.outcome = Outcome(count, pods)
        self._api = Api(containerd.address, containerd.namespace, directory)
        self._image = image
        self._runtime = runtime
        self._say = say
        self._slots = threading.Semaphore(parallel)
        self._parallel = parallel
        self._pods = pods
        self._members = members
        self._lock = threading.Lock()
        self._expected: dict[str, int] = {}  # container -> exit code
        self._numbers = iter(range(count + pods))
        self._done = 0

    def run(self) -> Outcome:
        """Run them all."""
        before = self._remains()
        begin = time.monotonic()
        alone = self.outcome.containers - self._pods * self._members
        work: list[Callable[[], None]] = [self._alone] * alone + [self._pod] * self._pods
        random.Random(1).shuffle(work)
        finished = threading.Event()
        reporter = threading.Thread(target=self._report, args=(finished, begin))
        reporter.start()
        try:
            with self._api.events() as next_event:
                with ThreadPoolExecutor(self._parallel) as pool:
                    for future in [pool.submit(unit) for unit in work]:
                        future.result()
                self._api.publish(_END)
                self._check_events(next_event)
        finally:
            finished.set()
            reporter.join()
            self._api.close()
        self.outcome.seconds = time.monotonic() - begin
        left = leaks.settle(before, self._remains, timeout=_SETTLE)
        self.outcome.wrong += [
            f"left behind: {kind}: {item}" for kind, items in sorted(left.items()) for item in sorted(items)
        ]
        return self.outcome

    def _report(self, finished: threading.Event, begin: float) -> None:
        while not finished.wait(_PROGRESS):
            wrong = len(self.outcome.wrong)
            seconds = time.monotonic() - begin
            self._say(f"{self._done}/{self.outcome.containers} containers, {wrong} wrong, {seconds:.0f} s")

    def _remains(self) -> dict[str, set[str]]:
        daemon = self.containerd
        sockets = [leaks.shim_socket(daemon.address, daemon.namespace, name) for name in daemon.ids]
        return leaks.snapshot(tag=daemon.tag, root=str(daemon.root), sockets=sockets, ignore=[daemon.pid])

    def _complain(self, text: str) -> None:
        with self._lock:
            self.outcome.wrong.append(text)

    # -- one container, one pod ------------------------------------------------------------------

    def _new(self, kind: str, code: int | None = None) -> tuple[str, int]:
        """A name, and the exit code that its container has to have."""
        with self._lock:
            number = next(self._numbers)
            name = self.containerd.new_id(kind)
            self._expected[name] = number % 251 if code is None else code
            return name, self._expected[name]

    def _alone(self) -> None:
        self._guarded(self._short, {})

    def _pod(self) -> None:
        self._guarded(self._whole_pod)

    def _guarded(self, work: Callable[..., None], *args: object) -> None:
        try:
            work(*args)
        except (grpc.RpcError, CtrError, OSError, TimeoutError) as error:
            what = error.details() if isinstance(error, grpc.RpcError) else str(error)
            self._complain(f"{type(error).__name__}: {what}")

    def _task(self, name: str, args: list[str], annotations: Mapping[str, str]) -> Task:
        self.containerd.ctr(
            "container", "create", "--runtime", self._runtime, self._image, name, timeout=DEADLINE
        )

        def change(spec: dict[str, Any]) -> None:
            spec["process"].update(args=args)
            spec.setdefault("annotations", {}).update(annotations)

        self._api.patch_spec(name, change)
        return self._api.task(name, stdin=False, timeout=DEADLINE)

    def _short(self, annotations: Mapping[str, str]) -> None:
        """One container, from its creation to its removal."""
        name, code = self._new("storm")
        with self._slots:
            try:
                script = "echo $0; exit $1"
                task = self._task(name, ["sh", "-c", script, name, str(code)], annotations)
                task.start(DEADLINE)
                waited = task.wait(DEADLINE)
                out, err = task.io.finish(DEADLINE)
                deleted = task.delete(DEADLINE).exit_status
                self.containerd.ctr("container", "rm", name, timeout=DEADLINE)
            except BaseException:
                self.containerd.remove(name)
                raise
        if (waited, deleted, out, err) != (code, code, f"{name}\n".encode(), b""):
            self._complain(f"{name}: {code} expected; Wait {waited}, Delete {deleted}, {out!r}, {err!r}")
        with self._lock:
            self._done += 1

    def _whole_pod(self) -> None:
        """A sandbox, its members (as many at a time as there are slots), and its end."""
        name, _ = self._new("pod", 128 + signal.SIGKILL)
        pod = {_ANNOTATION + "sandbox-id": name}
        try:
            task = self._task(name, ["sleep", "100000"], pod | {_ANNOTATION + "container-type": "sandbox"})
            task.start(DEADLINE)
            member = pod | {_ANNOTATION + "container-type": "container"}
            with ThreadPoolExecutor(self._members) as pool:
                for _ in range(self._members):
                    pool.submit(self._guarded, self._short, member)
            task.kill(signal.SIGKILL)
            task.wait(DEADLINE)
            task.delete(DEADLINE)
            self.containerd.ctr("container", "rm", name, timeout=DEADLINE)
        except BaseException:
            self.containerd.remove(name)
            raise

    # -- events ----------------------------------------------------------------------------------

    def _check_events(self, next_event: Callable[[float], Any]) -> None:
        """Each container was told of four times: its creation, start, one exit with its code, deletion."""
        lives: defaultdict[str, list[str]] = defaultdict(list)
        codes: dict[str, int] = {}
        try:
            while (found := next_event(60))[0] != _END:
                topic, event = found
                if topic.startswith("/tasks/"):
                    lives[event.container_id].append(topic.removeprefix("/tasks/"))
                    if topic == "/tasks/exit":
                        codes[event.container_id] = event.exit_status
        except queue.Empty:
            self._complain("the stream of events stopped before its end")
        for name, code in self._expected.items():
            if lives[name] != _LIFE:
                self._complain(f"{name}: events {lives[name]}")
            elif codes[name] != code:
                self._complain(f"{name}: the exit event tells {codes[name]}, not {code}")
