"""`delete` waits for a daemon that is dying, and for nobody else."""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from shim.launch import cleanup
from shim.state.identity import Identity


@pytest.mark.parametrize(("ends", "problems"), [(True, 0), (False, 1)])
def test_the_socket_of_a_daemon_that_is_dying_goes(tmp_path: Path, ends: bool, problems: int) -> None:
    """Nothing but its socket tells of one that the kernel has not taken down yet; a living one's stays."""
    path = tmp_path / "shim.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)
    timer = threading.Timer(0.2 if ends else 30.0, listener.close)
    timer.start()
    found: list[str] = []
    try:
        identity = Identity("/run/nobody.sock", "ns", f"c{os.getpid()}")
        cleanup.sandbox(identity, identity.sandbox_id, str(path), 0, time.monotonic() + 5, found)
    finally:
        timer.cancel()
        listener.close()
    assert len(found) == problems, found
    assert path.exists() is not ends
