"""The agent takes its parameters from the kernel command line and nothing malformed stops it."""

from __future__ import annotations

import pytest

from agent.cmdline import parse


def test_reads_its_own_words() -> None:
    params = parse("console=ttyS0 quiet agent.home_vport=1028 agent.stream_port=1029 agent.log=debug ro\n")

    assert (params.home_port, params.stream_port, params.debug) == (1028, 1029, True)


def test_absent_words_mean_not_wanted() -> None:
    params = parse("console=ttyS0 agent.log=info")

    assert (params.home_port, params.stream_port, params.debug) == (0, 0, False)


def test_the_last_one_wins() -> None:
    assert parse("agent.home_vport=1 agent.home_vport=2").home_port == 2


@pytest.mark.parametrize("value", ["", "x", "-5", "0", "4294967295", "99999999999", "1 028"])
def test_a_malformed_port_counts_as_absent(value: str) -> None:
    assert parse(f"agent.home_vport={value}").home_port in (0, 1)


def test_foreign_words_are_ignored() -> None:
    assert parse("agent.debug_console agent.trace=1 xagent.home_vport=3").home_port == 0


@pytest.mark.parametrize(
    ("value", "seconds"), [("3", 3), ("0.5", 0.5), ("0", 10), ("-1", 10), ("nan", 10), ("1e9", 10), ("x", 10)]
)
def test_the_host_says_how_long_to_wait_for_what_it_plugs(value: str, seconds: float) -> None:
    assert parse(f"agent.hotplug_timeout={value}").hotplug_timeout == seconds
