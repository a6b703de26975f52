"""Any order of calls, container exits and deaths of the VM: the Sandbox service against a small model."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from devices.errors import KataError
from tests.unit.shim.api.test_sandbox_service import CODES, OK, STATES, Client

#: What a call that succeeds makes of a state; others leave it.
_AFTER = {
    ("CreateSandbox", "absent"): "created",
    ("StartSandbox", "created"): "ready",
    ("StopSandbox", "created"): "stopped",
    ("StopSandbox", "ready"): "stopped",
    ("ShutdownSandbox", "created"): "stopped",
    ("ShutdownSandbox", "ready"): "stopped",
}
_RPCS = [rpc for rpc in CODES if rpc != "task.Create"]
_STEPS = st.lists(st.sampled_from([*_RPCS, "container", "exit", "delete", "die"]), max_size=25)


class _Model:
    """What should be true: the sandbox's state, and the containers, running or not."""

    def __init__(self) -> None:
        self.state = "absent"
        self.containers: dict[str, bool] = {}
        self.made = 0
        self.shutdowns = 0


async def _step(shim: Client, model: _Model, step: str) -> None:
    if step in _RPCS:
        await _rpc(shim, model, step)
    elif step == "container":
        await _container(shim, model)
    elif step == "die" and model.state == "ready":
        shim.sandbox.die()
        await shim.rpc("WaitSandbox")
        model.state = "died"
        for name in [name for name, running in model.containers.items() if running]:
            await shim.wait(name)  # who deletes it waits for its exit, which comes a moment later
        model.containers = dict.fromkeys(model.containers, False)
    elif step == "exit":
        for name in [name for name, running in model.containers.items() if running][:1]:
            shim.guest(name).exit(4)
            assert (await shim.wait(name)).exit_status == 4
            model.containers[name] = False
    elif step == "delete":
        for name in [name for name, running in model.containers.items() if not running][:1]:
            await shim.delete(name)
            del model.containers[name]


async def _rpc(shim: Client, model: _Model, rpc: str) -> None:
    expected = CODES[rpc][STATES.index(model.state)]
    assert await shim.code(rpc) == expected, (rpc, model.state)
    if expected == OK:
        model.state = _AFTER.get((rpc, model.state), model.state)
        model.shutdowns += rpc == "ShutdownSandbox"
        if model.state == "stopped":
            model.containers = dict.fromkeys(model.containers, False)


async def _container(shim: Client, model: _Model) -> None:
    name = f"c{model.made}"
    if model.state == "absent":  # a container without a sandbox is another story
        return
    try:
        await shim.create(name)
        await shim.start(name)
    except KataError as error:
        assert (error.code, model.state != "ready") == ("FAILED_PRECONDITION", True)
        return
    assert model.state == "ready"
    model.made += 1
    model.containers[name] = True


def _holds(shim: Client, model: _Model) -> None:
    """What is true between any two steps."""
    assert shim.shutdowns == model.shutdowns
    assert set(shim.manager.containers) == set(model.containers)
    if model.state in {"created", "ready"}:
        assert not shim.sandbox.stopped
        assert not shim.manager.idle
    if model.state == "stopped":
        assert shim.sandbox.stopped
    exits = [event.container_id for event in shim.events.of("exit")]
    assert len(exits) == len(set(exits)), "one exit each"
    assert len(shim.pods.sandboxes) <= 1


@settings(max_examples=150, deadline=None)
@given(_STEPS)
@example(["CreateSandbox", "StartSandbox", "container", "die", "delete"])
def test_any_order(steps: list[str]) -> None:
    async def play() -> None:
        with tempfile.TemporaryDirectory() as directory:
            async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
                shim, model = Client(Path(directory), tasks), _Model()
                for step in steps:
                    await _step(shim, model, step)
                    _holds(shim, model)
                if shim.pods.pod is not None:
                    await shim.pods.pod.stop(0)
                started = [event.container_id for event in shim.events.of("start")]
                exited = [event.container_id for event in shim.events.of("exit")]
                assert sorted(started) == sorted(exited), "whoever started has ended with the sandbox"
                await shim.close()

    asyncio.run(play())
