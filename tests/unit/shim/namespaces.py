"""Runs a test's body in a process with a mount namespace of its own: real mounts, none left behind."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

import pytest

from devices.mounts import make_private


def in_mount_namespace(body: Callable[[], None]) -> None:
    """Fork, unshare, run `body`; a failure there is a failure here. Needs root."""
    if os.geteuid() != 0:
        pytest.skip("mounts need root")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            make_private()
            body()
            code = 0
        except BaseException:  # noqa: BLE001  (a forked child must not return into pytest)
            os.write(writer, traceback.format_exc().encode()[-60_000:])
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, "rb") as pipe:
        report = pipe.read().decode()
    _, status = os.waitpid(pid, 0)
    assert status == 0, report
