"""What people's containers ask of the guest itself is there: modules, devices, limits, huge pages, large
environments, links that lead nowhere yet; and by arguments of virtiofsd, overlays on volumes and locks.
"""

from __future__ import annotations

import asyncio
import functools
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from devices.config import ShareFsConfig
from devices.share_fs import carries_groups
from proto import agent_pb2 as agent
from proto import oci_pb2 as oci
from tests.e2e import vms
from tests.e2e.guests import SHARED, Guest, make_spec
from ttrpc import Code, RpcError

from .probe import build_probe

pytestmark = [pytest.mark.kata_only, pytest.mark.asyncio(loop_scope="module")]

MIB = 1 << 20
VOLUME = f"{SHARED}/passthrough/volume"
LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")
PRIVILEGED = (
    *(
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "KILL",
        "MKNOD",
        "NET_ADMIN",
        "NET_RAW",
        "SETGID",
    ),
    *("SETUID", "SYS_ADMIN", "SYS_CHROOT", "SYS_RESOURCE"),
)

Change = Callable[[oci.Spec], None]


class Box:
    """A guest, and the directory of the host that it calls `passthrough`."""

    def __init__(self, guest: Guest, share: Path) -> None:
        self.guest = guest
        self.root = share / "passthrough/busybox/rootfs"
        self.volume = share / "passthrough/volume"
        self.volume.mkdir()
        build_probe(self.root / "bin")
        for applet in ("ip", "losetup", "ln", "mkfifo", "mount", "mv", "rm", "umount"):
            (self.root / "bin" / applet).unlink(missing_ok=True)
            (self.root / "bin" / applet).symlink_to("busybox")

    async def sh(self, script: str, *changes: Change, **fields: Any) -> str:
        """What a script writes, in a container of its own with a volume at /data. Raises AssertionError."""
        spec = make_spec("sh", "-ec", script)
        spec.Mounts.add(destination="/data", type="bind", source=VOLUME, options=["rbind"])
        for change in changes:
            change(spec)
        code, out, err = await self.guest.run(spec=spec, **fields)
        assert code == 0, f"{script}: exit {code}: {out!r} {err!r}"
        return out.decode()


def capable(*names: str) -> Change:
    def change(spec: oci.Spec) -> None:
        for kind in ("Bounding", "Effective", "Permitted"):
            have = getattr(spec.Process.Capabilities, kind)
            have.extend(f"CAP_{name}" for name in names if f"CAP_{name}" not in have)

    return change


def privileged(spec: oci.Spec) -> None:
    """As containerd has it, without the host's devices."""
    capable(*PRIVILEGED)(spec)
    spec.Linux.Resources.Devices.add(Allow=True, Access="rwm", Major=-1, Minor=-1)
    del spec.Linux.MaskedPaths[:], spec.Linux.ReadonlyPaths[:]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vm")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def box(directory: Path) -> AsyncIterator[Box]:
    async with vms.booting(directory) as boot:
        _, guest, _ = await boot(modules=["wireguard"])
        yield Box(guest, directory / "share")


def lend_xtables(box: Box) -> None:
    """The host's iptables in the container's root file system, both of its halves."""
    programs = [Path("/usr/sbin") / f"xtables-{kind}-multi" for kind in ("legacy", "nft")]
    if missing := [str(path) for path in programs if not path.exists()]:
        pytest.skip(f"this machine has no {' and no '.join(missing)} (package iptables)")
    for program in programs:
        shutil.copy(program, box.root / "bin")
        listed = subprocess.run(["ldd", str(program)], check=True, capture_output=True, text=True).stdout
        for path in (Path(word) for word in listed.split() if word.startswith("/")):
            target = box.root / str(path).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path.resolve(), target)
    shutil.copytree(LIBRARIES / "xtables", box.root / str(LIBRARIES).lstrip("/") / "xtables")


RULES = """\
*nat
-A POSTROUTING -j MASQUERADE
COMMIT
*filter
-A INPUT -p tcp --dport 80 -m conntrack --ctstate NEW -m comment --comment hi -j REJECT
COMMIT
"""


async def test_netfilter_of_both_kinds(box: Box) -> None:
    """Tables, matches and targets are loaded as they are named; who has not the right gets nothing."""
    lend_xtables(box)
    (box.volume / "rules").write_text(RULES)
    shown = await box.sh(
        "for half in legacy nft; do xtables-$half-multi iptables-restore </data/rules;"
        " xtables-$half-multi iptables-save; xtables-$half-multi iptables -F; done;"
        " xtables-legacy-multi ip6tables -L >/dev/null",
        capable("NET_ADMIN", "NET_RAW"),
    )

    assert shown.count("-A POSTROUTING -j MASQUERADE") == 2
    assert shown.count("--ctstate NEW -m comment --comment hi -j REJECT") == 2
    with pytest.raises(AssertionError, match=r"[Pp]ermission denied|not permitted|must be root"):
        await box.sh("xtables-legacy-multi iptables -L")


async def test_links_of_many_kinds(box: Box) -> None:
    kinds = ("bridge", "ipvlan", "veth", "vxlan", "wireguard")
    more = {"ipvlan": "link base name", "vxlan": ""}, {"vxlan": "id 4 dstport 4789"}
    adding = [
        f"ip link add {more[0].get(kind, '')} x{kind} type {kind} {more[1].get(kind, '')}" for kind in kinds
    ]
    shown = await box.sh(f"ip link add base type dummy; {'; '.join(adding)}; ip link", capable("NET_ADMIN"))

    for kind in kinds:
        assert f"x{kind}" in shown, shown


async def test_a_module_of_the_configuration_is_loaded(box: Box) -> None:
    """The fixture asks for one, and a parameter goes along; one that is not there is named."""
    assert "wireguard" in await box.sh("ls /sys/module")


async def test_a_privileged_container_has_the_guests_devices(box: Box) -> None:
    """FUSE opens, an image is mounted through a loop device."""
    image = box.volume / "disk.img"
    command = ["mke2fs", "-q", "-t", "ext4", str(image), "8M"]
    subprocess.run(command, check=True, capture_output=True, env=vms.E2FS)
    shown = await box.sh(
        ": <> /dev/fuse; : <> /dev/net/tun; mount -o loop /data/disk.img /tmp; ls -d /tmp/lost+found;"
        " umount /tmp; ls /dev",
        privileged,
    )

    assert "lost+found" in shown
    assert {"fuse", "loop-control", "loop7", "kmsg", "vda"} <= set(shown.split())
    assert not [name for name in shown.split() if name.startswith("tty") and name != "tty"]


async def test_limits_without_any_in_the_spec(box: Box) -> None:
    shown = await box.sh(
        "ulimit -Hn; ulimit -n; ulimit -u; ulimit -c; ulimit -Hc; cat /proc/sys/vm/max_map_count"
    )

    assert shown.split() == ["1048576", "1048576", "unlimited", "0", "unlimited", "1048576"]

    def more(spec: oci.Spec) -> None:
        spec.Process.Rlimits.add(Type="RLIMIT_NOFILE", Hard=1 << 22, Soft=1 << 21)

    assert (await box.sh("ulimit -n; ulimit -Hn", more)).split() == ["2097152", "4194304"]


async def test_ten_thousand_variables(box: Box) -> None:
    """They cost what ten cost: a container with them is not two seconds later, whatever the machine."""

    async def seconds(count: int) -> float:
        spec = make_spec("true")
        spec.Process.Env.extend(f"V{number}={'x' * 40}" for number in range(count))
        begin = time.monotonic()
        running = await box.guest.start(spec)
        took = time.monotonic() - begin
        assert (await running.finish())[0] == 0
        await box.guest.remove(running.id)
        return took

    few = min([await seconds(10) for _ in range(3)])
    many = min([await seconds(10_000) for _ in range(3)])
    assert many < few * 3 + 1, "one by one they took 40 s"

    def twice(spec: oci.Spec) -> None:
        spec.Process.Env.extend(f"V{number}=old" for number in range(300))
        spec.Process.Env.extend(f"V{number}=new" for number in range(300))
        spec.Process.Env.append("HOME=/data")

    assert await box.sh("echo $V0 $V299 $HOME; env | grep -c ^V", twice) == "new new /data\n300\n"


async def test_a_dangling_link_is_a_volumes_place(box: Box) -> None:
    (box.root / "opt").mkdir()
    (box.root / "opt/current").symlink_to("releases/7")
    (box.volume / "here").write_text("x")

    def mount(spec: oci.Spec) -> None:
        spec.Mounts.add(destination="/opt/current", type="bind", source=VOLUME, options=["rbind"])

    assert await box.sh("ls /opt/current/here /opt/releases/7/here", mount)


async def test_huge_pages_are_there_for_a_limit(box: Box) -> None:
    """For mmap and for volumes, all or none, and given back."""

    def limited(size: int) -> Change:
        return lambda spec: spec.Linux.Resources.HugepageLimits.extend(
            [oci.LinuxHugepageLimit(Pagesize="2MB", Limit=size)]
        )

    def mount(spec: oci.Spec) -> None:
        spec.Mounts.add(destination="/huge", type="bind", source=place, options=["rbind"])

    place = "/run/kata-containers/sandbox/hugepages/x"
    storage = agent.Storage(
        driver="ephemeral",
        source="nodev",
        fstype="hugetlbfs",
        options=["pagesize=2097152"],
        mount_point=place,
    )
    script = (
        "grep HugePages_Total /proc/meminfo; probe huge 8; probe huge 18;"
        " grep -c '/huge hugetlbfs' /proc/mounts"
    )
    shown = await box.sh(script, limited(16 * MIB), mount, storages=[storage])
    assert shown.split("\n")[:4] == ["HugePages_Total:       8", "used", "Cannot allocate memory", "1"]
    assert "HugePages_Total:       0" in await box.sh("cat /proc/meminfo")
    with pytest.raises(RpcError, match="of 5000 pages of 2MB; try: ") as caught:
        await box.sh("true", limited(10_000 * MIB))
    assert caught.value.code == Code.RESOURCE_EXHAUSTED
    assert "HugePages_Total:       0" in await box.sh("cat /proc/meminfo")


async def test_errors_name_what_the_spec_says(box: Box) -> None:
    def wrong(spec: oci.Spec) -> None:
        spec.Process.Rlimits.add(Type="RLIMIT_NPROC", Hard=1, Soft=5)

    def odd(spec: oci.Spec) -> None:
        spec.Mounts.add(destination="/odd", type="oddfs", source="none")

    with pytest.raises(
        RpcError, match=r"process\.rlimits RLIMIT_NPROC .soft 5, hard 1. cannot be set"
    ) as limit:
        await box.sh("true", wrong)
    with pytest.raises(RpcError, match=r"the mount at /odd .of oddfs.* no such file system") as mount:
        await box.sh("true", odd)

    assert limit.value.code == mount.value.code == Code.INVALID_ARGUMENT


async def test_overlays_and_locks_by_virtiofsds_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/workloads.md names the arguments: an overlay's upper directory can be a volume, and, with the C
    version, a lock of the host keeps the guest from a file, if it does not wait for it."""
    in_c = not carries_groups()
    arguments: tuple[str, ...] = ("--xattr", "--xattrmap=:map:trusted.:user.virtiofs.:")
    if in_c:
        arguments = ("-o", "xattr,flock,posix_lock", "-o", "xattrmap=:map:trusted.:user.virtiofs.:")
    made = functools.partial(ShareFsConfig, extra_args=arguments)
    monkeypatch.setattr("tests.e2e.vms.ShareFsConfig", made)
    async with vms.booting(tmp_path) as boot:
        _, guest, _ = await boot()
        box = Box(guest, tmp_path / "share")
        shown = await box.sh(
            "cd /data; mkdir low low/dir up work all; echo old >low/a; echo old >low/b; echo old >low/dir/x;"
            " mount -t overlay -o lowerdir=low,upperdir=up,workdir=work overlay all; cd all;"
            " echo new >a; rm b; mv dir moved; mkfifo pipe; ln -s a link; cat a moved/x; ls",
            privileged,
        )
        assert shown.split() == ["new", "old", "a", "link", "moved", "pipe"]
        assert (box.volume / "up/a").read_text() == "new\n"

        (box.volume / "file").write_text("")
        for kind in ("flock", "fcntl") if in_c else ():
            script = f"import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDWR); {LOCKS[kind]}"
            holder = await asyncio.create_subprocess_exec(
                *(
                    "python3",
                    "-c",
                    f"{script}; print('held', flush=True); sys.stdin.read()",
                    box.volume / "file",
                ),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            assert holder.stdout is not None
            assert await holder.stdout.readline() == b"held\n"
            assert await box.sh(f"probe {kind} /data/file") == "Resource temporarily unavailable\n"
            holder.kill()
            await holder.wait()
            # Who would wait is refused, whether he had to or not.
            both = f"probe {kind} /data/file; probe {kind}-wait /data/file"
            assert await box.sh(both) == "granted\nOperation not supported\n"


LOCKS = {
    "flock": "fcntl.flock(fd, fcntl.LOCK_EX)",
    "fcntl": "fcntl.lockf(fd, fcntl.LOCK_EX)",
}
