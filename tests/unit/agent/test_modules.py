"""A kernel module that the host asks for is loaded, or the host is told which one is not, and why."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from agent import modules
from ttrpc import Code, RpcError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The runs of modprobe, which knows `here` only."""
    found: list[list[str]] = []

    async def run(_: object, argv: list[str], __: float) -> int:
        found.append(argv)
        return 0 if argv[1] == "here" else 1

    monkeypatch.setattr(modules, "run_program", run)
    monkeypatch.setattr(modules, "DIRECTORY", str(tmp_path))
    folder = tmp_path / os.uname().release
    folder.mkdir()
    (folder / "modules.dep").write_text("kernel/net/here.ko:\nkernel/net/un-willing.ko: kernel/net/here.ko\n")
    (folder / "modules.builtin").write_text("kernel/fs/built-in.ko\n")
    return found


async def load(name: str, *parameters: str) -> None:
    reaper: Any = None
    await modules.load(reaper, name, *parameters)


async def test_it_is_loaded_with_its_parameters(asked: list[list[str]]) -> None:
    await load("here", "size=5", "what=a,b")
    await load("built_in", "parameter=1")

    assert asked == [["/sbin/modprobe", "here", "size=5", "what=a,b"]]


@pytest.mark.parametrize(
    ("name", "why"),
    [("nowhere", "the guest's image has no such module"), ("un_willing", "the kernel refused it")],
)
async def test_what_is_not_loaded_is_named(asked: list[list[str]], name: str, why: str) -> None:
    with pytest.raises(RpcError, match=f"kernel module '{name} x=1' was not loaded: {why}; try: ") as caught:
        await load(name, "x=1")

    assert caught.value.code == Code.FAILED_PRECONDITION
    assert len(asked) == 1


@pytest.mark.parametrize("words", [("",), ("-r",), ("../x",), ("here", "--remove"), ("a\0b",)])
async def test_nothing_is_an_option_or_a_path(asked: list[list[str]], words: tuple[str, ...]) -> None:
    with pytest.raises(RpcError) as caught:
        await load(*words)

    assert caught.value.code == Code.INVALID_ARGUMENT
    assert asked == []
