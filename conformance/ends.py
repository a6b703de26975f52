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
from pathlib import Path

import pytest

from conformance.life import PROMPT, Contract
from conformance.subject import SANDBOX, World
from devices.child import process_stat
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
        finally:
            victim.send_signal(signal.SIGKILL)
            victim.wait()
            victim.stdout.close()
        history = journalfile.load(str(world.state))
        assert not history.damage
        processes = [record for record in history.records if record.kind == "process"]
        assert {record.facts.get("pid") for record in processes} >= set(pids), "each stands in the journal"
        others = [record for record in history.records if record.kind != "process"]
        for record in [*reversed(processes), *reversed(others)]:
            await asyncio.to_thread(release, record)
        until = time.monotonic() + PROMPT
        while left := [pid for pid in pids if _lives(pid)]:
            assert time.monotonic() < until, f"{left} outlived both"
            await asyncio.sleep(0.01)
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        assert [line for line in mounts if f" {world.state}/" in line] == []
        shutil.rmtree(world.state)
        world.state.mkdir(mode=0o700)


def _lives(pid: int) -> bool:
    try:
        return process_stat(pid)[0] != "Z"
    except ProcessLookupError:
        return False
