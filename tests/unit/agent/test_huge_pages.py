"""Huge pages are set aside for a container's limit, all or none, and given back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent import huge_pages
from ttrpc import Code, RpcError

MIB = 1 << 20


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """Has pages of 2 MiB and 1 GiB, and room for `room` of them."""
    room = {"hugepages-2048kB": 100, "hugepages-1048576kB": 1}
    for name in room:
        (tmp_path / name).mkdir()
        (tmp_path / name / "nr_hugepages").write_text("3" if "2048" in name else "0")
    monkeypatch.setattr(huge_pages, "_COMPACT", str(tmp_path / "compact"))

    def look() -> dict[str, str]:
        found = {}
        for name, most in room.items():
            path = tmp_path / name / "nr_hugepages"
            path.write_text(str(min(int(path.read_text()), most)))
            found[name[10:-2]] = path.read_text()
        return found

    count = huge_pages._count
    monkeypatch.setattr(huge_pages, "_count", lambda path: (look(), count(path))[1])
    return look


def limit(size: str, of: int) -> dict[str, Any]:
    return {"pageSize": size, "limit": of}


def test_a_limit_is_a_reservation(kernel: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    limits = [limit("2MB", 64 * MIB), limit("1GB", 1 << 30), limit("64GB", 1 << 40), limit("2MB", 0)]
    first = huge_pages.reserve(limits, str(tmp_path))
    assert kernel() == {"2048": "35", "1048576": "1"}
    second = huge_pages.reserve([limit("2MB", 10 * MIB), limit("2MB", (1 << 63) - 1)], str(tmp_path))
    assert kernel()["2048"] == "40"

    huge_pages.give_back(first)
    huge_pages.give_back(second)
    assert kernel() == {"2048": "3", "1048576": "0"}
    assert first == []


def test_more_than_there_is_is_not_tried(
    kernel: Callable[..., dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux 6.12 looks longer for pages that it cannot have than the agent may take."""
    (tmp_path / "meminfo").write_text("MemTotal: 300000 kB\nMemAvailable:   20481 kB\n")
    monkeypatch.setattr(huge_pages, "_MEMINFO", str(tmp_path / "meminfo"))
    with pytest.raises(RpcError, match="room for 10 of 11 pages of 2MB; try: a larger VM"):
        huge_pages.reserve([limit("2MB", 2 * MIB), limit("2MB", 22 * MIB)], str(tmp_path))

    assert kernel() == {"2048": "3", "1048576": "0"}
    assert not (tmp_path / "compact").exists()


def test_all_or_none(kernel: Callable[..., dict[str, str]], tmp_path: Path) -> None:
    with pytest.raises(RpcError, match="room for 97 of 200 pages of 2MB; try: a larger VM") as caught:
        huge_pages.reserve([limit("1GB", 1 << 30), limit("2MB", 400 * MIB)], str(tmp_path))

    assert caught.value.code == Code.RESOURCE_EXHAUSTED
    assert kernel() == {"2048": "3", "1048576": "0"}
    assert (tmp_path / "compact").read_text() == "1", "it has tried to make room"
