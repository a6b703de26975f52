"""`make test-hosts` reads what suites and programs say, and mounts the cgroups that this host has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from scripts.host_root import cgroup_mounts
from scripts.hosts import _TEN, JOBS, LONG, SHORT, cell, counts, table
from testing.guest import PROJECT


def test_pytests_last_line_counts() -> None:
    """The summary, not a test's output that looks like one."""
    said = "3 failed hard\nFAILED tests/a.py::b\n=== 2 failed, 40 passed, 1 skipped in 3.21s ===\n"

    assert counts(said) == {"failed": 2, "passed": 40, "skipped": 1}
    assert counts("Everything is cleaned up") == {}


def test_a_suite_that_was_ended_counts_what_it_came_to() -> None:
    said = (
        "tests/e2e/test_a.py::test_x[a b] PASSED                  [  1%]\n"
        "tests/e2e/test_a.py::test_y FAILED                       [  2%]\n"
        "tests/e2e/test_a.py::test_z SKIPPED (no KVM)             [  3%]\n"
        "tests/e2e/test_a.py::test_w PASSED                       [100%]\n"
        "tests/e2e/test_b.py::test_x "
    )

    assert counts(said) == {"passed": 2, "failed": 1, "skipped": 1}


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({}, "-"),
        ({"ok": True}, "green"),
        ({"ok": False}, "fails"),
        ({"ok": False, "passed": 3, "failed": 1}, "3 passed, 1 failed"),
        ({"ok": False, "passed": 3, "unfinished": True}, "3 passed, then its time was over"),
    ],
)
def test_a_suite_in_a_few_words(result: dict[str, object], text: str) -> None:
    assert cell(result) == text


def test_the_table_has_releases_as_columns() -> None:
    """In the order of the releases, and with the commit of each suite."""
    done = {"suites": {"demo": {"ok": True, "commit": "0123456789"}}, "versions": {"QEMU": "10.0.13"}}
    lines = table({"debian-14": {"suites": {}}, "debian-13": done}).splitlines()

    assert lines[0] == "|  | debian-13 | debian-14 |"
    assert "| QEMU | 10.0.13 | - |" in lines
    assert "| `demo` | green (0123456) | - |" in lines
    assert {*SHORT, *LONG} == JOBS.keys()


def test_the_short_forms_tests_exist() -> None:
    for name in _TEN:
        file, _, function = name.partition("::")
        assert f"def {function}(" in (PROJECT / "tests/e2e" / file).read_text(), name


def test_cgroups_are_laid_out_as_here() -> None:
    """v1's hierarchies by their controllers or name, v2's without options."""
    lines = [
        "30 25 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755",
        "31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
        "32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/x,name=systemd",
        "33 30 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
        "34 25 0:30 / /elsewhere rw - cgroup cgroup rw,pids",
    ]

    assert list(cgroup_mounts("\n".join(lines))) == [
        ("/sys/fs/cgroup/unified", "cgroup2", ""),
        ("/sys/fs/cgroup/systemd", "cgroup", "none,name=systemd"),
        ("/sys/fs/cgroup/cpu,cpuacct", "cgroup", "cpu,cpuacct"),
    ]


def test_it_refuses_to_touch_this_machines_mounts() -> None:
    """Outside of a pid namespace of its own nothing is mounted."""
    before = os.stat("/").st_dev
    done = subprocess.run(
        [sys.executable, "-m", "scripts.host_root", "/nonexistent", "true"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, os.stat("/").st_dev) == (2, before)
    assert "pid namespace of its own" in done.stderr


def test_a_machine_ignores_no_signal() -> None:
    """A shell's background job does, and its children's children too: ^C would end no demo there."""
    script = "import os, signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    code = f"from scripts.host_root import run; run([{sys.executable!r}, '-c', {script!r}])"
    done = subprocess.run(
        ["sh", "-c", f"trap '' INT; exec {sys.executable} -c \"$1\"", "sh", code],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout == "True\n"
