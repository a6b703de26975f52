"""A device node of the spec is the same device in the guest, or it is refused by its path."""

from __future__ import annotations

from typing import Any

import pytest

from devices.errors import CallerError
from shim.guest_devices import check_devices, guest_nodes


def spec(*devices: Any) -> dict[str, Any]:
    return {"linux": {"devices": list(devices)}}


@pytest.mark.parametrize("number", [(1, 3), (5, 0), (10, 200), (10, 229), (10, 1), (4, 64), (136, 0)])
def test_registered_numbers_pass(number: tuple[int, int]) -> None:
    major, minor = number
    check_devices(spec({"path": "/dev/x", "type": "c", "major": major, "minor": minor}))


def test_a_fifo_needs_no_number() -> None:
    check_devices(spec({"path": "/dev/pipe", "type": "p"}))


@pytest.mark.parametrize(
    ("kind", "major", "minor"), [("b", 8, 0), ("c", 241, 0), ("u", 511, 3), ("c", 10, 60), ("c", 0, 0)]
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
    [7, {}, {"path": "dev/x", "type": "c"}, {"path": "/dev/x", "type": "q"},
     {"path": "/dev/x", "type": "c", "major": "1"}],
)  # fmt: skip
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


def test_too_many_are_invalid() -> None:
    with pytest.raises(CallerError):
        check_devices(spec(*[{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}] * 2000))
