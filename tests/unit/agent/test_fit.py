"""A config fits this guest before crun sees it: extra fields are in, impossible limits out, devices here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from agent import fit
from agent.reaper import Reaper
from ttrpc import Code, RpcError


def test_fields_beside_the_message_are_merged_object_by_object() -> None:
    config: dict[str, Any] = {"process": {"user": {"uid": 1}}, "linux": {"resources": {}}}
    fit.merge(config, fit.beyond({fit.METADATA: ['{"process": {"user": {"umask": 0}}, "domainname": "d"}']}))

    assert config == {
        "process": {"user": {"uid": 1, "umask": 0}},
        "linux": {"resources": {}},
        "domainname": "d",
    }


def test_a_call_without_metadata_has_nothing_beside() -> None:
    assert fit.beyond({}) == {}


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 100000])
def test_metadata_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(RpcError) as caught:
        fit.beyond({fit.METADATA: [text]})

    assert caught.value.code == Code.INVALID_ARGUMENT


def test_limits_of_page_sizes_that_are_not_here_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "hugepages-2048kB").mkdir()
    resources = {"hugepageLimits": [{"pageSize": "2MB", "limit": 1}, {"pageSize": "1GB", "limit": 0}]}
    fit.fit_resources(resources, str(tmp_path))

    assert resources["hugepageLimits"] == [{"pageSize": "2MB", "limit": 1}]


@pytest.mark.parametrize("size", ["", "MB", "../MB", "2XB", "-2MB"])
def test_a_page_size_that_is_none_is_refused(size: str) -> None:
    with pytest.raises(RpcError) as caught:
        fit.fit_resources({"hugepageLimits": [{"pageSize": size, "limit": 1}]})

    assert "hugepageLimits" in caught.value.message


def test_shares_have_one_weight_whatever_crun_makes_of_them() -> None:
    resources: dict[str, Any] = {"cpu": {"shares": 512}}
    fit.fit_resources(resources)
    assert resources == {"cpu": {}, "unified": {"cpu.weight": "20"}}
    for kept in ({"cpu": {"shares": 512, "idle": 1}}, {"cpu": {}, "unified": {"cpu.weight": "7"}}):
        resources = copy.deepcopy(kept)
        fit.fit_resources(resources)
        assert resources == kept


def test_a_cpu_burst_is_written_as_cgroup_v2_has_it() -> None:
    resources: dict[str, Any] = {"cpu": {"quota": 5, "burst": 3}}
    fit.fit_resources(resources)

    assert resources == {"cpu": {"quota": 5}, "unified": {"cpu.max.burst": "3"}}


async def test_a_device_without_a_driver_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orphans: Reaper
) -> None:
    (tmp_path / "1:3").mkdir()
    monkeypatch.setattr(fit, "_CHAR_DEVICES", str(tmp_path))
    here = {"path": "/dev/null", "type": "c", "major": 1, "minor": 3}
    await fit.fit({"linux": {"devices": [here, {"path": "/dev/p", "type": "p"}]}}, orphans)

    privileged = {"devices": [{"allow": True, "access": "rwm"}]}
    linux: dict[str, Any] = {"devices": [here, {**here, "minor": 999}], "resources": privileged}
    await fit.fit({"linux": linux}, orphans)
    assert linux["devices"] == [here], "of a privileged container it is left out"

    with pytest.raises(RpcError) as caught:
        await fit.fit({"linux": {"devices": [{**here, "path": "/dev/kvm", "minor": 999}]}}, orphans)

    assert caught.value.code == Code.INVALID_ARGUMENT
    assert "1:999" in caught.value.message
    assert "/dev/kvm" in caught.value.message
