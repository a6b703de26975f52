"""A zygote for the shims of one containerd of ours, for tests and the bench."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from testing.containerd import Containerd

__all__ = ["zygote_of"]


@contextlib.contextmanager
def zygote_of(containerd: Containerd) -> Iterator[int]:
    """Start it, wait until it listens, and end it; its pid."""
    program = containerd.root / "bin" / "containerd-shim-kata-v2"
    place = re.search(rb"/run/kata-shim-zygote/[0-9a-f]+", program.read_bytes())
    assert place is not None, "the client is not compiled; try: make setup"
    path = Path(os.fsdecode(place[0]))
    with subprocess.Popen([str(program), "zygote"], env=containerd.environment) as process:
        try:
            until = time.monotonic() + 30
            while not path.exists():
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.01)
            yield process.pid
        finally:
            process.terminate()
    path.unlink(missing_ok=True)
