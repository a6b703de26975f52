"""Versions are read from apt's words; a package that apt does not know, or a missing tool, is named."""

from __future__ import annotations

import pytest

from devices.errors import HostError
from guest import debian
from guest.tools import run_tool

POLICY = """\
libc6:
  Installed: 2.36-9
  Candidate: 2.36-10
  Version table:
     2.36-10 500
crun:
  Installed: (none)
  Candidate: 1:1.8.1-1+deb12u1
  Version table:
gone:
  Installed: (none)
  Candidate: (none)
  Version table:
"""


@pytest.fixture
def apt(monkeypatch: pytest.MonkeyPatch) -> None:
    """An apt that says POLICY."""
    monkeypatch.setattr(debian, "run_tool", lambda argv, **_: POLICY)


@pytest.mark.usefixtures("apt")
def test_candidates() -> None:
    """The candidate counts, not what this machine has installed."""
    assert debian.candidates(["crun", "libc6"]) == {"crun": "1:1.8.1-1+deb12u1", "libc6": "2.36-10"}


@pytest.mark.usefixtures("apt")
def test_unknown_packages_are_named() -> None:
    """Known by name only, or not at all: both are unknown."""
    with pytest.raises(HostError, match=r"packages gone, other; try: .*apt-get update"):
        debian.candidates(["libc6", "gone", "other"])


def test_epochs_do_not_enter_file_names() -> None:
    """As apt itself does it."""
    assert debian.deb_name("crun", "1:1.8") == "crun_1%3a1.8.deb"


def test_a_missing_tool() -> None:
    """The hint says what to install."""
    with pytest.raises(HostError, match="no program no-such-tool; try: apt-get install no-such-tool"):
        run_tool(["no-such-tool"])


def test_a_failing_tool() -> None:
    """Its last words are shown."""
    with pytest.raises(HostError, match="sh failed: third"):
        run_tool(["sh", "-c", "echo first; echo third >&2; exit 3"])
