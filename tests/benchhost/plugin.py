"""pytest's side of the bench host: tests marked `benchhost` run inside, and report out here as their own.

What: out here the marked tests come last and are not run: one machine is booted for all of them, pytest runs
them in there, and each of their reports (setup, call, teardown, with output and traceback) is handed on as
if the test had run here. In there (`KATA_BENCH_HOST` is set) the plugin only sends the reports out.
Why like this: -x, --junitxml, --durations, node ids on the command line, all work; a test needs nothing but
the marker.
Invariants: a marked test that the machine did not report on fails, with the machine's last words; after a
soft lockup only the tests without a report are run again, once.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator

import pytest

from . import machine
from .machine import Event, Result, Settings

__all__ = ["BenchHostPlugin", "Inside"]

_INSIDE = "KATA_BENCH_HOST"
_TOLD = ("KATA_CLH", "KATA_DRAGONBALL")  # environment that tests in there need: paths of what no registry has
_LIMIT = float(os.environ.get("KATA_BENCH_HOST_LIMIT", "3000"))  # seconds for all tests of one machine
_QUIET = ("-q", "--no-header", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-o", "timeout=900")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--bench-host`: which of the marked tests run."""
    parser.addoption(
        "--bench-host",
        choices=("part", "all", "none"),
        help="which tests marked benchhost run: part = those with ci=True (default; all, if tests are named"
        " on the command line or chosen by -m benchhost)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker; choose the side."""
    config.addinivalue_line(
        "markers",
        "benchhost(ci=False): runs inside the bench host, a nested machine with KVM (docs/bench-host.md);"
        " ci=True: by `make test` too, not only by `make test-kvm`",
    )
    config.pluginmanager.register(Inside(config) if os.environ.get(_INSIDE) else BenchHostPlugin(config))


def pytest_itemcollected(item: pytest.Item) -> None:
    """They are end-to-end tests, wherever they lie."""
    if item.get_closest_marker("benchhost"):
        item.add_marker(pytest.mark.e2e)


class Inside:
    """In the bench host: each report goes out as a line."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._fd = int(os.environ.get("BENCH_CONTROL_FD", "-1"))

    def _send(self, kind: str, data: object) -> None:
        if self._fd >= 0:
            line = f"{kind} {json.dumps(data)}\n".encode()
            while line:
                line = line[os.write(self._fd, line) :]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Tell which test will have been at fault."""
        self._send("start", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test."""
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._send("report", data)


class BenchHostPlugin:
    """On this side: order, boot, hand on."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._waiting: dict[str, pytest.Item] = {}  # marked tests without their last report
        self._reports: dict[str, list[pytest.TestReport]] = {}
        self._events: Iterator[Event] | None = None
        self._result: Result | None = None
        self._started = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Marked tests last, so that one machine does for all; those not chosen go."""
        marked = [item for item in items if item.get_closest_marker("benchhost")]
        if not marked:
            return
        chosen = [item for item in marked if self._chosen(item)]
        dropped = [item for item in marked if item not in chosen]
        if dropped:
            self._config.hook.pytest_deselected(items=dropped)
        for item in chosen:
            # Its time runs in there; out here it may wait for a boot, or for a machine of somebody else.
            item.add_marker(pytest.mark.timeout(0), append=False)
        items[:] = [item for item in items if not item.get_closest_marker("benchhost")] + chosen

    def _chosen(self, item: pytest.Item) -> bool:
        mode = self._config.getoption("--bench-host")
        if mode is None:
            named = self._config.args_source is pytest.Config.ArgsSource.ARGS
            mode = "all" if named or "benchhost" in self._config.option.markexpr else "part"
        if mode == "part":
            return any(mark.kwargs.get("ci") for mark in item.iter_markers("benchhost"))
        return bool(mode == "all")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Wait for the test's reports, and hand them on."""
        if not item.get_closest_marker("benchhost"):
            return None
        if self._events is None:
            self._begin(item)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports_of(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if nextitem is None:
            self._drain()
        return True

    def pytest_sessionfinish(self) -> None:
        """End the machine if the session ends before its tests (-x, Ctrl-C)."""
        if self._events is not None:
            self._events.close()  # type: ignore[attr-defined]  # a generator

    def _begin(self, first: pytest.Item) -> None:
        """All marked tests from this one on, in one machine."""
        items = first.session.items
        self._waiting = {item.nodeid: item for item in items[items.index(first) :]}
        self._events = machine.events(self._job, Settings(limit=_LIMIT), self._ended)

    def _job(self) -> str:
        """pytest for all that have no complete reports yet."""
        words = [sys.executable, "-m", "pytest", *_QUIET, *self._waiting]
        told = [f"{name}={os.environ[name]}" for name in _TOLD if name in os.environ]
        return f"exec {shlex.join(['env', 'CI=true', *told, *words])}"

    def _ended(self, result: Result) -> None:
        self._result = result

    def _reports_of(self, item: pytest.Item) -> list[pytest.TestReport]:
        assert self._events is not None
        while item.nodeid in self._waiting:
            event = next(self._events, None)
            if event is None:
                self._waiting.pop(item.nodeid)
                return [self._lost(item)]
            self._take(event)
        return self._reports.pop(item.nodeid)

    def _take(self, event: Event) -> None:
        if event.kind == "retry":
            self._started = ""
            self._reports = {k: v for k, v in self._reports.items() if k not in self._waiting}
            sys.stderr.write("\nbench host: soft lockup, trying again once\n")
        elif event.kind == "control":
            kind, _, data = event.data.partition(b" ")
            if kind == b"start":
                self._started = json.loads(data)
            elif kind == b"report":
                hook = self._config.hook.pytest_report_from_serializable
                report = hook(config=self._config, data=json.loads(data))
                if isinstance(report.longrepr, list):  # of a skip: JSON has no tuples
                    report.longrepr = tuple(report.longrepr)
                self._reports.setdefault(report.nodeid, []).append(report)
                if report.when == "teardown":
                    self._waiting.pop(report.nodeid, None)

    def _drain(self) -> None:
        """Let the machine end in order after its last test."""
        for event in self._events or ():
            self._take(event)

    def _lost(self, item: pytest.Item) -> pytest.TestReport:
        """A failure for a test that the machine never finished."""
        assert self._result is not None
        if self._started in ("", item.nodeid):
            text = self._result.explain()
        else:
            text = f"not run: the bench host ended in {self._started}"
        self._started = self._started or item.nodeid
        return pytest.TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords=dict.fromkeys(item.keywords, 1),
            outcome="failed",
            longrepr=text,
            when="call",
        )
