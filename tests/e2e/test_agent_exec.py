"""An exec that our own program makes is, in all that a process can see of itself, the one of `crun exec`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from guest.boot import GuestVM
from proto import agent_pb2 as agent
from proto import oci_pb2 as oci
from proto.capabilities import CAPABILITIES
from testing.guest import PROJECT, guest_files
from tests.e2e.guests import STREAM_PORT, Guest, Running, fill_share, make_spec, read_some, sandbox_request
from ttrpc import Client, Code, RpcError

pytestmark = [pytest.mark.kata_only, pytest.mark.asyncio(loop_scope="module")]

# All of it about the shell itself, $$; what a process never has twice is taken out by `_facts`.
PROBE = r"""
cd /proc/$$
while read -r line; do echo "$line"; done < status
cat limits cgroup oom_score_adj personality
for space in ns/*; do readlink $space; done
for file in fd/*; do echo $file; readlink $file; stat -c '%A %u %g' $file; done
stat -c '%u %g %F' . fd/0 fd/1 fd/2
cut -d ' ' -f 5-8 stat
readlink cwd root exe
cat cmdline environ
umask
exit 7
"""
_VOLATILE = re.compile(
    r"^(Pid|PPid|Tgid|Ngid|NSpid|NSpgid|NStgid|NSsid|Vm\w+|Rss\w+|\w*ctxt_switches|State):.*\n",
    re.MULTILINE,
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    """A guest with a sandbox, that says on its console which programs its agent runs."""
    daemon = PROJECT / "build/vsock/usr/bin/vhost-device-vsock"
    if daemon.exists():
        os.environ.setdefault("VHOST_DEVICE_VSOCK", str(daemon))
    share = tmp_path_factory.mktemp("share")
    fill_share(share)
    rootfs = share / "passthrough/busybox/rootfs"
    for applet in ("cut", "mkfifo", "ln"):
        (rootfs / "bin" / applet).symlink_to("busybox")
    (rootfs / "etc/passwd").write_text(
        "# users\nroot:x:0:0::/root:/bin/sh\n\nx:\nann:x:1000:7:Ann,,:/tmp:/bin/sh\n"
    )
    words = f"agent.stream_port={STREAM_PORT} agent.log=debug"
    async with GuestVM(guest_files()["image"].parent, share, words) as vm:
        connection, _ = await vm.connect(1024)
        client = Client(connection)
        made = Guest(vm, client)
        await made.agent.create_sandbox(sandbox_request())
        yield made
        made.close()
        await client.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def box(guest: Guest) -> AsyncIterator[Running]:
    """A container that may do much, so that what an exec may not is seen."""
    spec = make_spec("sleep", "1000")
    spec.Linux.Namespaces.add(Type="network")
    for kind in ("Bounding", "Effective", "Permitted"):
        getattr(spec.Process.Capabilities, kind)[:] = sorted(CAPABILITIES)
    running = await guest.start(spec)
    yield running
    await guest.remove(running.id)
    running.close()


def _process(*args: str, **fields: Any) -> oci.Process:
    """An exec's spec; `caps`: the names of each set."""
    process = make_spec(*args).Process
    for kind, names in fields.pop("caps", {}).items():
        getattr(process.Capabilities, kind)[:] = [f"CAP_{name}" for name in names]
    for key, value in fields.items():
        if key in ("Args", "Env"):
            getattr(process, key)[:] = value
        elif key == "User":
            process.User.CopyFrom(oci.User(**value))
        elif key == "Rlimits":
            for name, soft, hard in value:
                process.Rlimits.add(Type=f"RLIMIT_{name}", Soft=soft, Hard=hard)
        else:
            setattr(process, key, value)
    return process


async def _run(
    guest: Guest, box: Running, process: oci.Process, by: str = "entered"
) -> tuple[int, bytes, bytes]:
    """(exit code, stdout, stderr) of an exec, which must have been made in this way."""
    name = f"x{next(guest._names)}"
    streams, ports = await guest._open((False, True, True))
    made = Running(guest, box.id, name, streams)
    try:
        request = agent.ExecProcessRequest(container_id=box.id, exec_id=name, process=process, **ports)
        await guest.agent.exec_process(request)
        done = await made.finish()
    finally:
        made.close()
    said = re.compile(rf"exec {name} in {box.id}: pid \d+ (entered|by crun)")
    async with asyncio.timeout(30):  # the serial port may be later than the answer
        while (found := said.search(_console(guest))) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert found[1] == by
    return done


def _console(guest: Guest) -> str:
    assert isinstance(guest.vm, GuestVM)
    return guest.vm.console_tail(100)


def _facts(out: bytes) -> str:
    text = _VOLATILE.sub("", out.replace(b"\0", b"\n").decode())
    return re.sub(r"pipe:\[\d+\]", "pipe", text)


_ALL = sorted(name[4:] for name in CAPABILITIES)
_ANN = {"UID": 1000, "GID": 1001}
SPECS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "no capabilities": {"caps": dict.fromkeys(("Bounding", "Effective", "Permitted"), ())},
    "all capabilities": {"caps": dict.fromkeys(("Bounding", "Effective", "Permitted"), _ALL)},
    "a user": {"User": {**_ANN, "AdditionalGids": [5, 6000, 7]}, "Env": ["PATH=/bin", "HOME=/data"]},
    "a user with ambient capabilities": {
        "User": _ANN,
        "NoNewPrivileges": True,
        "caps": {
            "Bounding": ("KILL", "NET_BIND_SERVICE", "SYS_PTRACE"),
            "Effective": ("KILL", "NET_BIND_SERVICE"),
            "Permitted": ("KILL", "NET_BIND_SERVICE"),
            "Inheritable": ("NET_BIND_SERVICE", "KILL"),
            "Ambient": ("NET_BIND_SERVICE", "AUDIT_READ"),
        },
    },
    "no new privileges": {"NoNewPrivileges": True},
    "limits": {
        "Rlimits": [
            *(("NOFILE", 64, 128), ("CORE", 0, 0), ("NPROC", 100, 2**64 - 1)),
            *(("LOCKS", 3, 4), ("STACK", 1 << 23, 1 << 24)),
        ]
    },
    "a directory": {"Cwd": "/tmp"},
    "an environment": {"Env": ["B=2", "PATH=/nowhere:/bin:/usr/bin", "A=1", "HOME=", "B=3", "E="]},
    "no environment": {"Env": []},
    "a path": {"Args": ["/bin/sh", "-c", PROBE, "zero", "", "two words"]},
}


@pytest.mark.parametrize("name", SPECS)
async def test_it_is_the_process_that_crun_makes(guest: Guest, box: Running, name: str) -> None:
    process = _process("sh", "-c", PROBE, **SPECS[name])
    ours = await _run(guest, box, process)
    process.SelinuxLabel = "nobody:looks:at:it"  # what `fits` leaves to crun, and this kernel ignores
    cruns = await _run(guest, box, process, "by crun")

    assert _facts(ours[1]) == _facts(cruns[1])
    assert ours[0] == cruns[0] == 7, ours[2]
    assert ours[2] == cruns[2]


@pytest.mark.parametrize("privileges", [False, True])
async def test_the_filter_is_the_containers(guest: Guest, privileges: bool) -> None:
    """The process of crun once more, with the filter that crun has compiled for the container."""
    spec = make_spec("sleep", "1000")
    spec.Linux.Seccomp.DefaultAction = "SCMP_ACT_ALLOW"
    spec.Linux.Seccomp.Architectures.extend(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"])
    spec.Linux.Seccomp.Syscalls.add(Names=["mkdir", "mkdirat"], Action="SCMP_ACT_ERRNO", errnoret=28)
    running = await guest.start(spec)
    process = _process("sh", "-c", f"mkdir /tmp/x; {PROBE}", NoNewPrivileges=not privileges, User=_ANN)
    process.Env.append("HOME=/")
    ours = await _run(guest, running, process)
    process.SelinuxLabel = "nobody:looks:at:it"
    cruns = await _run(guest, running, process, "by crun")
    assert b"No space left on device" in ours[2]
    assert "Seccomp:\t2\n" in _facts(ours[1])
    assert _facts(ours[1]) == _facts(cruns[1])
    assert (ours[0], ours[2]) == (cruns[0], cruns[2])
    await guest.remove(running.id)
    running.close()


async def test_a_user_who_is_in_no_list_has_a_home(guest: Guest, box: Running) -> None:
    """Where crun 1.8 sets none, and later ones as runc do this."""
    process = _process("sh", "-c", "echo $HOME", User={"UID": 100, "GID": 1})
    assert await _run(guest, box, process) == (0, b"/\n", b"")


async def test_the_oom_score_is_the_containers_or_its_own(guest: Guest) -> None:
    spec = make_spec("sleep", "1000")
    spec.Process.OOMScoreAdj = 123
    running = await guest.start(spec)
    scores = [
        (await _run(guest, running, _process("cat", "/proc/self/oom_score_adj", **fields)))[1]
        for fields in ({}, {"OOMScoreAdj": -5}, {"OOMScoreAdj": 900})
    ]
    assert scores == [b"123\n", b"-5\n", b"900\n"]
    await guest.remove(running.id)
    running.close()


@pytest.mark.parametrize("program", ["nonesuch", "/bin/nonesuch", "notexec", "/etc"])
async def test_what_cannot_be_run_is_told_by_crun(guest: Guest, box: Running, program: str) -> None:
    with pytest.raises(RpcError, match=program) as refused:
        await _run(guest, box, _process(program))
    assert refused.value.code == Code.INVALID_ARGUMENT


async def test_a_program_below_the_directory_is_cruns(guest: Guest, box: Running) -> None:
    assert (await _run(guest, box, _process("bin/sh", "-c", "exit 4"), "by crun"))[0] == 4


async def test_a_container_that_has_groups_below_its_own(guest: Guest) -> None:
    """As systemd in a container: its own group takes no process any more, and crun finds that of its init."""
    script = "cd /sys/fs/cgroup; mkdir sub; echo 1 > sub/cgroup.procs; echo +pids > cgroup.subtree_control"
    spec = make_spec("sh", "-c", f"{script}; echo ready; sleep 1000")
    for mount in spec.Mounts:
        if mount.destination == "/sys/fs/cgroup":
            mount.options[:] = ["rw"]
    running = await guest.start(spec)
    assert running.stdout is not None
    assert await asyncio.wait_for(read_some(running.stdout), 60) == b"ready\n"
    done = await _run(guest, running, _process("sh", "-c", "cat /proc/self/cgroup; exit 3"), "by crun")
    assert done == (3, b"0::/sub\n", b"")
    await guest.remove(running.id)
    running.close()


async def test_a_container_cannot_run_the_program_itself(guest: Guest, box: Running) -> None:
    """A program whose interpreter is whatever makes it: it gets an end, and nothing else."""
    script = "echo '#!/proc/self/exe' > /tmp/self; busybox chmod 755 /tmp/self"
    assert (await _run(guest, box, _process("sh", "-c", script)))[0] == 0
    with contextlib.suppress(RpcError):  # or it is refused
        code, out, _ = await _run(guest, box, _process("/tmp/self"))
        assert (code, out) == (1, b"")
    assert (await _run(guest, box, _process("sh", "-c", "exit 5")))[0] == 5
