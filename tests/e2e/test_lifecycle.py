"""A task's life through containerd's API: signals, terminals, standard input, events, deletion."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import random
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from testing.api import Api, Task
from testing.containerd import Containerd

Create = Callable[..., Task]
TASKS = "containerd.services.tasks.v1.Tasks"
RUNNING, STOPPED = 2, 3


def _status(containerd: Containerd, name: str) -> str:
    """The status that `ctr task ls` shows, empty when there is no such task."""
    lines = [line.split() for line in containerd.ctr("task", "ls").text.splitlines()]
    return next((words[-1] for words in lines if words[0] == name), "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, 137)])
def test_a_detached_container_is_killed_and_deleted(
    containerd: Containerd,
    runtime: str,
    api: Api,
    no_leaks: Callable[[], None],
    number: signal.Signals,
    code: int,
) -> None:
    name = containerd.new_id("detached")
    # PID 1 ignores what it does not trap, so nothing is sent before the trap is set.
    script = "trap 'exit 143' TERM; touch /trapped; while :; do sleep 0.1; done"
    containerd.ctr("run", "--detach", "--runtime", runtime, "local/busybox:1", name, "sh", "-c", script)
    containerd.ctr(
        "task", "exec", "--exec-id", "ready", name, "sh", "-c", "until test -e /trapped; do sleep 0.05; done"
    )
    assert _status(containerd, name) == "RUNNING"
    refused = containerd.ctr("task", "rm", name, check=False)
    assert refused.code
    containerd.ctr("task", "kill", "-s", number.name, name)
    assert api.call(TASKS, "Wait", container_id=name).exit_status == code
    assert _status(containerd, name) == "STOPPED"
    containerd.ctr("task", "rm", name)
    assert _status(containerd, name) == ""
    containerd.ctr("container", "rm", name)


def test_a_file_rewritten_between_create_and_start_is_the_new_one(create: Create, tmp_path: Path) -> None:
    """As Docker rewrites /etc/hosts and resolv.conf: whole, at once, not cut where the old one ended."""
    file = tmp_path / "hosts"
    file.write_text("old\n")
    mount = f"type=bind,src={file},dst=/etc/hosts,options=rbind:rw"
    task = create("cat", "/etc/hosts", options=("--mount", mount), stdin=False)
    file.write_text("new and longer\n")  # in place: what is mounted is this file
    task.start()
    assert task.wait() == 0
    assert task.io.finish()[0] == b"new and longer\n"


def test_two_containers_run_at_once(
    containerd: Containerd, runtime: str, no_leaks: Callable[[], None]
) -> None:
    names = [containerd.new_id("pair") for _ in range(2)]

    def start(name: str) -> None:
        containerd.ctr("run", "--detach", "--runtime", runtime, "local/busybox:1", name, "sleep", "100000")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(start, names))
    assert [_status(containerd, name) for name in names] == ["RUNNING", "RUNNING"]
    containerd.ctr("task", "exec", "--exec-id", "w", names[0], "sh", "-c", "echo $0 > /mine", names[0])
    assert containerd.ctr("task", "exec", "--exec-id", "r", names[1], "cat", "/mine", check=False).code == 1
    containerd.remove(names[0])
    assert [_status(containerd, name) for name in names] == ["", "RUNNING"]
    assert containerd.ctr("task", "exec", "--exec-id", "e", names[1], "echo", "on").text == "on"
    containerd.remove(names[1])


def test_events_come_in_order_and_once(api: Api, create: Create) -> None:
    with api.events() as next_event:
        task = create("sh", "-c", "exit 9", stdin=False)
        pid = task.start()
        assert task.wait() == 9
        assert task.delete().exit_status == 9
        seen: list[Any] = []
        while not seen or seen[-1][0] != "/tasks/delete":
            topic, event = next_event(10)
            if topic.startswith("/tasks/") and event.container_id == task.container:
                seen.append((topic, event))
        with contextlib.suppress(queue.Empty):
            while True:
                topic, event = next_event(0.5)
                assert not (topic.startswith("/tasks/") and event.container_id == task.container), topic
    assert [topic for topic, _ in seen] == ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]
    exit_event = seen[2][1]
    assert (exit_event.id, exit_event.pid, exit_event.exit_status) == (task.container, pid, 9)
    assert exit_event.exited_at.seconds > 1_600_000_000


def test_a_terminal_has_the_size_that_the_client_gives(create: Create) -> None:
    task = create("sh", terminal=True)
    task.resize(120, 40)  # before the start: the program never sees another size
    task.start()
    task.io.write(b"stty size\n")
    task.io.wait_for(b"40 120")
    task.io.write(b"tty; test -t 0 && test -t 1 && test -t 2 && echo all''-tty\n")
    task.io.wait_for(b"all-tty\r\n")
    task.resize(81, 25)
    task.io.write(b"stty size; exit 3\n")
    assert task.wait() == 3
    out, _ = task.io.finish()
    assert b"25 81\r\n" in out
    task.delete()


def test_a_resize_signals_the_foreground_process(create: Create) -> None:
    script = "trap 'stty size; exit 0' WINCH; echo ready; while :; do sleep 0.1; done"
    task = create("sh", "-c", script, terminal=True)
    task.start()
    task.io.wait_for(b"ready")
    task.resize(77, 33)
    assert task.wait() == 0
    assert b"33 77" in task.io.finish()[0]
    task.delete()


def test_control_c_in_a_terminal_interrupts(create: Create) -> None:
    script = "trap 'echo interrupted; exit 9' INT; echo ready; while :; do sleep 0.1; done"
    task = create("sh", "-c", script, terminal=True)
    task.start()
    task.io.wait_for(b"ready")
    task.io.write(b"\x03")
    assert task.wait() == 9
    assert b"interrupted" in task.io.finish()[0]
    task.delete()


def test_megabytes_through_cat_are_unchanged(create: Create) -> None:
    data = random.Random(2).randbytes(8 << 20)
    task = create("cat")
    task.start()

    def feed() -> None:
        task.io.write(data, timeout=200)
        task.io.detach_stdin()
        task.close_stdin()

    writer = threading.Thread(target=feed)
    writer.start()
    assert task.wait(timeout=240) == 0
    writer.join(10)
    out, err = task.io.finish()
    assert (len(out), hashlib.sha256(out).digest(), err) == (len(data), hashlib.sha256(data).digest(), b"")
    task.delete()


def test_output_written_right_before_the_exit_is_not_lost(create: Create) -> None:
    task = create("sh", "-c", "seq 1 20000; seq 1 20000 >&2; exit 4", stdin=False)
    task.start()
    assert task.wait() == 4
    out, err = task.io.finish()
    assert out == err == b"".join(b"%d\n" % number for number in range(1, 20001))
    task.delete()


def test_state_follows_the_process(create: Create) -> None:
    task = create("sh", "-c", "read line; exit 6")
    assert task.state().status == 1
    task.start()
    state = task.state()
    assert (state.status, state.pid) == (RUNNING, task.pid)
    assert (state.stdout, state.terminal) == (task.io.stdout, False)
    task.io.write(b"go\n")
    assert task.wait() == 6
    assert task.wait() == 6
    state = task.state()
    assert (state.status, state.exit_status) == (STOPPED, 6)
    with pytest.raises(grpc.RpcError) as error:
        task.kill(signal.SIGTERM)
    assert error.value.code() == grpc.StatusCode.NOT_FOUND
    task.delete()
    with pytest.raises(grpc.RpcError) as error:
        task.state()
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


def test_a_created_task_can_be_deleted_unstarted(create: Create, no_leaks: Callable[[], None]) -> None:
    task = create("true", stdin=False)
    task.delete()


def test_pids_are_never_empty(api: Api, create: Create) -> None:
    task = create("sleep", "1000", stdin=False)
    task.start()
    answer = api.call(TASKS, "ListPids", container_id=task.container)
    assert task.pid in [process.pid for process in answer.processes]
    task.kill(signal.SIGKILL)
    assert task.wait() == 137
    task.delete()
