"""Each driver that lies in one thing is found out by the test for that thing, and by no other.

Here by that test, on one VM as far as the lie allows it. `make test-liars` (KATA_LIARS=all) runs the whole
suite against each: its test must fail, and all others pass.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from conformance import in_guest
from conformance.contract import HypervisorContract
from conformance.guest import GuestSaysError
from conformance.in_guest import Booted, booted
from conformance.subject import Subject, World
from devices.errors import KataError
from tests.conformance.liars import LIES, Liar, Lie
from tests.conformance.test_qemu import qemu_subject

_FOUND_OUT = (AssertionError, KataError, GuestSaysError, TimeoutError, pytest.fail.Exception)
_WHOLE = os.environ.get("KATA_LIARS") == "all"
_LATER = {name: lie for name, lie in LIES.items() if lie.later}
_AT_ONCE = {name: lie for name, lie in LIES.items() if not lie.later}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What never comes need not be waited for long: `Lie.says` tells found out from too slow."""
    if not _WHOLE:
        monkeypatch.setattr(in_guest, "PROMPT", 5.0)


def _contract(subject: Subject) -> HypervisorContract:
    kind = type("TestLiar", (HypervisorContract,), {"subject": subject})
    contract: HypervisorContract = kind()
    return contract


def test_each_lie_names_a_test() -> None:
    assert [name for name, lie in LIES.items() if not hasattr(HypervisorContract, lie.test)] == []


@pytest.mark.skipif(_WHOLE, reason="the whole suite runs against each liar")
class TestOnOneVm:
    """What is said of a VM that was started honestly."""

    subject = qemu_subject(accelerator="tcg", block_device_driver="virtio-pmem")

    @pytest.mark.asyncio(loop_scope="class")
    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("lie", _LATER.values(), ids=_LATER)
    async def test_the_lie_is_found_out(
        self, guest: Booted, tmp_path: Path, lie: Lie, impatient: None
    ) -> None:
        liar = lie.kind(guest.vm, str(tmp_path))
        liar.runs = True
        test = getattr(_contract(self.subject), lie.test)
        with pytest.raises(_FOUND_OUT, match=lie.says or None):
            await test(dataclasses.replace(guest, vm=liar))


@pytest.mark.skipif(_WHOLE, reason="the whole suite runs against each liar")
class TestFromTheStart:
    """What has to be a lie before the VM starts."""

    @pytest.mark.asyncio
    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("lie", _AT_ONCE.values(), ids=_AT_ONCE)
    async def test_the_lie_is_found_out(self, tmp_path: Path, lie: Lie) -> None:
        test = getattr(_contract(lie.subject), lie.test)
        wanted = inspect.signature(test).parameters
        given: dict[str, Any] = {"tmp_path": tmp_path, "how": "panic"}
        if "guest" in wanted:
            made = given["guest"] = await booted(lie.subject, tmp_path)
            world = made.world
        else:
            world = given["world"] = World(lie.subject, tmp_path)
            await world.open()
        try:
            with pytest.raises(_FOUND_OUT, match=lie.says or None):
                await test(**{name: given[name] for name in wanted})
        finally:
            await _close(world)


async def _close(world: World) -> None:
    """A liar may leave what its test did not wait for; its processes must be gone all the same."""
    try:
        await world.close()
    except AssertionError:
        async with asyncio.timeout(20):
            while any(Path(f"/proc/{pid}").exists() for pid in world.pids):  # noqa: ASYNC110
                await asyncio.sleep(0.05)


def _suite(lies: Mapping[str, Lie]) -> dict[str, type[HypervisorContract]]:
    """A class for each liar, and one for a driver that only passes on, which must fail in nothing."""
    honest = Lie(Liar, "")
    named = {"Nobody": honest, **lies}
    return {
        f"TestWhole{''.join(word.capitalize() for word in name.split())}": type(
            "Whole", (HypervisorContract,), {"subject": lie.subject, "lie": lie}
        )
        for name, lie in named.items()
    }


if _WHOLE:
    globals().update(_suite(LIES))
