"""A tenant that floods its streams and runs out of memory again and again delays nobody; no event is lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from testing.api import Api, Task

from .test_task_events import Listener

Create = Callable[..., Task]

FLOODS = 8
PATIENCE = 10.0
"""Seconds for a call that takes milliseconds: on a machine without KVM, shared with other tests."""


@pytest.mark.kata_only
def test_a_tenant_that_floods_delays_nobody(api: Api, create: Create) -> None:
    with api.events() as next_event:
        task = create("sleep", "100000", stdin=False, options=("--memory-limit", str(32 << 20)))
        listener = Listener(next_event, task.container)
        task.start()
        script = "while true; do tail -n 1 /dev/zero; done 2>/dev/null"
        floods = [task.exec("sh", "-c", script, exec_id="memory", stdin=False)]
        floods[0].start()
        listener.until("oom")
        for number in range(FLOODS):
            script = "yes 2>/dev/null & exec yes >&2"
            floods.append(task.exec("sh", "-c", script, exec_id=f"flood{number}", stdin=False))
            floods[-1].start(timeout=120)
        slowest = 0.0
        for number in range(5):
            process = task.exec("sh", "-c", f"exit {number}", exec_id=f"e{number}", stdin=False)
            process.start(timeout=120)
            assert process.wait(timeout=120) == number
            process.delete()
            for _ in range(20):
                began = time.monotonic()
                assert task.state().status == 2
                slowest = max(slowest, time.monotonic() - began)
        print(f"slowest State: {slowest * 1000:.0f} ms")
        assert slowest < PATIENCE
        assert all(flood.io.out and flood.io.err for flood in floods[1:])
        task.kill(signal.SIGKILL)
        assert task.wait(timeout=120) == 137
        for flood in floods:
            flood.delete()
        task.delete()
        listener.until("delete")
    lives = listener.lives()
    own = lives.pop("")
    assert [topic for topic in own if topic != "oom"] == ["create", "start", "exit", "delete"]
    assert own.count("oom") >= 1
    names = (
        [f"e{number}" for number in range(5)] + [f"flood{number}" for number in range(FLOODS)] + ["memory"]
    )
    assert lives == {name: ["exec-added", "exec-started", "exit"] for name in names}
