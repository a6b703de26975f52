"""What an agent answers is walked through only if that is soon done, and is what it should be."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor

from devices.errors import GuestError
from proto import agent_pb2, csi_pb2
from shim.protocols import GuestProcess
from shim.sandbox.answers import ENTRIES, PROCESSES, check_stats, check_volume, processes
from shim.tasks.stats import to_any
from tests.unit.turns import LIMIT, turns

MOST = (1 << 64) - 1
Stats = agent_pb2.StatsContainerResponse


def fill(message: Any, count: int) -> None:
    """Every number the largest, every list and map with `count` of them."""
    for field in message.DESCRIPTOR.fields:
        kind, many = field.cpp_type, field.is_repeated
        if kind == FieldDescriptor.CPPTYPE_MESSAGE and field.message_type.GetOptions().map_entry:
            target = getattr(message, field.name)
            for number in range(count):
                if field.message_type.fields_by_name["value"].message_type is None:
                    target[f"k{number}"] = MOST
                else:
                    fill(target[f"k{number}"], count)
        elif kind == FieldDescriptor.CPPTYPE_MESSAGE:
            for child in (
                [getattr(message, field.name).add() for _ in range(count)]
                if many
                else [getattr(message, field.name)]
            ):
                fill(child, count)
        elif many:
            getattr(message, field.name).extend([MOST] * count)
        elif kind == FieldDescriptor.CPPTYPE_STRING:
            setattr(message, field.name, "read")
        else:
            largest = MOST if kind == FieldDescriptor.CPPTYPE_UINT64 else (1 << 32) - 1
            setattr(message, field.name, largest)


@pytest.mark.parametrize("unified", [True, False])
def test_the_largest_numbers_pass(unified: bool) -> None:
    stats = Stats()
    fill(stats, 3)
    stats.cgroup_stats.memory_stats.stats.update(dict.fromkeys(("anon", "file", "pgfault", "oom_kill"), MOST))
    assert to_any(check_stats(stats), unified=unified).value


LISTS = [
    lambda s, n: s.cgroup_stats.cpu_stats.cpu_usage.percpu_usage.extend([1] * n),
    lambda s, n: [s.network_stats.add() for _ in range(n)],
    lambda s, n: [s.cgroup_stats.blkio_stats.io_wait_time_recursive.add() for _ in range(n)],
    lambda s, n: [s.cgroup_stats.hugetlb_stats[str(number)] for number in range(n)],
    lambda s, n: s.cgroup_stats.memory_stats.stats.update({str(number): 1 for number in range(n)}),
]


@pytest.mark.parametrize("add", LISTS)
def test_too_many_of_them_are_the_agents_fault(add: Any) -> None:
    stats = Stats()
    add(stats, ENTRIES)
    assert check_stats(stats) is stats
    add(stats, ENTRIES + 1)
    with pytest.raises(GuestError, match="figures of one container"):
        check_stats(stats)


@pytest.mark.parametrize("add", LISTS)
@pytest.mark.parametrize("unified", [True, False])
async def test_as_many_as_pass_are_soon_walked_through(add: Any, unified: bool) -> None:
    stats = Stats()
    add(stats, ENTRIES)
    async with turns() as longest:
        to_any(check_stats(stats), unified=unified)
    assert longest.seconds < LIMIT


def test_a_volumes_figures_are_few() -> None:
    answer = csi_pb2.VolumeStatsResponse()
    answer.usage.add(total=MOST)
    assert check_volume(answer) is answer
    for _ in range(16):
        answer.usage.add()
    with pytest.raises(GuestError, match="17 figures"):
        check_volume(answer)


def test_processes_are_read_and_cut() -> None:
    listed = [{"pid": 1, "exec": ""}, {"pid": 7, "exec": "e"}, {"pid": 8}] + [{"pid": 9}] * 2000
    found = processes(json.dumps(listed))
    assert found[:3] == [GuestProcess(1, ""), GuestProcess(7, "e"), GuestProcess(8, None)]
    assert len(found) == PROCESSES


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "{}",
        "[1]",
        "[[]]",
        "[{}]",
        '[{"pid": Infinity}]',
        '[{"pid": NaN}]',
        '[{"pid": 1e999}]',
        '[{"pid": 1.5}]',
        '[{"pid": "7"}]',
        '[{"pid": true}]',
        '[{"pid": 0}]',
        '[{"pid": -1}]',
        '[{"pid": 18446744073709551616}]',
        '[{"pid": 4194305}]',
        '[{"pid": 1, "exec": 5}]',
        '[{"pid": 1, "exec": []}]',
        "[" * 100_000,
        "[" * 500 + "]" * 500,
        '[{"pid": 1' + "0" * 5000 + "}]",
    ],
)
def test_what_is_no_list_of_processes(text: str) -> None:
    with pytest.raises(GuestError, match="list of processes is none"):
        processes(text)
