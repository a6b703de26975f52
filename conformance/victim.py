"""A process that runs one VM and is then killed: what `conformance.ends` does with it.

What: takes a plugin, a section and devices from its stdin (pickled, from its parent: trusted), starts the VM
with the shim's own journal, writes the pids as a line of JSON, and waits for its death.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import sys
from typing import Any

from shim.state.identity import Identity
from shim.state.journal import Journal

__all__ = ["identity"]


def identity(sandbox: str) -> Identity:
    """Whose the journal is."""
    return Identity("/run/containerd/containerd.sock", "conformance", sandbox)


async def _run(
    answer: int, plugin: Any, section: Any, devices: list[Any], sandbox: str, state: str, patience: float
) -> None:
    journal = Journal.create(state, identity(sandbox))
    vm = plugin.create(section, sandbox_id=sandbox, state_dir=state, undo=journal)
    await vm.prepare_vm(sandbox, None)
    for device in devices:
        await vm.add_device(device)
    await vm.start_vm(patience)
    os.write(answer, json.dumps(await vm.get_pids()).encode() + b"\n")
    await asyncio.Event().wait()


if __name__ == "__main__":
    answer = os.dup(1)
    os.dup2(2, 1)  # the log is no answer
    asyncio.run(_run(answer, *pickle.load(sys.stdin.buffer)))
