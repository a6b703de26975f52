"""A device node of the spec is the same device in the guest, or it is refused by its path."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from devices.config import IoLimits
from devices.errors import CallerError
from shim.spec import guest_devices
from shim.spec.documents import checked
from shim.spec.guest_devices import check_devices, guest_nodes, guest_rules, host_devices, take_limits
from shim.spec.oci_types import MOST


def spec(*devices: Any) -> dict[str, Any]:
    return {"linux": {"devices": list(devices)}}


@pytest.mark.parametrize("number", [(1, 3), (5, 0), (10, 200), (10, 229), (10, 1), (4, 64), (136, 0)])
def test_registered_numbers_pass(number: tuple[int, int]) -> None:
    major, minor = number
    check_devices(spec({"path": "/dev/x", "type": "c", "major": major, "minor": minor}))


def test_a_fifo_needs_no_number() -> None:
    check_devices(spec({"path": "/dev/pipe", "type": "p"}))


@pytest.mark.parametrize(
    ("kind", "major", "minor"), [("c", 241, 0), ("u", 511, 3), ("c", 10, 60), ("c", 0, 0)]
)
def test_numbers_of_the_hosts_kernel_are_refused(kind: str, major: int, minor: int) -> None:
    good = {"path": "/dev/null", "type": "c", "major": 1, "minor": 3}
    with pytest.raises(CallerError) as caught:
        check_devices(spec(good, {"path": "/dev/mine", "type": kind, "major": major, "minor": minor}))

    assert "linux.devices[1]: /dev/mine" in str(caught.value)
    assert f"{major}:{minor}" in str(caught.value)
    assert caught.value.code == "UNIMPLEMENTED"


@pytest.mark.parametrize(
    "device",
    [{}, {"path": "/dev/x"}, {"path": "dev/x", "type": "c"}, {"path": "/dev/x", "type": "q"}],
)
def test_malformed_devices_are_invalid(device: Any) -> None:
    with pytest.raises(CallerError) as caught:
        check_devices(spec(device))

    assert caught.value.code == "INVALID_ARGUMENT"


def test_of_a_privileged_container_they_are_left_out_and_listed() -> None:
    document = spec({"path": "/dev/sda", "type": "b", "major": 8, "minor": 0})
    document["linux"]["devices"].append({"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229})
    document["linux"]["resources"] = {"devices": [{"allow": True, "access": "rwm"}]}
    check_devices(document)
    left_out: list[str] = []

    assert [node["path"] for node in guest_nodes(document["linux"]["devices"], left_out)] == ["/dev/fuse"]
    assert left_out == ["linux.devices /dev/sda"]


DISK = {"path": "/dev/data", "type": "b", "major": 7, "minor": 3, "fileMode": 0o660}


def rules(*rules: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"allow": False, "access": "rwm"}, *rules]


def allow(access: str, **fields: Any) -> dict[str, Any]:
    return {"allow": True, "access": access, **fields}


@pytest.mark.parametrize(
    ("given", "access"),
    [
        ([allow("rwm", type="b", major=7, minor=3)], "rwm"),
        ([allow("rm", type="b", major=7, minor=3)], "rm"),
        ([allow("rwm", type="b", major=7)], "rwm"),
        ([allow("r", type="b"), allow("w", type="c", major=7, minor=3)], "r"),
        ([allow("rwm", type="b", major=7, minor=4)], ""),
        ([allow("rwm", type="b", major=7, minor=3), {"allow": False, "access": "w", "type": "b"}], "rm"),
    ],
)
def test_a_disk_is_had_as_its_rules_say(given: list[dict[str, Any]], access: str) -> None:
    document = spec(DISK, {"path": "/dev/null", "type": "c", "major": 1, "minor": 3})
    document["linux"]["resources"] = {"devices": rules(*given)}
    check_devices(document)
    (device,) = host_devices(document)

    assert (device.path, device.number) == ("/dev/data", ("b", 7, 3))
    assert device.access == set(access)


def test_a_disk_that_is_plugged_keeps_its_node_and_gets_a_rule_of_its_own() -> None:
    document = spec(DISK, {"path": "/dev/null", "type": "c", "major": 1, "minor": 3})
    document["linux"]["resources"] = {"devices": rules(allow("rw", type="b", major=7))}
    plugged, left_out = host_devices(document), list[str]()
    nodes = guest_nodes(document["linux"]["devices"], left_out, plugged)
    kept = guest_rules(document["linux"]["resources"]["devices"], left_out, plugged)

    assert [node["path"] for node in nodes] == ["/dev/data", "/dev/null"]
    assert kept[-1] == {"allow": True, "type": "b", "major": 7, "minor": 3, "access": "rw"}
    assert left_out == ["linux.resources.devices[1] (the host's b 7:-1)"]


def test_of_a_privileged_container_the_disks_that_somebody_asked_for_are_plugged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a rule of its own, or at a path that is not the host's."""
    listed = {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}
    ruled = {"path": "/dev/sdb", "type": "b", "major": 8, "minor": 16}
    moved = {"path": "/dev/xvda", "type": "b", "major": 8, "minor": 32}
    document = spec(listed, ruled, moved)
    everything = {"allow": True, "access": "rwm"}
    document["linux"]["resources"] = {"devices": [everything, allow("rwm", type="b", major=8, minor=16)]}
    monkeypatch.setattr(guest_devices, "_is_elsewhere", lambda device: device.path == "/dev/xvda")
    check_devices(document)

    assert [device.path for device in host_devices(document)] == ["/dev/sdb", "/dev/xvda"]
    assert all(device.access == set("rwm") for device in host_devices(document))


def test_limits_of_its_own_are_the_disks_and_leave_the_spec() -> None:
    document = spec(DISK)
    mine, other = {"major": 7, "minor": 3}, {"major": 8, "minor": 0, "rate": 5}
    block_io = {
        "weight": 10,
        "throttleReadBpsDevice": [{**mine, "rate": 1 << 62}, other],
        "throttleWriteIOPSDevice": [{**mine, "rate": 7}],
    }
    document["linux"]["resources"] = {"devices": rules(allow("rwm", type="b")), "blockIO": block_io}
    (device,) = host_devices(document)
    take_limits(document["linux"]["resources"], [device])

    assert device.limits == IoLimits(read_bytes=guest_devices.MAX_RATE, write_ops=7)
    assert block_io == {"weight": 10, "throttleReadBpsDevice": [other]}


def test_of_a_privileged_container_a_disk_that_is_not_there_any_more_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """containerd made its list a moment ago; nobody asked for what the host does not have."""
    monkeypatch.setattr(guest_devices, "SYSFS", str(tmp_path))
    document = spec({"path": "/dev/gone", "type": "b", "major": 8, "minor": 0})
    document["linux"]["resources"] = {"devices": [{"allow": True, "access": "rwm"}]}
    assert host_devices(document) == []

    (tmp_path / "dev/block/8:0").mkdir(parents=True)
    assert [device.path for device in host_devices(document)] == ["/dev/gone"]


@pytest.mark.parametrize("privileged", [False, True])
def test_as_many_devices_and_rules_as_a_spec_may_have_take_no_time(privileged: bool) -> None:
    """400 devices with 20,000 rules took 45 seconds: each device went through all rules. Here are 8,192."""
    most, many = MOST["linux.devices"][0], MOST["linux.resources.devices"][0]
    disks = [
        {"path": f"/dev/d{number}", "type": "b", "major": 259, "minor": number} for number in range(most)
    ]
    rules = [allow("rwm", type="b", major=259, minor=number % most) for number in range(many - 1)]
    document = spec(*disks)
    limits = [{"major": 259, "minor": number, "rate": 1} for number in range(most)]
    document["linux"]["resources"] = {
        "devices": [{"allow": privileged, "access": "rwm"}, *rules],
        "blockIO": {"throttleReadBpsDevice": limits},
    }
    began = time.process_time()
    document = checked(document, "config.json")
    check_devices(document)
    wanted = host_devices(document)
    left_out = list[str]()
    nodes = guest_nodes(document["linux"]["devices"], left_out, wanted)
    kept = guest_rules(document["linux"]["resources"]["devices"], left_out, wanted)
    take_limits(document["linux"]["resources"], wanted)
    took = time.process_time() - began

    assert len(wanted) == len(nodes) == most
    assert (len(kept), left_out) == (many, [])
    assert document["linux"]["resources"]["blockIO"] == {}
    assert took < 20, "half a second here; hours, if it grew with devices times rules"
