"""A volume of huge pages becomes one of the guest's, as large as the container's limit."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devices.errors import CallerError
from shim.resources.huge_pages import find, storages
from shim.spec.guest_spec import plan_volumes

MIB = 1 << 20


@pytest.fixture
def pages(tmp_path: Path) -> Iterator[Path]:
    """A hugetlbfs of the host; a mount costs no page."""
    made = tmp_path / "pages"
    made.mkdir()
    command = ["mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", str(made)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this machine cannot mount a hugetlbfs")
    yield made
    subprocess.run(["umount", str(made)], check=True)


def spec(*sources: Path, **limits: int) -> dict[str, Any]:
    return {
        "mounts": [
            {"destination": f"/v{number}", "type": "bind", "source": str(source), "options": ["rbind", "rw"]}
            for number, source in enumerate(sources)
        ],
        "linux": {"resources": {"hugepageLimits": [{"pageSize": k, "limit": v} for k, v in limits.items()]}},
    }


def test_the_guest_has_its_own(pages: Path, tmp_path: Path) -> None:
    (pages / "below").mkdir()
    document = spec(tmp_path, pages, pages / "below", **{"1GB": 0, "2MB": 8 * MIB})
    found = find(plan_volumes(document, "c1"), document)
    assert {index: (one.page, one.size) for index, one in found.items()} == {
        1: (2 * MIB, 8 * MIB),
        2: (2 * MIB, 8 * MIB),
    }

    (ours, _), (stock, _) = storages(found, stock=False), storages(found, stock=True)
    assert (ours.driver, ours.fstype, ours.mount_point) == ("ephemeral", "hugetlbfs", found[1].mount_point)
    assert list(ours.options) == [f"pagesize={2 * MIB}"]
    assert list(stock.options) == [f"pagesize={2 * MIB}", f"size={8 * MIB}"]


@pytest.mark.parametrize("limits", [{}, {"1GB": 1 << 30}, {"2MB": 0}])
def test_without_a_limit_it_is_refused(pages: Path, limits: dict[str, int]) -> None:
    document = spec(pages, **limits)
    with pytest.raises(CallerError, match="huge pages of 2 MiB, of which the container has no") as caught:
        find(plan_volumes(document, "c1"), document)

    assert caught.value.code == "INVALID_ARGUMENT"
    assert "hugepageLimits" in caught.value.hint


def test_others_are_left_alone(tmp_path: Path) -> None:
    document = spec(tmp_path, tmp_path / "missing")

    assert find(plan_volumes(document, "c1"), document) == {}
