"""How a VM ends that nobody stopped: by its guest, and with the process of its driver.

What: `EndsContract`. A guest's panic, reset and switching off are told as what they are; of a driver that
dies by SIGKILL, the journal undoes what does not go by itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from conformance.life import PROMPT, Contract
from conformance.subject import SANDBOX, World
from devices.child import process_start_time, process_stat
from devices.mounts import unmount
from shim.launch.undo_kinds import release
from shim.state import journalfile

__all__ = ["EndsContract"]

_TOLD = {"panic": "panic", "reset": "the guest", "poweroff": "the guest"}


class EndsContract(Contract):
    """See the module's docstring."""

    @pytest.mark.parametrize("how", list(_TOLD))
    async def test_the_guests_own_end_is_told_as_what_it_is(self, world: World, how: str) -> None:
        """A VMM that boots a guest again in place is no exception: a sandbox has lost its containers."""
        if how == "poweroff" and not self.subject.powers_off:
            pytest.skip("this VMM's guests have no switch")
        vm = await world.boot()
        ask = await world.ask()
        await ask.put("end", how=how)
        ended = await asyncio.wait_for(vm.wait_vm(), PROMPT)
        assert not ended.expected
        assert _TOLD[how] in ended.reason
        assert how == "panic" or "panic" not in ended.reason
        assert await vm.get_pids() == []

    async def test_of_a_killed_driver_nothing_is_left_but_what_its_journal_undoes(self, world: World) -> None:
        vm = world.create()
        section = await vm.hypervisor_config()
        devices = list(self.subject.devices(section, world.share))
        given = (self.subject.plugin, section, devices, SANDBOX, str(world.state), self.subject.patience)
        victim = subprocess.Popen(
            [sys.executable, "-m", "conformance.victim"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert victim.stdin is not None
        assert victim.stdout is not None
        try:
            victim.stdin.write(pickle.dumps(given))
            victim.stdin.close()
            pids = json.loads(await asyncio.to_thread(victim.stdout.readline) or "[]")
            assert pids, "the driver could not start the VM in a process of its own; see what it wrote"
            started = {pid: process_start_time(pid) for pid in pids}
        finally:
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            victim.stdout.close()
        try:
            await self._undone(str(world.state), started)
        finally:  # of a driver that does not keep this
            for pid, start in started.items():
                if _lives(pid, start):
                    os.kill(pid, signal.SIGKILL)
            for place in _mounted_below(str(world.state)):
                await asyncio.to_thread(unmount, place)
            shutil.rmtree(world.state)
            world.state.mkdir(mode=0o700)

    async def _undone(self, state: str, started: Mapping[int, int]) -> None:
        """Do what `delete` does with a journal: then nothing runs, and nothing is mounted."""
        history = journalfile.load(state)
        assert not history.damage
        processes = [record for record in history.records if record.kind == "process"]
        assert {record.facts.get("pid") for record in processes} >= set(started), "each stands in the journal"
        others = [record for record in history.records if record.kind != "process"]
        for record in [*reversed(processes), *reversed(others)]:
            await asyncio.to_thread(release, record)
        until = time.monotonic() + PROMPT
        while left := [pid for pid, start in started.items() if _lives(pid, start)]:
            assert time.monotonic() < until, f"{left} outlived both"
            await asyncio.sleep(0.01)
        assert _mounted_below(state) == []


def _mounted_below(directory: str) -> list[str]:
    """Mount points, the deepest first."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    places = [line.split(" ")[4] for line in lines]
    return sorted((place for place in places if place.startswith(f"{directory}/")), reverse=True)


def _lives(pid: int, start: int) -> bool:
    """Whether it is still that process, by its start time."""
    try:
        return process_start_time(pid) == start and process_stat(pid)[0] != "Z"
    except ProcessLookupError:
        return False
