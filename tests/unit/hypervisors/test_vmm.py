"""Whatever QEMU does - dies at once, says nothing, ends by itself - is told in words and leaves nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from devices import child as child_module
from devices.child import Child
from devices.config import BlockConfig, ConsoleConfig, RngConfig
from devices.errors import BugError, HostError, HypervisorError, UnsupportedByHypervisor
from devices.kinds import Kind, Op
from devices.undo import MemoryUndo
from hypervisors.config import HypervisorConfig
from hypervisors.qemu.vmm import Qemu

# A QEMU that has QMP and nothing else. `query-cpus-fast` is answered with nonsense; "stop" makes the
# guest end the VM; "cont" has QEMU crash (no signal of its own ends the first process of a pid namespace).
SCRIPT = f"""#!{os.path.realpath(sys.executable)} -IS
import ctypes, json, re, socket, sys
chardev = next(word for word in sys.argv if word.startswith("socket,id=qmp,"))
listener = socket.socket(fileno=int(re.search(r"fd=(\\d+)", chardev)[1]))
peer, _ = listener.accept()
stream = peer.makefile("rw")
def say(message):
    stream.write(json.dumps(message) + "\\n")
    stream.flush()
say({{"QMP": {{}}}})
for line in stream:
    command = json.loads(line)
    answer = {{"query-status": {{"status": "running"}}, "query-cpus-fast": [{{"cpu": 1}}]}}
    if command["execute"] == "cont":
        ctypes.string_at(0)
    if command["execute"] == "stop":
        say({{"event": "SHUTDOWN", "data": {{"guest": True, "reason": "guest-reset"}}}})
    say({{"return": answer.get(command["execute"], {{}}), "id": command["id"]}})
    if command["execute"] in ("quit", "stop"):
        sys.exit(0)
"""

Make = Callable[[str], Qemu]


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """A VM whose QEMU is the given program; afterwards nothing of it is left."""
    state, guest = tmp_path / "state", tmp_path / "guest"
    state.mkdir()
    for name in ("kernel", "initrd", "disk"):
        guest.mkdir(exist_ok=True)
        (guest / name).touch()
    undo = MemoryUndo()
    made: list[Qemu] = []
    await asyncio.to_thread(int)  # the loop's own descriptors exist from here on
    before = sorted(os.listdir("/proc/self/fd"))

    def _make(path: str) -> Qemu:
        section = HypervisorConfig(
            path=path, kernel=f"{guest}/kernel", initrd=f"{guest}/initrd", accelerator="tcg"
        )
        made.append(Qemu(section, sandbox_id="vm", state_dir=str(state), undo=undo))
        return made[-1]

    yield _make
    for vm in made:
        await vm.cleanup()
        await vm.cleanup()
        assert await vm.get_pids() == []
    assert undo.entries == []
    assert os.listdir(state) == []
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.fixture
async def running(make: Make, tmp_path: Path) -> Qemu:
    vm = make(program(tmp_path / "qemu", SCRIPT))
    await vm.prepare_vm("vm", None)
    await vm.add_device(ConsoleConfig())
    await vm.start_vm(20)
    return vm


@pytest.mark.parametrize("attempt", range(5))
async def test_a_qemu_that_dies_at_once_is_quoted(make: Make, tmp_path: Path, attempt: int) -> None:
    vm = make(program(tmp_path / "qemu", "#!/bin/sh\necho 'qemu: no such option' >&2\nexit 1\n"))
    await vm.prepare_vm("vm", None)
    with pytest.raises(HypervisorError, match="qemu exited with code 1") as caught:
        await vm.start_vm(20)

    assert caught.value.phase == "boot"
    assert caught.value.details == {"vmm stderr": "qemu: no such option"}
    assert "check [hypervisor.qemu]" in caught.value.hint


async def test_a_qemu_that_says_nothing_meets_the_deadline(make: Make, tmp_path: Path) -> None:
    vm = make(program(tmp_path / "qemu", "#!/bin/sh\ntest $1 = --version || exec sleep 100\n"))
    await vm.prepare_vm("vm", None)
    with pytest.raises(HypervisorError, match=r"within 0.3 s") as caught:
        await vm.start_vm(0.3)

    assert caught.value.code == "DEADLINE_EXCEEDED"
    assert (await vm.wait_vm()).expected  # we ended it


async def test_a_qemu_that_is_not_there_is_the_hosts_fault(make: Make) -> None:
    vm = make("/nope/qemu")
    await vm.prepare_vm("vm", None)
    with pytest.raises(HostError, match="/nope/qemu does not exist"):
        await vm.start_vm(20)


async def test_a_qemu_that_speaks_no_qmp(make: Make, tmp_path: Path) -> None:
    mute = SCRIPT.replace(
        'say({"QMP": {}})', 'peer.send(b"hello\\n"); import os; os.execv("/bin/sleep", ["sleep", "100"])'
    )
    vm = make(program(tmp_path / "qemu", mute))
    await vm.prepare_vm("vm", None)
    with pytest.raises(HypervisorError, match="no JSON"):
        await vm.start_vm(20)


async def test_a_cancelled_start_leaves_nothing(make: Make, tmp_path: Path) -> None:
    vm = make(program(tmp_path / "qemu", "#!/bin/sh\ntest $1 = --version || exec sleep 100\n"))
    await vm.prepare_vm("vm", None)
    starting = asyncio.create_task(vm.start_vm(20))
    await asyncio.sleep(0.05)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)

    assert starting.cancelled()
    assert await vm.get_pids() == []


async def test_a_stop_is_an_expected_end(running: Qemu) -> None:
    await running.check()
    assert await running.get_pids() == [await running.get_vmm_master_tid()]
    state = await running.save_state()
    assert (state.hypervisor, state.sandbox_id, state.accelerator) == ("qemu", "vm", "tcg")
    await asyncio.gather(running.stop_vm(), running.stop_vm())

    ended = await running.wait_vm()
    assert (ended.expected, ended.code, ended.reason) == (True, 0, "the VM was stopped")
    with pytest.raises(HypervisorError):
        await running.check()
    with pytest.raises(HypervisorError):
        await running.save_state()


# What of QEMU does not end: it hears no `quit`, and, if it is deaf, no SIGTERM. As the first of its pid
# namespace it ends by SIGTERM only if it has a handler, as QEMU has.
STUBBORN = SCRIPT.replace(
    'if command["execute"] in ("quit", "stop"):',
    'if command["execute"] == "quit":\n        continue\n    if 0:',
).replace("say({", "import signal\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(15))\nsay({", 1)
DEAF = STUBBORN.replace("lambda *_: sys.exit(15)", "signal.SIG_IGN")


@pytest.mark.parametrize(
    ("script", "still", "code"),
    [
        (SCRIPT, False, 0),
        (STUBBORN, False, 15),
        (DEAF, False, -signal.SIGKILL),
        (SCRIPT, True, -signal.SIGKILL),
    ],
    ids=["quit", "SIGTERM", "SIGKILL", "stopped"],
)
async def test_a_stop_goes_from_word_to_force(
    make: Make, tmp_path: Path, script: str, still: bool, code: int
) -> None:
    """Each step has its time, and the next one does not depend on it."""
    vm = make(program(tmp_path / "qemu", script))
    await vm.prepare_vm("vm", None)
    await vm.start_vm(20)
    if still:
        os.kill(await vm.get_vmm_master_tid(), signal.SIGSTOP)
    began = time.monotonic()
    await asyncio.gather(vm.stop_vm(), vm.stop_vm())
    assert time.monotonic() - began < 0.9 + 5.0
    ended = await vm.wait_vm()
    assert (ended.expected, ended.code) == (True, code)


async def test_a_qemu_that_the_kernel_holds_is_told_all_the_same(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not end by SIGKILL (a dead file server): whoever waits for its end hears of it."""
    vm = make(program(tmp_path / "qemu", SCRIPT))
    await vm.prepare_vm("vm", None)
    await vm.start_vm(20)
    pid = await vm.get_vmm_master_tid()
    with monkeypatch.context() as held:
        held.setattr(child_module, "_REAP_DEADLINE", 0.2)
        held.setattr(Child, "send_signal", lambda *_: None)
        held.setattr(vm._parts, "qmp", None)
        with pytest.raises(HostError, match="did not end"):
            await vm.stop_vm()
        ended = await asyncio.wait_for(vm.wait_vm(), 5)
        assert ended.expected
    os.kill(pid, signal.SIGKILL)
    await vm.stop_vm()


async def test_a_crash_of_qemu_is_told_to_all_who_wait(running: Qemu) -> None:
    waiting = [asyncio.create_task(running.wait_vm()) for _ in range(3)]
    with pytest.raises(HypervisorError):
        await running.resume_vm()  # this one crashes
    ends = await asyncio.wait_for(asyncio.gather(*waiting), 2)

    assert {(end.expected, end.code, end.reason) for end in ends} == {
        (False, -11, "qemu was killed by SIGSEGV")
    }


async def test_a_guest_that_ends_the_vm_is_named_as_the_reason(running: Qemu) -> None:
    await running.pause_vm()  # this one's guest resets
    ended = await running.wait_vm()

    assert (ended.expected, ended.reason) == (False, "the guest ended the VM (guest-reset)")


async def test_an_answer_that_makes_no_sense_is_an_error(running: Qemu) -> None:
    with pytest.raises(HypervisorError, match="makes no sense"):
        await running.get_thread_ids()


async def test_what_it_cannot_do_it_says(running: Qemu) -> None:
    calls: list[Awaitable[object]] = [
        running.save_vm("/x"),
        running.resize_vcpu(2),
        running.resize_memory(512),
        running.add_device(RngConfig()),
        running.update_device(RngConfig()),
        running.remove_device("console"),
    ]
    for call in calls:
        with pytest.raises(UnsupportedByHypervisor, match="qemu does not support") as caught:
            await call
        assert caught.value.code == "UNIMPLEMENTED"
    able = await running.capabilities()

    assert able.pause
    assert all(able.can(kind, Op.COLD) for kind in (Kind.BLK, Kind.SHARE_FS))
    assert not any((able.snapshot, able.can(Kind.VCPU, Op.HOT), able.more_memory))


async def test_calls_out_of_order_are_refused(make: Make) -> None:
    vm = make("/nope/qemu")
    with pytest.raises(BugError):
        await vm.start_vm(1)
    with pytest.raises(BugError):
        await vm.wait_vm()
    with pytest.raises(BugError):
        await vm.prepare_vm("other", None)
    with pytest.raises(BugError, match="no vsock"):
        await vm.get_agent_socket()
    for early in (vm.pause_vm, vm.check, vm.get_vmm_master_tid):
        with pytest.raises(HypervisorError) as caught:
            await early()
        assert caught.value.code == "FAILED_PRECONDITION"
    await vm.stop_vm()


async def test_cold_devices_have_slots_until_they_run_out(make: Make, tmp_path: Path) -> None:
    disk = str(tmp_path / "guest/disk")
    vm = make("/nope/qemu")
    with pytest.raises(BugError, match="prepare_vm"):
        await vm.add_device(ConsoleConfig())
    await vm.prepare_vm("vm", None)
    assert await vm.add_device(ConsoleConfig()) == ""
    slots = [await vm.add_device(BlockConfig(id=f"d{number}", path=disk)) for number in range(30)]
    assert (slots[0], slots[-1], len(set(slots))) == ("01", "1e", 30)
    with pytest.raises(HypervisorError, match="no free PCI slot"):
        await vm.add_device(RngConfig())
    with pytest.raises(BugError, match="there is a device d1 already"):
        await vm.add_device(BlockConfig(id="d1", path=disk))
    await vm.remove_device("d1")
    with pytest.raises(UnsupportedByHypervisor):
        await vm.remove_device("d1")


def test_a_sandbox_id_cannot_speak_qemus_syntax() -> None:
    for bad in ("", "a,b", "../x", "a b", "x" * 129):
        with pytest.raises(BugError):
            Qemu(HypervisorConfig(), sandbox_id=bad, state_dir="/x", undo=MemoryUndo())
