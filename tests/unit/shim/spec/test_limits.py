"""Limits ask for room in the VM; what it does not have is refused before the guest hears of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import any_pb2

from devices.errors import CallerError, KataError
from shim.spec.limits import Size, fold_unified, wanted
from shim.spec.oci import resources_from_json
from tests.unit.shim.fakes import TaskClient

MIB = 1 << 20


@pytest.mark.parametrize(
    ("document", "size"),
    [
        ({}, Size()),
        ({"cpu": {"quota": 150_000, "period": 100_000}}, Size(vcpus=1.5)),
        ({"cpu": {"quota": 50_000}}, Size(vcpus=0.5)),
        ({"cpu": {"quota": -1, "period": 100_000}}, Size()),
        ({"cpu": {"shares": 4096}}, Size()),
        ({"cpu": {"cpus": "0-2,7"}}, Size(vcpus=4)),
        ({"cpu": {"cpus": "0-2,7", "quota": 50_000}}, Size(vcpus=0.5)),
        ({"cpu": {"cpus": "0-99999999"}}, Size(vcpus=1024)),
        ({"cpu": {"cpus": "3-0"}}, Size()),
        ({"cpu": {"cpus": "a-b"}}, Size()),
        ({"memory": {"limit": 64 * MIB}}, Size(memory=64 * MIB)),
        ({"memory": {"limit": -1}}, Size()),
        ({"memory": {"limit": (1 << 63) - 4096}}, Size()),
    ],
)
def test_what_limits_ask_for(document: dict[str, Any], size: Size) -> None:
    resources, _ = resources_from_json(document)
    assert wanted(resources) == size


@pytest.mark.parametrize(
    ("unified", "size"),
    [
        ({"memory.max": "4096", "cpu.max": "30 20"}, Size(1.5, 4096)),
        ({"memory.max": "max", "cpu.max": "max"}, Size()),
        ({"cpu.max": "200000"}, Size(2.0, 1024)),
        ({"cpu.max": "200000 max"}, Size(1.0, 1024)),
        ({"cpu.max": "\u0663 \u0661"}, Size(1.0, 1024)),
        ({"memory.high": "1", "memory.max": "lots", "cpu.max": "1 2 3"}, Size(1.0, 1024)),
    ],
)
def test_unified_sizes_the_vm_too(unified: dict[str, str], size: Size) -> None:
    """It wins over the fields that say the same, as in the guest."""
    document = {"cpu": {"quota": 100_000}, "memory": {"limit": 1024}, "unified": unified}
    resources, rest = resources_from_json(fold_unified(document))
    assert wanted(resources) == size
    assert rest.beyond["linux"]["resources"]["unified"] == unified
    assert fold_unified({"pids": {"limit": 1}}) == {"pids": {"limit": 1}}


async def update(shim: TaskClient, document: dict[str, Any]) -> None:
    await shim.call("Update", id="c", resources=any_pb2.Any(value=json.dumps(document).encode()))


async def test_the_vm_is_asked_before_the_guest(tmp_path: Path) -> None:
    shim = TaskClient(tmp_path)
    await shim.create()
    await update(shim, {"memory": {"limit": 64 * MIB}, "pids": {"limit": 9}})
    assert shim.sandbox.sizes == [("c", Size(memory=64 * MIB))]
    assert [(sent.Memory.Limit, sent.Pids.Limit) for sent in shim.agent.resources] == [(64 * MIB, 9)]
    await shim.close()


async def test_a_vm_that_cannot_grow_refuses_and_the_guest_hears_nothing(tmp_path: Path) -> None:
    shim = TaskClient(tmp_path)
    await shim.create()
    shim.sandbox.fail["resize"] = CallerError("the VM has 1 CPU: failed precondition")
    with pytest.raises(KataError) as caught:
        await update(shim, {"cpu": {"quota": 400_000, "period": 100_000}})
    assert caught.value.code == "FAILED_PRECONDITION"
    assert shim.agent.resources == []
    await shim.close()
