"""No reader of foreign bytes raises anything but its own errors, on known inputs and in a minute of fuzzing.

The long run is `make fuzz`.
"""

from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.fuzz import all_targets
from tests.fuzz.seeds import CORPUS, seeds

ROOT = Path(__file__).resolve().parents[2]
TARGETS = all_targets()
WHEEL = platform.machine() == "x86_64" and sys.version_info < (3, 14)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_known_is_read(name: str) -> None:
    """Each seed and each input that is checked in, as it is, cut off, and doubled."""
    known = seeds(name)

    assert known, "without a beginning a fuzzer finds only the first check of a format"
    for data in known:
        for variant in (data, data[: len(data) // 2], data + data):
            TARGETS[name](variant)


def test_every_corpus_has_its_target() -> None:
    folders = {path.name for path in CORPUS.iterdir()}

    assert folders == set(TARGETS)


def test_what_the_issue_names_has_its_target() -> None:
    """Whoever renames or drops one has to say what reads those bytes instead."""
    named = {
        "ttrpc codec": {"ttrpc-server", "ttrpc-client"},
        "agent replies": {"agent"},
        "QMP": {"qmp", "qmp-answers"},
        "Firecracker replies": {"firecracker", "firecracker-metrics"},
        "Cloud Hypervisor's events": {"clh-events"},
        "Dragonball's answers and events": {"dragonball"},
        "config.json": {"config-json", "spec-values", "exec-process", "update-resources"},
        "configuration": {"configuration"},
        "annotations": {"pod-annotations"},
        "journal": {"journal"},
    }
    for what, names in named.items():
        assert names <= set(TARGETS), what


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None and not WHEEL,
    reason="atheris has no wheel for this machine or Python (it has for x86_64, up to 3.13)",
)
@pytest.mark.timeout(900)
def test_a_minute_of_fuzzing_finds_nothing() -> None:
    """Nor does it leave anything."""
    before = set(Path(tempfile.gettempdir()).glob("kata-fuzz-*"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--seconds", "60"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "no findings" in done.stdout
    assert set(Path(tempfile.gettempdir()).glob("kata-fuzz-*")) <= before
