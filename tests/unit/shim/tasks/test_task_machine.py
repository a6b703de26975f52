"""Whatever the order of calls, exits and VM deaths: the Task service agrees with a model of its contract.

The model knows nothing of the implementation: a container or exec is created, running, paused or stopped;
each call is answered by a row of `LEGAL`, and each process has its history of events, which is compared
as a whole. Sandbox container and two others share one VM; a process may end at any time, also inside a
call; the VM may die at any time, also inside a call; waiters wait from any time on.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from google.protobuf import any_pb2
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from devices.errors import KataError
from proto import task_types_pb2
from shim.tasks import container_manager as manager_module
from shim.tasks import exits as exits_module
from tests.unit.shim.fakes import VMM_PID, TaskClient

POD = "pod"  # the sandbox's own container
NAMES = ("a", "b", POD)
EXEC_NAMES = ("x", "y")
CONTAINERS = st.sampled_from(NAMES)
EXECS = st.sampled_from(EXEC_NAMES)
PROCESSES = st.sampled_from(["", "", *EXEC_NAMES])
STATUSES = st.integers(0, 254)
VM_DEATH, KILLED = 255, 137
STATUS = {
    "created": task_types_pb2.CREATED,
    "running": task_types_pb2.RUNNING,
    "paused": task_types_pb2.PAUSED,
    "stopped": task_types_pb2.STOPPED,
}
ALL = set(STATUS)
ALIVE = ALL - {"stopped"}

#: (call, is it of an exec) -> states in which it is legal. In the others it is FAILED_PRECONDITION.
LEGAL: dict[tuple[str, bool], set[str]] = {
    ("Start", False): {"created"},
    ("Start", True): {"created"},
    ("Delete", False): {"created", "stopped"},
    ("Delete", True): {"created", "stopped"},
    ("Pause", False): {"running"},
    ("Resume", False): {"paused"},
    ("Exec", False): {"created", "running"},
    ("Kill", False): ALIVE,
    ("Kill", True): {"running"},
    ("Update", False): ALIVE,
    ("Stats", False): ALL,
    ("Pids", False): ALL,
    ("ResizePty", False): ALL,
    ("ResizePty", True): ALL,
    ("CloseIO", False): ALL,
    ("CloseIO", True): ALL,
}
#: Calls that change nothing in the model, and how they are made.
HARMLESS: dict[str, dict[str, Any]] = {
    "Update": {"resources": any_pb2.Any(value=b'{"memory": {"limit": 4096}}')},
    "Stats": {},
    "Pids": {},
    "ResizePty": {"width": 80, "height": 24},
    "CloseIO": {"stdin": True},
}
#: Calls to the guest, and the calls of the service that make them.
REACHES = {
    "start_container": "Start",
    "exec_process": "Start",
    "signal_process": "Kill",
    "pause_container": "Pause",
    "resume_container": "Resume",
    "update_container": "Update",
    "stats_container": "Stats",
}


@dataclass(eq=False)
class Modelled:
    """A process. `events` are those of its life so far."""

    is_exec: bool = False
    state: str = "created"
    status: int = 0
    cannot_start: bool = False
    events: list[str] = field(default_factory=list)
    execs: dict[str, Modelled] = field(default_factory=dict)

    def stop(self, status: int, *, execs: int = KILLED) -> None:
        """It ends, and with a container its execs: first those that run, with the status `execs`."""
        for exec_ in self.execs.values():
            exec_.stop(execs if exec_.state == "running" else KILLED)
        if self.state == "stopped":
            return
        if not self.is_exec or self.state == "running":  # what never ran tells no exit
            self.events.append("exit")
        self.state, self.status = "stopped", status

    def may(self, call: str) -> str:
        """The code of this call now, if the process exists."""
        if call == "Kill" and self.state == "stopped":
            return "NOT_FOUND"
        return "OK" if self.state in LEGAL[call, self.is_exec] else "FAILED_PRECONDITION"


class Tasks(RuleBasedStateMachine):
    """See the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        # Nothing here is slow but the machine: a busy one must not make a container look stuck.
        self.patience = contextlib.ExitStack()
        for module, name in (
            (exits_module, "EXEC_GRACE"),
            (manager_module, "_KILL_GRACE"),
        ):
            self.patience.enter_context(mock.patch.object(module, name, 60.0))
        self.runner = asyncio.Runner()
        self.shim = self.runner.run(self._open())
        self.model: dict[str, Modelled] = {}
        self.past: dict[tuple[str, str], list[str]] = {}  # events of deleted processes
        self.waiting: list[tuple[asyncio.Task[Any], Modelled]] = []
        self.vm_gone = False  # died, and the last container is not deleted yet
        self.over = False  # the sandbox's own container has ended
        self.shutdowns = 0

    async def _open(self) -> TaskClient:
        return TaskClient(self.directory, pod=POD)

    def teardown(self) -> None:
        for waiter, _ in self.waiting:
            waiter.cancel()
        self.runner.run(self.shim.close())
        self.runner.close()
        self.patience.close()
        shutil.rmtree(self.directory)

    # --- talking to the service

    def answer(self, call: Awaitable[Any]) -> tuple[str, Any]:
        async def guarded() -> tuple[str, Any]:
            try:
                return "OK", await asyncio.wait_for(call, 20)
            except KataError as error:
                return error.code, None

        return self.runner.run(guarded())

    def code(self, rpc: str, container_id: str, exec_id: str = "", **fields: Any) -> str:
        named = {"exec_id": exec_id} if exec_id else {}
        return self.answer(self.shim.call(rpc, id=container_id, **named, **fields))[0]

    def guest(self, action: Any) -> None:
        """Do something in the guest."""

        async def act() -> None:
            action()

        self.runner.run(act())

    # --- the model

    def find(self, container_id: str, exec_id: str = "") -> Modelled | None:
        container = self.model.get(container_id)
        return container.execs.get(exec_id) if container is not None and exec_id else container

    def expected(self, call: str, container_id: str, exec_id: str = "") -> str:
        process = self.find(container_id, exec_id)
        if process is None:
            return "NOT_FOUND"
        return process.may(call)

    def vm_dies(self) -> None:
        """Each process that lives ends with the VM."""
        self.vm_gone = True
        for container in self.model.values():
            container.stop(VM_DEATH, execs=VM_DEATH)
        self.note_the_end()

    def note_the_end(self) -> None:
        """The sandbox's own container takes the others with it."""
        pod = self.model.get(POD)
        if pod is not None and pod.state == "stopped":
            self.over = True
            for container in self.model.values():
                container.stop(KILLED)

    def settle(self) -> None:
        """What the model knows to have ended has been told to whoever asks."""
        self.note_the_end()
        for container_id, container in self.model.items():
            for exec_id, process in [("", container), *container.execs.items()]:
                if process.state == "stopped":
                    code, ended = self.answer(self.shim.wait(container_id, exec_id))
                    assert (code, ended.exit_status) == ("OK", process.status), (container_id, exec_id)

    # --- lives

    @initialize()
    def all_run(self) -> None:
        """Most of what can go wrong needs these calls; chance alone seldom makes them."""
        for name in NAMES:
            self.create(name)
        for name in (POD, "a"):
            self.start(name, "")
        self.exec("a", "x", cannot_start=False)
        self.start("a", "x")
        self.exec("a", "y", cannot_start=True)

    @precondition(lambda self: self.vm_gone or self.over or not self.model)
    @rule()
    def begin_again(self) -> None:
        """Without it most of a run would be spent with the dead."""
        for name in NAMES:
            self.kill(name, "", 9, everyone=False)
            self.delete(name, "")
        self.all_run()

    @rule(container_id=CONTAINERS)
    def create(self, container_id: str) -> None:
        code, _ = self.answer(self.shim.create(container_id))
        if container_id in self.model:
            assert code == "ALREADY_EXISTS"
        elif self.over:
            assert code == "FAILED_PRECONDITION"
        elif self.vm_gone:
            assert code == "UNAVAILABLE"
        else:
            assert code == "OK"
            self.model[container_id] = Modelled(events=["create"])

    @rule(container_id=CONTAINERS, exec_id=EXECS, cannot_start=st.booleans())
    def exec(self, container_id: str, exec_id: str, cannot_start: bool) -> None:
        args = ["missing"] if cannot_start else ["sh"]
        code, _ = self.answer(self.shim.exec(container_id, exec_id, args=args))
        expected = self.expected("Exec", container_id)
        if expected == "OK" and exec_id in self.model[container_id].execs:
            expected = "ALREADY_EXISTS"
        assert code == expected
        if code == "OK":
            self.model[container_id].execs[exec_id] = Modelled(
                is_exec=True, cannot_start=cannot_start, events=["exec-added"]
            )

    @rule(container_id=CONTAINERS, exec_id=PROCESSES)
    def start(self, container_id: str, exec_id: str) -> None:
        code = self.code("Start", container_id, exec_id)
        expected, process = self.expected("Start", container_id, exec_id), self.find(container_id, exec_id)
        if exec_id and expected == "OK" and self.model[container_id].may("Exec") != "OK":
            expected = "FAILED_PRECONDITION"
        if expected == "OK" and process is not None:
            if process.cannot_start:
                expected = "NOT_FOUND"
                process.stop(VM_DEATH)
            else:
                process.state = "running"
                process.events.append("exec-started" if exec_id else "start")
        assert code == expected
        self.settle()

    @rule(container_id=CONTAINERS, exec_id=PROCESSES)
    def delete(self, container_id: str, exec_id: str) -> None:
        code, deleted = self.answer(self.shim.delete(container_id, exec_id))
        process = self.find(container_id, exec_id)
        assert code == self.expected("Delete", container_id, exec_id)
        if code != "OK" or process is None:
            return
        if exec_id and process.state == "created":
            process.state, process.status = "stopped", 0
        else:
            process.stop(KILLED)
        assert deleted.exit_status == process.status
        if exec_id:
            self.bury(container_id, exec_id, self.model[container_id].execs.pop(exec_id))
            # The real agent lets an exec id be used again once its process has ended.
            self.shim.agent.processes.pop((container_id, exec_id), None)
            return
        process.events.append("delete")
        self.note_the_end()
        self.bury(container_id, "", self.model.pop(container_id))
        for name, exec_ in process.execs.items():
            self.bury(container_id, name, exec_)
        if not self.model:
            assert all(sandbox.stopped for sandbox in self.shim.runtime.sandboxes if sandbox.started)
            self.vm_gone = self.over = False

    def bury(self, container_id: str, exec_id: str, process: Modelled) -> None:
        self.past.setdefault((container_id, exec_id), []).extend(process.events)

    @rule(container_id=CONTAINERS)
    def pause(self, container_id: str) -> None:
        code = self.code("Pause", container_id)
        assert code == self.expected("Pause", container_id)
        if code == "OK":
            self.model[container_id].state = "paused"
            self.model[container_id].events.append("paused")

    @rule(container_id=CONTAINERS)
    def resume(self, container_id: str) -> None:
        code = self.code("Resume", container_id)
        assert code == self.expected("Resume", container_id)
        if code == "OK":
            self.model[container_id].state = "running"
            self.model[container_id].events.append("resumed")

    # --- ends

    @rule(
        container_id=CONTAINERS, exec_id=PROCESSES, number=st.sampled_from([0, 9, 15]), everyone=st.booleans()
    )
    def kill(self, container_id: str, exec_id: str, number: int, everyone: bool) -> None:
        code, _ = self.answer(self.shim.kill(container_id, exec_id, number, everyone))
        process, expected = self.find(container_id, exec_id), self.expected("Kill", container_id, exec_id)
        if everyone and not exec_id and process is not None and process.state == "stopped":
            expected = "OK"
        assert code == expected
        if code == "OK" and number and process is not None:
            process.stop(128 + number, execs=128 + number if everyone or number == 9 else KILLED)
        self.settle()

    @rule(
        container_id=CONTAINERS,
        exec_id=PROCESSES,
        status=STATUSES,
        how=st.sampled_from(["by itself", "inside its start", "with the VM", "with the VM, inside a call"]),
        rpc=st.sampled_from(sorted(REACHES)),
    )
    def end(self, container_id: str, exec_id: str, status: int, how: str, rpc: str) -> None:
        """One rule for all ends, so that chance leaves something alive to be called."""
        match how:
            case "by itself":
                self.exit_by_itself(container_id, exec_id, status)
            case "inside its start":
                self.exit_inside_start(container_id, status)
            case "with the VM":
                self.the_vm_dies()
            case _:
                self.the_vm_dies_inside_a_call(container_id, exec_id, rpc)

    def exit_by_itself(self, container_id: str, exec_id: str, status: int) -> None:
        """Also before its start: the guest's kernel may kill what was created."""
        process = self.find(container_id, exec_id)
        if process is None or process.state == "stopped" or (exec_id and process.state == "created"):
            return
        self.guest(lambda: self.shim.guest(container_id, exec_id).exit(status))
        process.stop(status)
        self.settle()

    def exit_inside_start(self, container_id: str, status: int) -> None:
        """It has no start then, but an exit."""
        if self.expected("Start", container_id) != "OK":
            return

        async def end() -> None:
            self.shim.guest(container_id).exit(status)

        self.shim.agent.before["start_container"] = end
        assert self.code("Start", container_id) != "OK"
        del self.shim.agent.before["start_container"]
        self.model[container_id].stop(status)
        self.settle()

    def the_vm_dies(self) -> None:
        if self.model and not self.shim.sandbox.stopped:
            self.guest(self.shim.sandbox.die)
            self.vm_dies()
            self.settle()

    def the_vm_dies_inside_a_call(self, container_id: str, exec_id: str, rpc: str) -> None:
        if not self.model or self.shim.sandbox.stopped:
            return
        died: list[bool] = []

        async def die() -> None:
            if not died:
                died.append(True)
                self.shim.sandbox.die()

        call = REACHES[rpc]
        exec_id = exec_id if (call, True) in LEGAL else ""
        process = self.find(container_id, exec_id)
        if call == "Stats" and process is not None and process.state == "stopped":
            return  # that was asked when it ended
        may = self.expected(call, container_id, exec_id)
        if exec_id and may == "OK" and call == "Start" and self.model[container_id].may("Exec") != "OK":
            may = "FAILED_PRECONDITION"
        if may == "OK" and call == "Start" and (rpc == "exec_process") != bool(exec_id):
            return  # the other of the two calls to the guest
        self.shim.agent.before[rpc] = die
        fields = {**HARMLESS.get(call, {}), **({"signal": 9} if call == "Kill" else {})}
        code = self.code(call, container_id, exec_id, **fields)
        del self.shim.agent.before[rpc]
        assert bool(died) == (may == "OK")
        if not died:
            assert code == may
            return
        assert code in {"UNAVAILABLE", "NOT_FOUND"}
        if rpc == "exec_process" and process is not None:
            process.stop(VM_DEATH)  # nobody is to wait for it for ever; it told no start, so no exit
        self.vm_dies()
        self.settle()

    @rule(container_id=CONTAINERS)
    def out_of_memory(self, container_id: str) -> None:
        """Told before the exit, never after it."""
        self.guest(lambda: self.shim.manager.report_oom(container_id))
        container = self.model.get(container_id)
        if container is not None and container.state != "stopped":
            container.events.append("oom")

    # --- calls that change nothing

    @rule(container_id=CONTAINERS, exec_id=PROCESSES)
    def look(self, container_id: str, exec_id: str) -> None:
        for call, fields in HARMLESS.items():
            name = exec_id if (call, True) in LEGAL else ""
            assert self.code(call, container_id, name, **fields) == self.expected(call, container_id, name)

    @rule(container_id=CONTAINERS)
    def pids_and_connect(self, container_id: str) -> None:
        container = self.model.get(container_id)
        code, connected = self.answer(self.shim.call("Connect", id=container_id))
        assert code == ("OK" if self.model else "NOT_FOUND")
        if self.model:
            assert connected.task_pid == (0 if container is None else VMM_PID)
        if container is not None:
            _, answer = self.answer(self.shim.call("Pids", id=container_id))
            assert {process.pid for process in answer.processes} == {VMM_PID}
            running = [name for name, exec_ in container.execs.items() if exec_.state == "running"]
            assert [p.info.value[2:].decode() for p in answer.processes] == ["", *running]

    @rule(container_id=CONTAINERS)
    def checkpoint_and_shutdown(self, container_id: str) -> None:
        expected = "UNIMPLEMENTED" if container_id in self.model else "NOT_FOUND"
        assert self.code("Checkpoint", container_id) == expected
        assert self.code("Shutdown", container_id) == "OK"
        self.shutdowns += not self.model
        assert self.shim.shutdowns == self.shutdowns

    @rule(container_id=CONTAINERS, exec_id=PROCESSES)
    def begin_to_wait(self, container_id: str, exec_id: str) -> None:
        process = self.find(container_id, exec_id)
        if process is None:
            assert self.code("Wait", container_id, exec_id) == "NOT_FOUND"
            return

        async def begin() -> asyncio.Task[Any]:
            return asyncio.create_task(self.shim.wait(container_id, exec_id))

        self.waiting.append((self.runner.run(begin()), process))

    # --- what always holds

    @invariant()
    def states_agree(self) -> None:
        for container_id in NAMES:
            for exec_id in ("", *EXEC_NAMES):
                code, state = self.answer(self.shim.state(container_id, exec_id))
                process = self.find(container_id, exec_id)
                if process is None:
                    assert code == "NOT_FOUND"
                else:
                    assert code == "OK"
                    assert state.status == STATUS[process.state], (container_id, exec_id)
                    assert state.HasField("exited_at") == (process.state == "stopped")

    @invariant()
    def waiters_agree(self) -> None:
        async def turns() -> None:
            for _ in range(5):
                await asyncio.sleep(0)

        self.runner.run(turns())
        for waiter, process in self.waiting:
            assert waiter.done() == (process.state == "stopped")
            if waiter.done():
                assert waiter.result().exit_status == process.status

    @invariant()
    def events_agree(self) -> None:
        told: dict[tuple[str, str], list[str]] = {}
        for topic, event in self.shim.events.events:
            name = getattr(event, "exec_id", "") or getattr(event, "id", "")
            key = (event.container_id, "" if name == event.container_id else name)
            told.setdefault(key, []).append(topic)
        expected = {key: list(events) for key, events in self.past.items()}
        for container_id, container in self.model.items():
            for exec_id, process in [("", container), *container.execs.items()]:
                expected.setdefault((container_id, exec_id), []).extend(process.events)
        assert told == expected


TestTasks = Tasks.TestCase
TestTasks.settings = settings(max_examples=50, stateful_step_count=50, deadline=None)
