"""All events of a task come once and in containerd's order, also when many processes come and go at once."""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from testing.api import Api, Task

Create = Callable[..., Task]
TASKS = "containerd.services.tasks.v1.Tasks"


class Listener:
    """Gathers the events of one container, as (topic without /tasks/, message)."""

    def __init__(self, next_event: Callable[[float], Any], container: str) -> None:
        self._next = next_event
        self._container = container
        self.events: list[tuple[str, Any]] = []

    def until(self, topic: str) -> None:
        """Read on until the first event of this topic."""
        seen = ""
        while seen != topic:
            name, event = self._next(60)
            if name.startswith("/tasks/") and event.container_id == self._container:
                seen = name.removeprefix("/tasks/")
                self.events.append((seen, event))

    def lives(self) -> dict[str, list[str]]:
        """exec id, or "" for the container -> its topics in order."""
        found: dict[str, list[str]] = defaultdict(list)
        for topic, event in self.events:
            name = event.exec_id if topic.startswith("exec-") else event.id if topic == "exit" else ""
            found["" if name == self._container else name].append(topic)
        return found


def test_twenty_execs_at_once_and_a_pause(api: Api, create: Create) -> None:
    with api.events() as next_event:
        task = create("sleep", "100000", stdin=False)
        listener = Listener(next_event, task.container)
        task.start()
        api.call(TASKS, "Pause", container_id=task.container)
        assert task.state().status == 4
        api.call(TASKS, "Resume", container_id=task.container)

        def run(number: int) -> int:
            process = task.exec("sh", "-c", f"exit {number}", exec_id=f"e{number}", stdin=False)
            process.start(timeout=120)
            code = process.wait(timeout=120)
            assert process.delete().exit_status == code
            return code

        with ThreadPoolExecutor(10) as pool:
            assert list(pool.map(run, range(20))) == list(range(20))
        task.kill(signal.SIGKILL)
        assert task.wait() == 137
        task.delete()
        listener.until("delete")
    lives = listener.lives()
    assert lives.pop("") == ["create", "start", "paused", "resumed", "exit", "delete"]
    assert lives == {f"e{number}": ["exec-added", "exec-started", "exit"] for number in range(20)}
    exits = {event.id: event.exit_status for topic, event in listener.events if topic == "exit"}
    assert exits == {task.container: 137, **{f"e{number}": number for number in range(20)}}


def test_what_is_killed_for_memory_is_told_before_its_exit(api: Api, create: Create) -> None:
    with api.events() as next_event:
        # One line without an end: tail must keep all of it, so it grows by what it reads.
        options = ("--memory-limit", str(24 << 20))
        task = create("tail", "-n", "1", "/dev/zero", stdin=False, options=options)
        listener = Listener(next_event, task.container)
        task.start()
        assert task.wait() == 137
        task.delete()
        listener.until("delete")
    assert [topic for topic, _ in listener.events] == ["create", "start", "oom", "exit", "delete"]
