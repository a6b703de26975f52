"""Short containers in numbers, alone and in pods: every exit code, one exit event each, nothing left behind.

This is the small edition; `make storm` runs two hundred.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from testing.containerd import Containerd
from tests.stress.storm import Storm


@pytest.mark.slow
def test_a_dozen_containers_four_at_a_time(containerd: Containerd, runtime: str, tmp_path: Path) -> None:
    storm = Storm(
        containerd,
        tmp_path / "fifos",
        image="local/busybox:1",
        count=12,
        parallel=4,
        pods=2,
        members=4,
        runtime=runtime,
    )
    outcome = storm.run()
    assert outcome.wrong == [], containerd.log_tail(60)


@pytest.mark.kata_only
def test_what_goes_wrong_is_told(containerd: Containerd, runtime: str, tmp_path: Path) -> None:
    """The storm's own judgement: a container that cannot be created is no success."""
    storm = Storm(containerd, tmp_path / "fifos", image="local/none:1", count=1, parallel=1, runtime=runtime)
    (failed, untold) = storm.run().wrong
    assert "local/none:1" in failed
    assert "events []" in untold
