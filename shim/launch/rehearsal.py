"""A dress rehearsal of what each daemon does first, in the zygote, before it forks.

What: `rehearse` serves one call to itself and reads the configuration.
Why: what Python does the first time only (abstract classes that ask all their subclasses, regular
expressions, message types) writes to many pages, which each child would then have of its own.
Invariants: nothing of it stays but caches; it may fail, which costs memory and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import signal
import socket
from typing import Any, NoReturn

from devices.errors import CallerError
from proto import task_v2_pb2, task_v3_pb2
from shim.launch import caller
from ttrpc import CallContext, Client, Server

__all__ = ["rehearse"]

_LIMIT = 5.0  # seconds; it takes some milliseconds


def rehearse(place: str) -> None:
    """Play it, with `place` as the socket's path."""
    os.environb.update(dict(os.environb))
    caller.rehearse()
    with contextlib.suppress(Exception), asyncio.Runner() as runner:
        runner.run(asyncio.wait_for(_scene(place), _LIMIT))
    with contextlib.suppress(OSError):
        os.unlink(place)
    with contextlib.suppress(Exception):
        importlib.import_module("shim.runtime").load_config()


class _Service:
    async def state(self, _context: CallContext, _request: Any) -> NoReturn:
        raise CallerError("no container was created", code="NOT_FOUND")


async def _scene(place: str) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR2, lambda: None)
    loop.remove_signal_handler(signal.SIGUSR2)
    server = Server(allowed_uids={os.geteuid()})
    for package in (task_v2_pb2, task_v3_pb2):
        server.register(package.DESCRIPTOR.services_by_name["Task"], _Service())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen(1)
        listener.setblocking(False)
        serving = asyncio.create_task(server.serve(listener))
        method = task_v2_pb2.DESCRIPTOR.services_by_name["Task"].methods_by_name["State"]
        client = await Client.connect_unix(place, timeout=_LIMIT)
        with contextlib.suppress(Exception):
            await client.call(method, task_v2_pb2.StateRequest(id="rehearsal"), timeout=_LIMIT)
        await client.close()
        await server.close(1)
        await serving
