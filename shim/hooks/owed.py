"""The poststop hooks that a dead shim owes.

What: `run_poststop` runs them from what the journal recorded, for `delete`.
Invariants: they come from the bundle, which containerd keeps until `delete` is over, and are read as the shim
read them (`shim.spec.documents`); together they take no longer than they may; no asyncio (facts: `delete` has
5 seconds and starts an interpreter).
"""

from __future__ import annotations

import time

from devices.errors import KataError
from shim.hooks.hook_process import read_hooks, run, state_json
from shim.spec.documents import load_spec
from shim.state.releases import Facts, ReleaseError

__all__ = ["run_poststop"]


def run_poststop(facts: Facts, timeout: float) -> None:
    """`facts`: `container` and `bundle`, its directory. Raises ReleaseError when one cannot run or fails."""
    bundle, container = str(facts.get("bundle")), str(facts.get("container"))
    until = time.monotonic() + timeout
    try:
        spec, _ = load_spec(bundle)
        hooks = read_hooks(spec)["poststop"]
    except KataError as error:
        raise ReleaseError(f"the poststop hooks of {container} cannot be read: {error}") from error
    failed: list[str] = []
    for hook in hooks:
        try:
            state = state_json(spec, container, bundle, "stopped", 0)
            run(hook, state, cwd=bundle, timeout=max(0.1, until - time.monotonic()))
        except KataError as error:
            failed.append(str(error))
    if failed:
        raise ReleaseError("; ".join(failed))
