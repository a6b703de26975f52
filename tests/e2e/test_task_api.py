"""Each call of containerd's Tasks service in each state of a task is answered as runc's shim answers it.

`KATA_E2E_RUNTIME=runc` runs the same against runc; where it answers otherwise, `RUNC` has its answer.
"""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from testing.api import Api, Task
from testing.containerd import RUNC as RUNC_RUNTIME

Create = Callable[..., Task]
TASKS = "containerd.services.tasks.v1.Tasks"
SPEC = "types.containerd.io/opencontainers/runtime-spec/1/"
OK, MISSING, EXISTS = "OK", "NOT_FOUND", "ALREADY_EXISTS"
REFUSED, UNIMPLEMENTED, UNKNOWN = "FAILED_PRECONDITION", "UNIMPLEMENTED", "UNKNOWN"

#: state -> call -> answer. What would change the state on success is tried where it cannot succeed.
ANSWERS = {
    "created": {
        "Get": OK, "Kill": OK, "ResizePty": OK, "CloseIO": OK, "ListPids": OK, "Update": OK,
        "Checkpoint": UNIMPLEMENTED, "Pause": REFUSED, "Resume": REFUSED, "Exec": OK,
    },
    "running": {
        "Get": OK, "Kill": OK, "ResizePty": OK, "CloseIO": OK, "ListPids": OK, "Update": OK,
        "Checkpoint": UNIMPLEMENTED, "Resume": REFUSED, "Exec": OK, "Start": REFUSED, "Delete": REFUSED,
    },
    "paused": {
        "Get": OK, "Kill": OK, "ResizePty": OK, "CloseIO": OK, "ListPids": OK, "Update": OK,
        "Checkpoint": UNIMPLEMENTED, "Pause": REFUSED, "Exec": REFUSED, "Start": REFUSED, "Delete": REFUSED,
    },
    "stopped": {
        "Get": OK, "Kill": MISSING, "KillAll": OK, "ResizePty": OK, "CloseIO": OK, "ListPids": OK,
        "Update": REFUSED, "Checkpoint": UNIMPLEMENTED, "Pause": REFUSED, "Resume": REFUSED, "Exec": REFUSED,
        "Start": REFUSED,
    },
    "deleted": dict.fromkeys(
        ("Get", "Kill", "ResizePty", "CloseIO", "ListPids", "Update", "Checkpoint", "Pause", "Resume",
         "Exec", "Start", "Delete"),
        MISSING,
    ),
    "exec created": {"Get": OK, "Kill": REFUSED, "ResizePty": OK, "CloseIO": OK, "Exec": EXISTS},
    "exec running": {
        "Get": OK, "Kill": OK, "ResizePty": OK, "CloseIO": OK, "Exec": EXISTS, "Start": REFUSED,
        "DeleteProcess": REFUSED,
    },
    "exec stopped": {
        "Get": OK, "Kill": MISSING, "ResizePty": OK, "CloseIO": OK, "Exec": EXISTS, "Start": REFUSED,
    },
    "exec deleted": dict.fromkeys(
        ("Get", "Kill", "ResizePty", "CloseIO", "Start", "DeleteProcess"), MISSING
    ),
}  # fmt: skip

#: Where runc's shim says less than which call came too early or too late.
RUNC = {
    **{
        (state, call): UNKNOWN
        for state, row in ANSWERS.items()
        for call, answer in row.items()
        if answer == REFUSED and (state, call) != ("exec created", "Kill")
    },
    ("exec stopped", "ResizePty"): UNKNOWN,
}
#: A checkpoint of runc's would be one.
NOT_ON_RUNC = {"Checkpoint"}


class Prober:
    """Makes the calls of a row of `ANSWERS` and compares."""

    def __init__(self, api: Api, runtime: str) -> None:
        self._api = api
        self._runc = runtime == RUNC_RUNTIME
        self._names = itertools.count()

    def __call__(self, state: str, task: Task) -> None:
        expected, found = {}, {}
        for call, answer in ANSWERS[state].items():
            if not (self._runc and call in NOT_ON_RUNC):
                expected[call] = RUNC.get((state, call), answer) if self._runc else answer
                found[call] = self.answer(call, task)
        assert (state, found) == (state, expected)

    def answer(self, call: str, task: Task) -> str:
        """The status that the call ends with."""
        fields: dict[str, Any] = {"container_id": task.container}
        if task.exec_id:
            fields["exec_id"] = task.exec_id
        match call:
            case "Kill":
                fields["signal"] = 0
            case "KillAll":
                call = "Kill"
                fields |= {"signal": signal.SIGKILL, "all": True}
            case "ResizePty":
                fields |= {"width": 80, "height": 24}
            case "CloseIO":
                fields["stdin"] = True
            case "Update":
                fields["resources"] = {"type_url": SPEC + "LinuxResources", "value": b"{}"}
            case "Exec":
                process = json.dumps({"args": ["true"], "cwd": "/"}).encode()
                fields["spec"] = {"type_url": SPEC + "Process", "value": process}
                fields.setdefault("exec_id", f"new{next(self._names)}")
        try:
            self._api.call(TASKS, call, **fields)
        except grpc.RpcError as error:
            return str(error.code().name)
        return OK


def test_each_call_in_each_state(api: Api, create: Create, runtime: str) -> None:
    probe = Prober(api, runtime)
    task = create("sleep", "1000", stdin=False)
    probe("created", task)
    task.start()
    probe("running", task)

    exec_ = task.exec("sleep", "1000", exec_id="e", stdin=False)
    probe("exec created", exec_)
    exec_.start()
    probe("exec running", exec_)
    exec_.kill(signal.SIGKILL)
    assert exec_.wait() == 137
    probe("exec stopped", exec_)
    exec_.delete()
    probe("exec deleted", exec_)

    api.call(TASKS, "Pause", container_id=task.container)
    probe("paused", task)
    api.call(TASKS, "Resume", container_id=task.container)
    task.kill(signal.SIGKILL)
    assert task.wait() == 137
    probe("stopped", task)
    task.delete()
    probe("deleted", task)


def test_a_second_create_is_refused(api: Api, create: Create) -> None:
    task = create("sleep", "1000", stdin=False)
    with pytest.raises(grpc.RpcError) as error:
        api.call(TASKS, "Create", container_id=task.container)
    assert error.value.code().name == EXISTS
    task.delete()
