"""The agent keeps Kata's agent protocol in a real guest, with crun, and without any of the shim."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from guest.boot import GuestVM
from proto import agent_pb2 as agent
from proto import health_pb2 as health
from proto import oci_pb2 as oci
from testing.guest import PROJECT, guest_files
from tests.e2e.guests import SHARED, STREAM_PORT, Guest, fill_share, make_spec, read_some, sandbox_request
from ttrpc import Client, Code, RpcError

# What Kata's shims say of the root file system, which has no journal.
KATAS_WORDS = f"agent.stream_port={STREAM_PORT} rootflags=data=ordered,errors=remount-ro"

pytestmark = [pytest.mark.kata_only, pytest.mark.asyncio(loop_scope="module")]


def _vsock_daemon() -> None:
    """guest.boot looks at $VHOST_DEVICE_VSOCK and PATH; `make setup` puts the daemon into build/."""
    path = PROJECT / "build/vsock/usr/bin/vhost-device-vsock"
    if path.exists():
        os.environ.setdefault("VHOST_DEVICE_VSOCK", str(path))


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared directory with one busybox root file system."""
    made = tmp_path_factory.mktemp("share")
    fill_share(made)
    return made


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ext4 disk with one file."""
    folder = tmp_path_factory.mktemp("disk")
    (folder / "content").mkdir()
    (folder / "content/hello").write_text("from the disk\n")
    image = folder / "disk.img"
    subprocess.run(
        ["mke2fs", "-q", "-t", "ext4", "-d", str(folder / "content"), str(image), "8M"],
        check=True,
        capture_output=True,
        env={**os.environ, "PATH": os.environ["PATH"] + ":/sbin:/usr/sbin"},
    )
    return image


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(share: Path, disk: Path) -> AsyncIterator[Guest]:
    """A guest with a sandbox."""
    _vsock_daemon()
    drive = [
        "-drive",
        f"if=none,id=data,file={disk},format=raw",
        "-device",
        "virtio-blk-pci,drive=data,addr=0x0a",
    ]
    folder = guest_files()["image"].parent
    async with GuestVM(folder, share, KATAS_WORDS, extra=drive) as vm:
        connection, _ = await vm.connect(1024)
        client = Client(connection)
        made = Guest(vm, client)
        await made.agent.create_sandbox(sandbox_request())
        yield made
        made.close()
        await client.close()
        assert "agent: error" not in vm.console_tail(100)


# --- the agent itself -------------------------------------------------------------------------


async def test_health_and_details(guest: Guest) -> None:
    answer = await guest.health.check(health.CheckRequest())
    request = agent.GuestDetailsRequest(mem_block_size=True, mem_hotplug_probe=True)
    details = await guest.agent.get_guest_details(request)

    assert answer.status == health.HealthCheckResponse.SERVING
    assert details.agent_details.init_daemon
    assert "virtio-fs" in details.agent_details.storage_handlers
    assert details.mem_block_size_bytes >= 1 << 20
    with pytest.raises(RpcError) as again:
        await guest.agent.create_sandbox(sandbox_request())
    assert again.value.code == Code.ALREADY_EXISTS


async def test_clock_entropy_cpus_metrics_and_links(guest: Guest) -> None:
    await guest.agent.set_guest_date_time(agent.SetGuestDateTimeRequest(Sec=2_000_000_000, Usec=5))
    await guest.agent.reseed_random_dev(agent.ReseedRandomDevRequest(data=os.urandom(512)))
    await guest.agent.online_cpu_mem(agent.OnlineCPUMemRequest(nb_cpus=1))
    metrics = await guest.agent.get_metrics(agent.GetMetricsRequest())
    interfaces = await guest.agent.list_interfaces(agent.ListInterfacesRequest())
    touched = await guest.run("sh", "-c", "touch /tmp/now; stat -c %Y /tmp/now >&2; uname -r")

    assert "kata_agent_containers" in metrics.metrics
    assert interfaces.Interfaces[0].name == "lo"
    assert touched[1].strip()
    with pytest.raises(RpcError):
        await guest.agent.online_cpu_mem(agent.OnlineCPUMemRequest(nb_cpus=64))


# --- processes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 1", 1), ("exit 42", 42), ("sh -c 'kill -9 $$'; exit $?", 137)]
)
async def test_exit_codes(guest: Guest, script: str, code: int) -> None:
    assert (await guest.run("sh", "-c", script))[0] == code


async def test_stdout_stderr_and_the_kernel(guest: Guest) -> None:
    code, out, err = await guest.run("sh", "-c", "uname -r; hostname; echo oops >&2")

    assert code == 0
    assert out.split()[1] == b"box"
    assert out.split()[0] != os.uname().release.encode()
    assert err == b"oops\n"


async def test_megabytes_through_stdin_and_stdout(guest: Guest) -> None:
    data = os.urandom(1 << 20) * 16

    assert await guest.run("cat", stdin=data) == (0, data, b"")


async def test_who_what_and_where(guest: Guest) -> None:
    script = (
        "id -u; id -g; id -G; pwd; echo $A; ulimit -n;"
        " grep -E 'NoNewPrivs|CapEff|Seccomp:' /proc/self/status; cat /proc/self/oom_score_adj; touch /x"
    )
    spec = make_spec("sh", "-c", script)
    process = spec.Process
    process.User.UID, process.User.GID = 1000, 100
    process.User.AdditionalGids.extend((7, 8))
    process.Cwd = "/tmp"
    process.Env.append("A=b c")
    process.Rlimits.add(Type="RLIMIT_NOFILE", Hard=600, Soft=500)
    process.NoNewPrivileges = True
    process.OOMScoreAdj = 321
    spec.Root.Readonly = True
    seccomp = spec.Linux.Seccomp
    seccomp.DefaultAction = "SCMP_ACT_ALLOW"
    seccomp.Architectures.append("SCMP_ARCH_X86_64")
    seccomp.Syscalls.add(Names=["mkdir", "mkdirat"], Action="SCMP_ACT_ERRNO", errnoret=95)
    code, out, err = await guest.run(spec=spec)

    lines = out.decode().split("\n")
    assert lines[:6] == ["1000", "100", "100 7 8", "/tmp", "b c", "500"]
    assert "NoNewPrivs:\t1" in lines
    assert "Seccomp:\t2" in lines
    assert "CapEff:\t0000000000000000" in lines  # not root: exec drops what is only effective
    assert "321" in lines
    assert code == 1
    assert b"Read-only file system" in err


async def test_the_dialect_of_katas_shims(guest: Guest) -> None:
    """As Kata 4.1.0's writes containerd's default spec."""
    spec = make_spec("sh", "-c", "grep -E 'CapEff|Seccomp:' /proc/self/status; ls -l /proc/self/ns")
    capabilities = spec.Process.Capabilities
    for kind in ("Bounding", "Effective", "Permitted"):
        names = getattr(capabilities, kind)
        bare = [name.removeprefix("CAP_") for name in names]
        del names[:]
        names.extend(bare)
    del spec.Linux.Namespaces[:]
    for kind in ("pid", "ipc", "uts", "mnt", "net"):
        spec.Linux.Namespaces.add(Type=kind)
    spec.Linux.Seccomp.DefaultAction = "SCMP_ACT_ALLOW"
    spec.Linux.Seccomp.Architectures.append("SCMP_ARCH_X86_64")
    spec.Linux.Seccomp.Syscalls.add(Names=["bpf"], Action="SCMP_ACT_ERRNO", errnoret=1)
    spec.Linux.Seccomp.Syscalls.add(Names=["read"], Action="SCMP_ACT_ALLOW", errnoret=0)
    code, out, err = await guest.run(spec=spec)

    assert (code, err) == (0, b"")
    assert b"CapEff:\t00000000000000e1" in out  # chown, kill, setgid, setuid
    assert b"Seccomp:\t2" in out


async def test_seccomp_gives_the_errno_that_is_asked_for(guest: Guest) -> None:
    """Each container its own: crun 1.21 and 1.28 keep filters, and mistake one with other errors for it."""
    said = []
    for number in (95, 28):
        spec = make_spec("mkdir", "/tmp/never")
        spec.Linux.Seccomp.DefaultAction = "SCMP_ACT_ALLOW"
        spec.Linux.Seccomp.Architectures.append("SCMP_ARCH_X86_64")
        spec.Linux.Seccomp.Syscalls.add(Names=["mkdir", "mkdirat"], Action="SCMP_ACT_ERRNO", errnoret=number)
        code, _, err = await guest.run(spec=spec)
        said.append((code, err.rpartition(b": ")[2].strip()))

    assert said == [(1, b"Operation not supported"), (1, b"No space left on device")]


async def test_masked_and_read_only_paths(guest: Guest) -> None:
    code, out, err = await guest.run(
        "sh", "-c", "head -c 1 /proc/kcore | wc -c; echo 1 > /proc/sys/vm/drop_caches"
    )

    assert (code, out) == (1, b"0\n")
    assert b"Read-only" in err


@pytest.mark.parametrize("program", ["nonesuch", "/bin/nonesuch", "/bin/notexec"])
async def test_a_program_that_cannot_run_is_named(guest: Guest, program: str) -> None:
    with pytest.raises(RpcError, match=program) as caught:
        await guest.start(make_spec(program))

    assert caught.value.code == Code.INVALID_ARGUMENT


async def test_a_terminal(guest: Guest) -> None:
    spec = make_spec("sh", "-c", "stty size; read x; echo got $x; stty size; exit 5", terminal=True)
    spec.Process.ConsoleSize.Height, spec.Process.ConsoleSize.Width = 24, 80
    running = await guest.start(spec, stdin=True)
    assert running.stdout is not None
    first = b""
    while b"\n" not in first:
        first += await read_some(running.stdout)
    resize = agent.TtyWinResizeRequest(container_id=running.id, row=50, column=132)
    await guest.agent.tty_win_resize(resize)
    await running.send(b"text\n", end=False)
    code, out, _ = await running.finish()
    running.close()
    await guest.remove(running.id)

    assert first == b"24 80\r\n"
    assert b"got text\r\n50 132\r\n" in out
    assert code == 5


async def test_signals(guest: Guest) -> None:
    running = await guest.start(
        make_spec("sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done")
    )
    assert running.stdout is not None
    await read_some(running.stdout)
    await guest.signal(running, signal.SIGTERM)
    assert await running.finish() == (9, b"", b"")
    with pytest.raises(RpcError) as gone:
        await guest.signal(running, signal.SIGTERM)
    assert gone.value.code == Code.NOT_FOUND
    await guest.remove(running.id)

    killed = await guest.start(make_spec("sleep", "1000"))
    await guest.signal(killed, signal.SIGKILL)
    assert await killed.finish() == (137, b"", b"")
    assert await killed.wait() == 137  # still known, to anybody
    await guest.remove(killed.id)
    with pytest.raises(RpcError) as removed:
        await killed.wait()
    assert removed.value.code == Code.NOT_FOUND


async def test_execs(guest: Guest) -> None:
    running = await guest.start(make_spec("sleep", "1000"))

    async def one(number: int) -> tuple[int, bytes, bytes]:
        made = await guest.exec(running, "sh", "-c", f"echo {number}; echo e >&2; exit {number}")
        return await made.finish()

    results = await asyncio.gather(*(one(number) for number in range(10)))
    assert results == [(n, f"{n}\n".encode(), b"e\n") for n in range(10)]

    terminal = await guest.exec(running, "sh", "-c", "test -t 0 && test -t 1 && exit 4", terminal=True)
    assert (await terminal.finish())[0] == 4
    terminal.close()

    survivor = await guest.exec(running, "sh", "-c", "sleep 500 & echo started")
    assert await asyncio.wait_for(survivor.finish(), 20) == (0, b"started\n", b"")

    sleeper = await guest.exec(running, "sleep", "1000")
    await guest.signal(sleeper, signal.SIGKILL)
    assert (await sleeper.finish())[0] == 137

    with pytest.raises(RpcError, match="nonesuch") as missing:
        await guest.exec(running, "nonesuch")
    assert missing.value.code == Code.INVALID_ARGUMENT
    await guest.signal(running, signal.SIGKILL)
    assert (await running.finish())[0] == 137
    await guest.remove(running.id)


async def test_orphans_are_reaped_and_removal_leaves_nothing(guest: Guest) -> None:
    await guest.agent.get_metrics(agent.GetMetricsRequest())
    probe = make_spec(
        "sh",
        "-c",
        "ps | grep -c '[Z]ombie'; ls /host/kata-containers /host/crun;"
        " ls -d /cg/test/c[0-9]* 2>/dev/null | wc -l",
    )
    probe.Linux.Namespaces.remove(next(n for n in probe.Linux.Namespaces if n.Type == "pid"))
    for source, target in (("/run", "/host"), ("/sys/fs/cgroup", "/cg")):
        probe.Mounts.add(destination=target, type="bind", source=source, options=["rbind", "ro"])
    running = await guest.start(make_spec("sh", "-c", "(sleep 0.1 &) ; sleep 1000"))
    exec_ = await guest.exec(running, "sh", "-c", "(sleep 0.2 &)")
    await exec_.finish()
    await guest.remove(running.id)
    running.close()
    probe.Linux.CgroupsPath = "/probe"
    before = await guest.run(spec=probe)
    after = await guest.run(spec=probe)

    listing = after[1].decode().split()
    assert running.id not in listing
    assert listing[-1] == "0"
    assert before[0] == after[0] == 0


# --- resources --------------------------------------------------------------------------------


async def test_limits_stats_pause_and_update(guest: Guest) -> None:
    spec = make_spec("sh", "-c", "while :; do :; done")
    spec.Linux.Resources.Memory.Limit = 32 << 20
    spec.Linux.Resources.Pids.Limit = 20
    running = await guest.start(spec)
    named = {"container_id": running.id}

    async def stats() -> agent.CgroupStats:
        answer = await guest.agent.stats_container(agent.StatsContainerRequest(**named))
        result: agent.CgroupStats = answer.cgroup_stats
        return result

    first = await stats()
    assert first.memory_stats.usage.limit == 32 << 20
    assert first.pids_stats.limit == 20
    await guest.agent.pause_container(agent.PauseContainerRequest(**named))
    frozen = (await stats()).cpu_stats.cpu_usage.total_usage
    await asyncio.sleep(0.2)
    assert (await stats()).cpu_stats.cpu_usage.total_usage == frozen > 0
    await guest.agent.resume_container(agent.ResumeContainerRequest(**named))
    resources = oci.LinuxResources()
    resources.Memory.Limit = 48 << 20
    resources.Pids.Limit = 30
    await guest.agent.update_container(agent.UpdateContainerRequest(resources=resources, **named))
    last = await stats()
    assert last.memory_stats.usage.limit == 48 << 20
    assert last.pids_stats.limit == 30
    await guest.agent.pause_container(agent.PauseContainerRequest(**named))
    await guest.remove(running.id)  # also a frozen one
    running.close()


async def test_out_of_memory_is_reported(guest: Guest) -> None:
    # One line without an end: tail must keep all of it, so it grows by what it reads and nothing else.
    spec = make_spec("sh", "-c", "tail -n 1 /dev/zero; exit $?")
    spec.Linux.Resources.Memory.Limit = 24 << 20
    waiting = asyncio.ensure_future(guest.agent.get_oom_event(agent.GetOOMEventRequest(), timeout=60))
    running = await guest.start(spec)
    event = await asyncio.wait_for(waiting, 60)
    code, out, _ = await running.finish()
    await guest.remove(running.id)

    assert event.container_id == running.id
    assert (code, out) == (137, b"")  # tail's end, as its shell tells it, or the shell's own


# --- storages and namespaces ------------------------------------------------------------------


async def test_storages(guest: Guest) -> None:
    base = "/run/kata-containers/sandbox"
    storages = [
        agent.Storage(
            driver="ephemeral",
            source="tmpfs",
            fstype="tmpfs",
            options=["fsgid=77"],
            mount_point=f"{base}/e/1",
        ),
        agent.Storage(
            driver="local", source="local", fstype="local", options=["mode=0777"], mount_point=f"{base}/l"
        ),
        agent.Storage(
            driver="blk", source="0a", fstype="ext4", options=["ro"], mount_point=f"{base}/storage/disk"
        ),
        agent.Storage(
            driver="overlayfs",
            source="overlay",
            fstype="overlay",
            options=[f"lowerdir={SHARED}/passthrough/busybox/rootfs/etc:{base}/storage/disk"],
            mount_point=f"{base}/o",
        ),
    ]
    spec = make_spec("sh", "-c", "stat -c '%g %a' /e /l; cat /d/hello; ls /o; df /d | tail -n 1; touch /d/x")
    for name, source in (("/e", "e/1"), ("/l", "l"), ("/d", "storage/disk"), ("/o", "o")):
        spec.Mounts.add(destination=name, type="bind", source=f"{base}/{source}", options=["rbind"])
    for _ in range(2):  # mounted, unmounted, and mounted again
        code, out, err = await guest.run(spec=spec, storages=storages)
        lines = out.decode().splitlines()
        assert lines[:2] == ["77 3777", "0 777"]
        assert lines[2] == "from the disk"
        assert {"hello", "passwd"} <= set(lines)
        assert lines[-1].startswith("/dev/vdb")
        assert (code, err.count(b"Read-only")) == (1, 1)


async def test_a_disk_that_is_not_there(guest: Guest) -> None:
    storage = agent.Storage(
        driver="blk", source="1f", fstype="ext4", mount_point="/run/kata-containers/sandbox/storage/none"
    )
    with pytest.raises(RpcError, match="no blk device 1f"):
        await guest.start(make_spec("true"), storages=[storage])


async def test_a_copied_file_is_seen_by_the_container(guest: Guest) -> None:
    path = f"{SHARED}/passthrough/busybox/rootfs/data/file"
    for offset, data in ((0, b"one "), (4, b"two\n")):
        request = agent.CopyFileRequest(
            path=path, file_size=8, file_mode=0o100644, dir_mode=0o755, offset=offset, data=data
        )
        await guest.agent.copy_file(request)

    assert await guest.run("cat", "/data/file") == (0, b"one two\n", b"")


async def test_containers_of_the_pod_share_a_pid_namespace(guest: Guest) -> None:
    first = await guest.start(make_spec("sh", "-c", "sleep 999; true"), sandbox_pidns=True)
    second = await guest.run(spec=make_spec("ps"), sandbox_pidns=True)
    ids = await guest.run("sh", "-c", "ps | grep -c 'sleep 99[9]'")
    await guest.remove(first.id)
    first.close()

    assert b"sleep 999" in second[1]
    assert ids[1] == b"0\n"  # another container, which did not ask for it


# --- an agent without stream connections, as stock shims use it ---------------------------------


async def test_streams_by_call_and_destroy(share: Path) -> None:
    _vsock_daemon()
    async with GuestVM(guest_files()["image"].parent, share) as vm:
        connection, _ = await vm.connect(1024)
        client = Client(connection)
        stub: Any = Guest(vm, client).agent
        await stub.create_sandbox(sandbox_request())
        spec = make_spec("sh", "-c", "cat; echo oops >&2; exit 6")
        await stub.create_container(agent.CreateContainerRequest(container_id="c", exec_id="c", OCI=spec))
        await stub.start_container(agent.StartContainerRequest(container_id="c"))
        data = os.urandom(200_000)

        async def write() -> None:
            for at in range(0, len(data), 50_000):
                part = agent.WriteStreamRequest(container_id="c", data=data[at : at + 50_000])
                assert (await stub.write_stdin(part)).len == 50_000
            await stub.close_stdin(agent.CloseStdinRequest(container_id="c"))

        async def read(call: Any) -> bytes:
            result = b""
            while part := (await call(agent.ReadStreamRequest(container_id="c", len=32768))).data:
                result += part
            return result

        _, out, err = await asyncio.gather(write(), read(stub.read_stdout), read(stub.read_stderr))
        status = (await stub.wait_process(agent.WaitProcessRequest(container_id="c"))).status
        assert (out == data, err, status) == (True, b"oops\n", 6)
        await stub.destroy_sandbox(agent.DestroySandboxRequest())
        await client.close()
        assert vm.qemu is not None
        await asyncio.wait_for(vm.qemu.wait(), 20)
