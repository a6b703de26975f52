"""An update's limits become cgroup v2 files, all of them or none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from agent import fit
from agent.fit import cpu_weight
from agent.limits import apply, plan
from ttrpc import Code, RpcError


@pytest.mark.parametrize(("shares", "weight"), [(0, 1), (2, 1), (512, 20), (1024, 39), (262144, 10000)])
def test_shares_become_a_weight(shares: int, weight: int) -> None:
    assert cpu_weight(shares) == weight


@pytest.mark.parametrize(
    ("resources", "writes"),
    [
        ({}, []),
        ({"cpu": {"shares": 1024}}, [("cpu.weight", "39")]),
        ({"cpu": {"quota": 50, "period": 200}}, [("cpu.max", "50 200")]),
        ({"cpu": {"quota": 50}}, [("cpu.max", "50 100000")]),
        ({"cpu": {"quota": -1}}, [("cpu.max", "max 100000")]),
        ({"cpu": {"period": 200}}, [("cpu.max", "70 200")]),
        ({"cpu": {"idle": 1}}, [("cpu.idle", "1")]),
        ({"cpu": {"cpus": "0-1", "mems": "0"}}, [("cpuset.cpus", "0-1"), ("cpuset.mems", "0")]),
        ({"memory": {"limit": 100}}, [("memory.max", "100")]),
        ({"memory": {"limit": -1}}, [("memory.swap.max", "max"), ("memory.max", "max")]),
        ({"memory": {"limit": 100, "swap": 150}}, [("memory.swap.max", "50"), ("memory.max", "100")]),
        ({"memory": {"swap": 90}}, [("memory.swap.max", "10")]),
        ({"memory": {"swap": -1}}, [("memory.swap.max", "max")]),
        ({"memory": {"reservation": 9}}, [("memory.low", "9")]),
        ({"pids": {"limit": -1}}, [("pids.max", "max")]),
        ({"hugepageLimits": [{"pageSize": "2MB", "limit": 0}]}, [("hugetlb.2MB.max", "0")]),
        ({"unified": {"memory.high": "7"}}, [("memory.high", "7")]),
        ({"pids": {"limit": 3}, "unified": {"pids.max": "4"}}, [("pids.max", "3"), ("pids.max", "4")]),
    ],
)
def test_what_is_written(resources: dict[str, Any], writes: list[tuple[str, str]]) -> None:
    now = {"cpu.max": "70 100000", "memory.max": "80", "memory.current": "60"}
    assert plan(resources, now) == writes


@pytest.mark.parametrize(
    ("resources", "code"),
    [
        ({"memory": {"limit": 100, "swap": 99}}, Code.INVALID_ARGUMENT),
        ({"memory": {"limit": -1, "swap": 99}}, Code.INVALID_ARGUMENT),
        ({"memory": {"limit": 50, "checkBeforeUpdate": True}}, Code.FAILED_PRECONDITION),
        ({"unified": {"../memory.max": "1"}}, Code.INVALID_ARGUMENT),
        ({"unified": {"cgroup.kill": "1"}}, Code.INVALID_ARGUMENT),
        ({"unified": {"": "1"}}, Code.INVALID_ARGUMENT),
    ],
)
def test_what_contradicts_itself(resources: dict[str, Any], code: Code) -> None:
    with pytest.raises(RpcError) as caught:
        plan(resources, {"memory.current": "60"})
    assert caught.value.code == code


def test_all_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "pids.max").write_text("99")
    (tmp_path / "memory.max").write_text("max")
    with pytest.raises(RpcError, match=r"memory\.nonsense cannot be '1'") as caught:
        apply(str(tmp_path), {"pids": {"limit": 30}, "unified": {"memory.nonsense": "1"}})
    assert caught.value.code == Code.INVALID_ARGUMENT
    assert (tmp_path / "pids.max").read_text() == "99"

    apply(str(tmp_path), {"pids": {"limit": 30}, "memory": {"limit": 777}})
    assert (tmp_path / "pids.max").read_text() == "30"
    assert (tmp_path / "memory.max").read_text() == "777"
    assert sorted(os.listdir(tmp_path)) == ["memory.max", "pids.max"]


@pytest.mark.parametrize(
    ("wanted", "stays"), [("0", True), ("0-3", True), ("0,2-3", True), ("4", False), ("0-4", False)]
)
def test_a_set_of_cpus_of_the_host_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, stays: bool
) -> None:
    (tmp_path / "online").write_text("0-3\n")
    monkeypatch.setattr(fit, "_ONLINE_CPUS", str(tmp_path / "online"))
    resources = {"cpu": {"cpus": wanted}}
    fit.fit_resources(resources)
    assert resources == {"cpu": {"cpus": wanted} if stays else {}}


@pytest.mark.parametrize("text", ["x", "0-", "-1", "0;1", "0-99999999"])
def test_a_set_of_cpus_that_is_none(text: str) -> None:
    with pytest.raises(RpcError) as caught:
        fit.fit_resources({"cpu": {"cpus": text}})
    assert caught.value.code == Code.INVALID_ARGUMENT
