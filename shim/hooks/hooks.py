"""The OCI hooks of one container that run on the host, and when.

What: `HostHooks` runs the hooks of each stage with the container's state. What a dead shim still owes
is in its journal, and `shim.hooks.owed` runs it.
Why on the host: whoever writes hooks into a spec (nerdctl's network setup, a device plugin) is a
client of containerd, root here, and means files of this host. The pid in the state is the VMM's: its
network namespace is the pod's. createContainer runs in that namespace, since the container's own is
inside the VM. startContainer hooks are the guest's, from the container's own files.
Invariants:
- prestart, createRuntime and createContainer end before the guest hears of the container; the first
  failure ends the creation. Failures of poststart and poststop are logged, and the rest goes on.
- Once the first hook has run, the poststop hooks run exactly once: at the container's deletion, when its
  creation is undone, when the shim ends, or, after kill -9, by `delete`.
- Nobody waits longer for a hook than its timeout; one whose caller is gone is killed.
Source: runtime-spec `runtime.md` (lifecycle); Kata's order (facts/kata.md 3.2).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog

from devices.child import process_start_time
from devices.errors import KataError
from devices.threads import submit
from devices.undo import Entry, UndoLog
from shim.hooks.hook_process import Hook, read_hooks, run, state_json

__all__ = ["HostHooks"]

_log = structlog.get_logger("hooks")

_STATUS = {"poststart": "running", "poststop": "stopped"}


class HostHooks:
    """The hooks of one container.

    `mounts` is a descriptor of the host's mount namespace, None if the shim has no other.
    """

    def __init__(
        self,
        container_id: str,
        bundle: str,
        spec: Mapping[str, Any],
        *,
        pid: int,
        undo: UndoLog,
        mounts: int | None,
    ) -> None:
        self._id = container_id
        self._bundle = bundle
        self._spec = spec
        self._pid = pid
        self._undo = undo
        self._mounts = mounts
        self._hooks = read_hooks(spec)
        self._owed: Entry | None = None

    async def before_create(self) -> None:
        """prestart, createRuntime, createContainer. Raises HostError for the first that fails."""
        if not any(self._hooks.values()):
            return
        if self._hooks["poststop"]:
            self._owed = self._undo.record(
                "poststop", self._poststop, container=self._id, bundle=self._bundle
            )
        for stage in ("prestart", "createRuntime", "createContainer"):
            for hook in self._hooks[stage]:
                try:
                    await self._run(stage, hook)
                except KataError as error:
                    error.cause = f"{stage} {error.cause}"
                    raise

    async def after_start(self) -> None:
        """poststart. Never fails."""
        await self._run_all("poststart")

    async def after_delete(self) -> None:
        """poststop, unless they ran already. Never fails."""
        if self._owed is not None:
            entry, self._owed = self._owed, None
            await self._undo.release(entry)

    async def _poststop(self) -> None:
        self._owed = None
        await self._run_all("poststop")

    async def _run_all(self, stage: str) -> None:
        for hook in self._hooks[stage]:
            try:
                await self._run(stage, hook)
            except KataError as error:
                _log.warning("a hook failed", stage=stage, container=self._id, error=str(error))

    async def _run(self, stage: str, hook: Hook) -> None:
        loop = asyncio.get_running_loop()

        def started(pid: int) -> None:
            loop.call_soon_threadsafe(self._note, entry, pid)

        entry = self._undo.record("process", name=f"{stage} hook", container=self._id)
        watch, stop = os.pipe2(os.O_CLOEXEC)
        # A thread of its own, which ends with the hook: it stays in the namespaces that it enters.
        thread = ThreadPoolExecutor(1, thread_name_prefix="hook")
        try:
            work = submit(
                thread,
                functools.partial(
                    run,
                    hook,
                    state_json(self._spec, self._id, self._bundle, _STATUS.get(stage, "creating"), self._pid),
                    cwd=self._bundle,
                    mounts=self._mounts,
                    netns=f"/proc/{self._pid}/ns/net" if stage == "createContainer" else None,
                    stop=watch,
                    started=started,
                ),
            )
            try:
                await asyncio.shield(work)
            except asyncio.CancelledError:
                os.write(stop, b"x")
                await asyncio.wait([work])
                raise
        finally:
            thread.shutdown(wait=False)
            os.close(stop)
            os.close(watch)
            self._undo.forget(entry)

    def _note(self, entry: Entry, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it is over already
            self._undo.update(entry, pid=pid, start=process_start_time(pid))
