"""A run of the tests that somebody ends leaves nothing: its fixtures are taken down."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

_TESTS = """
import pathlib, time, pytest

@pytest.fixture(scope="session")
def daemon():
    yield
    pathlib.Path({down!r}).touch()

def test_it(daemon):
    pathlib.Path({up!r}).touch()
    time.sleep(60)
"""


def test_sigterm_takes_down_what_is_up(tmp_path: Path) -> None:
    up, down = tmp_path / "up", tmp_path / "down"
    file = tmp_path / "test_it.py"
    file.write_text(_TESTS.format(up=str(up), down=str(down)))
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", str(file)]
    with subprocess.Popen(argv, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL) as run:
        until = time.monotonic() + 60
        while not up.exists():
            assert run.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        run.terminate()
        assert run.wait(30) == 2, "pytest's code for a run that was interrupted"
    assert down.exists()
