"""A VM under QEMU written to a file, and one begun with what was written.

What: `save` stops the VM and writes the state of its devices; `load` gives that to a QEMU that was started
with `-incoming defer`, and has the VM go on.
Why not its memory: it is a file already, which the VM maps (`x-ignore-shared`): so there is 0.4 MB to write,
in some ten milliseconds, and a VM that begins with it maps the same file privately.
Invariants: QEMU opens no path: it gets a pipe, and we read or feed the other end in a thread, bounded in
bytes and in time. What goes wrong is told with QEMU's reason, and the VM that was to be saved goes on.
Source: qapi/migration.json (migrate, migrate-incoming, MIGRATION, x-ignore-shared) of QEMU 7.2.
"""

from __future__ import annotations

import asyncio
import os
import select
import time
from collections.abc import Callable

from devices.errors import HostError, HypervisorError
from devices.threads import acquire
from hypervisors.qemu.qmp import QmpClient, QmpEvent

__all__ = ["STATE_LIMIT", "load", "save"]

STATE_LIMIT = 64 << 20
"""Bytes of the state of a VM's devices; 0.4 MiB is usual."""
_FD = "vm-state"
_PIECE = 64 << 10
_CAPABILITIES = ("events", "x-ignore-shared")


async def save(qmp: QmpClient, path: str, timeout: float) -> None:
    """Write the devices' state to the new file `path`; the VM stands still afterwards. Raises
    HypervisorError, OSError; the VM runs then, and there is no file."""
    await qmp.execute("stop")
    try:
        file = await acquire(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            reader, writer = os.pipe2(os.O_CLOEXEC)
            try:
                drained = asyncio.create_task(acquire(_drain, reader, file, timeout))
                try:
                    await _migrate(qmp, "migrate", writer, timeout, lambda: os.close(writer))
                finally:
                    written = await drained
            finally:
                os.close(reader)
        finally:
            os.close(file)
        if not written:
            raise HypervisorError("QEMU has saved nothing of the VM", phase="save")
    except BaseException:
        if os.path.exists(path):
            os.unlink(path)
        await qmp.execute("cont")
        raise


async def load(qmp: QmpClient, path: str, timeout: float) -> None:
    """Have the VM be the one whose state is in the file `path`, and run. Raises HypervisorError,
    HostError."""
    try:
        file = await acquire(os.open, path, os.O_RDONLY | os.O_CLOEXEC, lost=os.close)
    except OSError as error:
        raise HostError(f"the state {path} cannot be opened: {error.strerror}", phase="vmm") from error
    try:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        feeding = asyncio.create_task(acquire(_feed, file, writer, timeout))
        try:
            await _migrate(qmp, "migrate-incoming", reader, timeout, lambda: os.close(reader))
        finally:
            await feeding
    finally:
        os.close(file)
    await qmp.execute("cont")


async def _migrate(qmp: QmpClient, command: str, fd: int, timeout: float, given: Callable[[], None]) -> None:
    """`given`: QEMU has the descriptor, or will not get it."""
    try:
        switches = [{"capability": name, "state": True} for name in _CAPABILITIES]
        await qmp.execute("migrate-set-capabilities", {"capabilities": switches})
        await qmp.execute("getfd", {"fdname": _FD}, fds=[fd])
    finally:
        given()
    with qmp.expect(_ended) as ended:
        await qmp.execute(command, {"uri": f"fd:{_FD}"}, timeout=timeout)
        try:
            async with asyncio.timeout(timeout):
                event = await ended
        except TimeoutError:
            raise HypervisorError(
                f"QEMU did not finish {command} within {timeout:g} s", code="DEADLINE_EXCEEDED"
            ) from None
    if event["data"]["status"] != "completed":
        answer = await qmp.execute("query-migrate")
        reason = answer.get("error-desc") if isinstance(answer, dict) else None
        raise HypervisorError(
            f"QEMU: {command} {event['data']['status']}: {reason or 'no reason given'}"[:1000]
        )


def _ended(event: QmpEvent) -> bool:
    data = event.get("data")
    status = data.get("status") if isinstance(data, dict) else None
    return event.get("event") == "MIGRATION" and status in ("completed", "failed", "cancelled")


def _drain(reader: int, file: int, timeout: float) -> int:
    """Copy what comes until its end; how many bytes. Raises HypervisorError beyond limit or time. Blocks."""
    end, size = time.monotonic() + timeout, 0
    while True:
        if not select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
            raise HypervisorError("QEMU did not finish the VM's state", code="DEADLINE_EXCEEDED")
        piece = os.read(reader, _PIECE)
        size += len(piece)
        if not piece:
            return size
        if size > STATE_LIMIT:
            raise HypervisorError(f"the VM's state has more than {STATE_LIMIT >> 20} MiB", phase="save")
        os.write(file, piece)


def _feed(file: int, writer: int, timeout: float) -> None:
    """Copy all of the file and close `writer`. Who does not read any more is told by QEMU. Blocks."""
    end = time.monotonic() + timeout
    try:
        os.set_blocking(writer, False)
        while piece := os.read(file, _PIECE):
            view = memoryview(piece)
            while view:
                if not select.select([], [writer], [], max(0.0, end - time.monotonic()))[1]:
                    return
                view = view[os.write(writer, view) :]
    except BrokenPipeError:
        return
    finally:
        os.close(writer)
