"""Fixtures and settings that all tests share."""

from __future__ import annotations

import os
import signal

import pytest

pytest_plugins = ["tests.benchhost.plugin", "conformance.plugin"]

if not os.environ.get("KATA_BENCH_HOST"):  # where importing it takes seconds, and nothing uses it
    from hypothesis import settings

    # Deterministic in CI: the same examples each run, and no deadline that a busy machine could miss.
    settings.register_profile("ci", derandomize=True, deadline=None)
    settings.register_profile("dev", deadline=None)
    settings.load_profile("ci" if os.environ.get("CI") else "dev")


_session = os.getpid()


def pytest_configure() -> None:
    """A run that is ended by SIGTERM takes down what it has made, daemons and all, as one that ^C ends."""
    signal.signal(signal.SIGTERM, _asked_to_end)


def _asked_to_end(*_: object) -> None:
    if os.getpid() != _session:  # a test's forked child
        os._exit(128 + signal.SIGTERM)
    raise KeyboardInterrupt


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End-to-end tests run last: what is broken below shows first, and quickly."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is not None)
