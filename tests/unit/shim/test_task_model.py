"""Whatever the order of calls, exits and VM deaths: the service agrees with a small model of itself."""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from devices.errors import KataError
from proto import task_types_pb2
from tests.unit.shim.fakes import TaskClient

CONTAINERS = st.sampled_from("ab")
EXECS = st.sampled_from(["", "", "x", "y"])
STATUS = {
    "created": task_types_pb2.CREATED,
    "running": task_types_pb2.RUNNING,
    "paused": task_types_pb2.PAUSED,
    "stopped": task_types_pb2.STOPPED,
}


@dataclass
class Modelled:
    """What the model knows of a process."""

    state: str = "created"
    status: int = 0
    execs: dict[str, Modelled] = field(default_factory=dict)

    def stop(self, status: int) -> None:
        """It ends, and with an init process the execs end too."""
        if self.state != "stopped":
            self.state, self.status = "stopped", status
        for exec_ in self.execs.values():
            exec_.stop(status if status == 255 and exec_.state == "running" else 137)


class Tasks(RuleBasedStateMachine):
    """Two container ids in a pod without a container of its own, two exec ids each."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.shim = self.runner.run(self._open())
        self.model: dict[str, Modelled] = {}
        self.dead = False

    async def _open(self) -> TaskClient:
        return TaskClient(self.directory, pod="pod")

    def teardown(self) -> None:
        self.runner.run(self.shim.close())
        self.runner.close()
        shutil.rmtree(self.directory)
        histories: dict[tuple[str, str], str] = {}
        for topic, event in self.shim.events.events:
            exec_id = getattr(event, "exec_id", "") or getattr(event, "id", "")
            key = (event.container_id, "" if exec_id == event.container_id else exec_id)
            histories[key] = histories.get(key, "") + topic + " "
        for (_, exec_id), history in histories.items():
            if exec_id:
                life = r"exec-added (exec-started (exit )?)?"
            else:
                life = r"create (start )?((paused resumed )*(paused )?)(exit (delete )?)?"
            assert re.fullmatch(f"({life})*", history), history

    def call(self, awaitable: Awaitable[Any]) -> tuple[str, Any]:
        async def guarded() -> tuple[str, Any]:
            try:
                return "OK", await asyncio.wait_for(awaitable, 5)
            except KataError as error:
                return error.code, None

        return self.runner.run(guarded())

    def find(self, container_id: str, exec_id: str) -> Modelled | None:
        container = self.model.get(container_id)
        return container.execs.get(exec_id) if container is not None and exec_id else container

    def settle(self) -> None:
        """Every exit that the model knows of has been told."""
        for container_id, container in self.model.items():
            for exec_id, process in [("", container), *container.execs.items()]:
                if process.state == "stopped":
                    code, ended = self.call(self.shim.wait(container_id, exec_id))
                    assert (code, ended.exit_status) == ("OK", process.status)

    @initialize()
    def one_runs_with_an_exec(self) -> None:
        """Most of what can go wrong needs these four calls; chance alone seldom makes them."""
        self.create("a")
        self.start("a", "")
        self.exec("a", "x", missing=False)
        self.start("a", "x")

    @rule(container_id=CONTAINERS)
    def create(self, container_id: str) -> None:
        code, _ = self.call(self.shim.create(container_id))
        if container_id in self.model:
            assert code == "ALREADY_EXISTS"
        elif self.dead:
            assert code == "UNAVAILABLE"
        else:
            assert code == "OK"
            self.model[container_id] = Modelled()

    @rule(container_id=CONTAINERS, exec_id=st.sampled_from("xy"), missing=st.booleans())
    def exec(self, container_id: str, exec_id: str, missing: bool) -> None:
        args = ["missing"] if missing else ["sh"]
        code, _ = self.call(self.shim.exec(container_id, exec_id, args=args))
        container = self.model.get(container_id)
        if container is None:
            assert code == "NOT_FOUND"
        elif container.state not in {"created", "running"}:
            assert code == "FAILED_PRECONDITION"
        elif exec_id in container.execs:
            assert code == "ALREADY_EXISTS"
        else:
            assert code == "OK"
            container.execs[exec_id] = Modelled(status=-1 if missing else 0)

    @rule(container_id=CONTAINERS, exec_id=EXECS)
    def start(self, container_id: str, exec_id: str) -> None:
        code, _ = self.call(self.shim.start(container_id, exec_id))
        process = self.find(container_id, exec_id)
        if process is None:
            assert code == "NOT_FOUND"
        elif process.state != "created" or self.model[container_id].state in {"paused", "stopped"}:
            assert code == "FAILED_PRECONDITION"
        elif process.status == -1:
            assert code == "NOT_FOUND"
            process.stop(255)
        else:
            assert code == "OK"
            process.state = "running"
        self.settle()

    @rule(container_id=CONTAINERS, exec_id=EXECS)
    def kill(self, container_id: str, exec_id: str) -> None:
        code, _ = self.call(self.shim.kill(container_id, exec_id))
        process = self.find(container_id, exec_id)
        if process is None or process.state == "stopped":
            assert code == "NOT_FOUND"
        elif exec_id and process.state == "created":
            assert code == "FAILED_PRECONDITION"
        else:
            assert code == "OK"
            process.stop(137)
        self.settle()

    @rule(container_id=CONTAINERS, exec_id=EXECS, status=st.integers(0, 254))
    def exit_by_itself(self, container_id: str, exec_id: str, status: int) -> None:
        process = self.find(container_id, exec_id)
        if process is not None and process.state in {"running", "paused"}:
            self.runner.run(self._exit(container_id, exec_id, status))
            process.stop(status)
            self.settle()

    async def _exit(self, container_id: str, exec_id: str, status: int) -> None:
        self.shim.guest(container_id, exec_id).exit(status)

    @rule(container_id=CONTAINERS, exec_id=EXECS)
    def delete(self, container_id: str, exec_id: str) -> None:
        code, deleted = self.call(self.shim.delete(container_id, exec_id))
        process = self.find(container_id, exec_id)
        if process is None:
            assert code == "NOT_FOUND"
        elif process.state in {"running", "paused"}:
            assert code == "FAILED_PRECONDITION"
        else:
            assert code == "OK"
            if process.state == "created":
                assert deleted.exit_status == (0 if exec_id else 137)
            else:
                assert deleted.exit_status == process.status
            if exec_id:
                del self.model[container_id].execs[exec_id]
                self.forget(container_id, exec_id)
            else:
                del self.model[container_id]
            if not self.model:
                assert self.shim.sandbox.stopped
                self.dead = False

    def forget(self, container_id: str, exec_id: str) -> None:
        """The real agent lets an exec id be used again once its process has ended."""
        self.shim.agent.processes.pop((container_id, exec_id), None)

    @rule(container_id=CONTAINERS, resume=st.booleans())
    def pause_or_resume(self, container_id: str, resume: bool) -> None:
        code, _ = self.call(self.shim.call("Resume" if resume else "Pause", id=container_id))
        container = self.model.get(container_id)
        before, after = ("paused", "running") if resume else ("running", "paused")
        if container is None:
            assert code == "NOT_FOUND"
        elif container.state != before:
            assert code == "FAILED_PRECONDITION"
        else:
            assert code == "OK"
            container.state = after

    @precondition(lambda self: self.model and not self.dead)
    @rule()
    def the_vm_dies(self) -> None:
        self.runner.run(self._die())
        self.dead = True
        for container in self.model.values():
            container.stop(255)
        self.settle()

    async def _die(self) -> None:
        self.shim.sandbox.die()

    @invariant()
    def states_agree(self) -> None:
        for container_id in "ab":
            for exec_id in ("", "x", "y"):
                code, state = self.call(self.shim.state(container_id, exec_id))
                process = self.find(container_id, exec_id)
                if process is None:
                    assert code == "NOT_FOUND"
                else:
                    assert code == "OK"
                    assert state.status == STATUS[process.state], (container_id, exec_id)
                    assert state.HasField("exited_at") == (process.state == "stopped")
        exits = [(event.container_id, event.id) for event in self.shim.events.of("exit")]
        starts = len(self.shim.events.of("create")) + len(self.shim.events.of("exec-started"))
        assert len(exits) <= starts


TestTasks = Tasks.TestCase
TestTasks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
