"""Each field of the OCI spec does in the VM what it does under runc, measured from within the container.

One container has all that one process can show of itself; its script prints the facts, and each test
asserts on its own. What needs limits or devices of its own are containers of one pod, in one VM.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from testing.api import Api, Task
from testing.containerd import Containerd
from testing.guest import write_configuration

BUSYBOX = "local/busybox:1"
MIB = 1 << 20

Spec = dict[str, Any]
Change = Callable[[Spec], None]


class Maker:
    """Creates containers whose spec a test has edited, and removes them at the end."""

    def __init__(self, containerd: Containerd, api: Api, runtime: str) -> None:
        self.containerd, self.api, self.runtime = containerd, api, runtime
        self.names: list[str] = []

    def create(self, change: Change, *command: str, options: tuple[str, ...] = ()) -> Task:
        """A created task."""
        name = self.containerd.new_id("oci")
        self.names.append(name)
        self.containerd.ctr("container", "create", "--runtime", self.runtime, *options, BUSYBOX, name)

        def edit(spec: Spec) -> None:
            spec["process"]["args"] = list(command)
            change(spec)

        self.api.patch_spec(name, edit)
        return self.api.task(name)

    def run(self, change: Change, *command: str, options: tuple[str, ...] = ()) -> Done:
        """Run a container to its end."""
        task = self.create(change, *command, options=options)
        task.start()
        done = Done(task)
        task.delete()
        return done

    def close(self) -> None:
        """Remove all, the first one last."""
        for name in reversed(self.names):
            self.containerd.remove(name)


class Done:
    """A finished process: its exit code and its streams as text."""

    def __init__(self, task: Task) -> None:
        self.code = task.wait()
        out, err = task.io.finish(60)
        self.out, self.err = out.decode(), err.decode()

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


class Pod(Maker):
    """A sandbox whose first container sleeps; what it creates belongs to it."""

    def __init__(self, containerd: Containerd, api: Api, runtime: str) -> None:
        super().__init__(containerd, api, runtime)
        self._kind = "sandbox"
        self.create(lambda _: None, "sleep", "100000").start()
        self._kind = "container"

    def create(self, change: Change, *command: str, options: tuple[str, ...] = ()) -> Task:
        """One more container of the pod."""

        def edit(spec: Spec) -> None:
            annotations = spec.setdefault("annotations", {})
            annotations["io.kubernetes.cri.container-type"] = self._kind
            annotations["io.kubernetes.cri.sandbox-id"] = self.names[0]
            change(spec)

        return super().create(edit, *command, options=options)


@pytest.fixture(scope="module")
def pod(containerd: Containerd, api: Api, runtime: str) -> Iterator[Pod]:
    made = Pod(containerd, api, runtime)
    yield made
    made.close()


def mount_cgroup(spec: Spec) -> None:
    options = ["ro", "nosuid", "noexec", "nodev"]
    spec["mounts"].append(
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options}
    )


def limited(**resources: Any) -> Change:
    """linux.resources with these fields, and the container's own cgroup to look at."""

    def change(spec: Spec) -> None:
        mount_cgroup(spec)
        spec["linux"].setdefault("resources", {}).update(resources)

    return change


def capable(*names: str) -> dict[str, list[str]]:
    caps = [f"CAP_{name}" for name in names]
    return {"bounding": caps, "effective": caps, "permitted": caps}


# --- one process with everything ------------------------------------------------------------------

FACTS = r"""
fact() { echo "--- $1"; shift; "$@" 2>&1; }
fact status cat /proc/self/status
fact oom cat /proc/self/oom_score_adj
fact limits cat /proc/self/limits
fact machine uname -m
fact hostname hostname
fact domainname cat /proc/sys/kernel/domainname
fact directory pwd
fact mkdir mkdir /tmp/x
fact chmod chmod 700 /tmp
fact version wc -c /proc/version
fact group wc -c /etc/group
fact write_sys sh -c 'echo 1 > /proc/sys/kernel/shm_rmid_forced'
fact write_home touch /home/x
fact mounts cat /proc/self/mountinfo
fact dev ls -ln /dev /dev/net
fact fuse_read sh -c ': < /dev/fuse && echo done'
fact fuse_write sh -c ': > /dev/fuse'
fact tun sh -c ': <> /dev/net/tun && echo done'
fact null sh -c 'echo > /dev/null && echo done'
fact sysctl sh -c 'cd /proc/sys; cat kernel/shm_rmid_forced kernel/msgmax fs/mqueue/queues_max \
    net/ipv4/ip_unprivileged_port_start'
fact personality cat /proc/self/personality
fact cgroup cat /proc/self/cgroup
fact namespaces ls /proc/self/ns
fact files sh -c 'umask; touch /tmp/made; stat -c %a:%u:%g /tmp/made'
"""


def everything(spec: Spec) -> None:
    spec["hostname"] = "hosty"
    spec["domainname"] = "dom.test"
    process = spec["process"]
    process["user"] = {"uid": 1000, "gid": 1001, "additionalGids": [5, 6000], "umask": 0o027}
    process["cwd"] = "/tmp"
    process["capabilities"] = {
        "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"],
        "effective": ["CAP_KILL", "CAP_NET_BIND_SERVICE"],
        "permitted": ["CAP_KILL", "CAP_NET_BIND_SERVICE"],
        "inheritable": ["CAP_NET_BIND_SERVICE"],
        "ambient": ["CAP_NET_BIND_SERVICE"],
    }
    process["noNewPrivileges"] = True
    process["oomScoreAdj"] = 321
    process["rlimits"] = [
        {"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512},
        {"type": "RLIMIT_CORE", "hard": 0, "soft": 0},
        {"type": "RLIMIT_FSIZE", "hard": 1 << 30, "soft": 1 << 20},
    ]
    linux = spec["linux"]
    linux["personality"] = {"domain": "LINUX32"}
    linux["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
            {"names": ["chmod", "fchmodat", "fchmodat2"], "action": "SCMP_ACT_ERRNO"},
        ],
    }
    linux["maskedPaths"] = ["/proc/version", "/etc/group"]
    linux["readonlyPaths"] = ["/proc/sys", "/home"]
    linux["rootfsPropagation"] = "shared"
    linux["devices"] = [
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666},
        {"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o666},
        {"path": "/dev/pipe", "type": "p", "fileMode": 0o640, "uid": 7, "gid": 8},
    ]
    linux["resources"] = {
        "devices": [
            {"allow": False, "access": "rwm"},
            {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"},
            {"allow": True, "type": "c", "major": 10, "minor": 229, "access": "r"},
            {"allow": True, "type": "c", "major": 10, "minor": 200, "access": "rwm"},
        ]
    }
    linux["sysctl"] = {
        "kernel.shm_rmid_forced": "1",
        "kernel.msgmax": "4096",
        "fs.mqueue.queues_max": "17",
        "net.ipv4.ip_unprivileged_port_start": "80",
    }


@pytest.fixture(scope="module")
def facts(containerd: Containerd, api: Api, runtime: str) -> dict[str, str]:
    """What the process of `everything` sees, by the names in `FACTS`; runc lacks what it has not here."""

    def change(spec: Spec) -> None:
        everything(spec)
        if "kata" not in runtime:
            del spec["domainname"]  # runc 1.1 does not know it

    maker = Maker(containerd, api, runtime)
    done = maker.run(change, "sh", "-c", FACTS)
    maker.close()
    found: dict[str, str] = {}
    for part in ("\n" + done.out).split("\n--- ")[1:]:
        name, _, text = part.partition("\n")
        found[name] = text.strip()
    return found


def status(facts: dict[str, str], key: str) -> list[str]:
    return next(line.split()[1:] for line in facts["status"].splitlines() if line.startswith(key + ":"))


def test_uid_gid_and_additional_gids(facts: dict[str, str]) -> None:
    assert status(facts, "Uid") == ["1000"] * 4
    assert status(facts, "Gid") == ["1001"] * 4
    assert set(status(facts, "Groups")) >= {"5", "6000"}


def test_the_umask(facts: dict[str, str]) -> None:
    assert facts["files"].splitlines() == ["0027", "640:1000:1001"]


CAP_CHOWN, CAP_KILL, CAP_NET_BIND_SERVICE = (1 << number for number in (0, 5, 10))


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("CapBnd", CAP_CHOWN | CAP_KILL | CAP_NET_BIND_SERVICE),
        ("CapInh", CAP_NET_BIND_SERVICE),
        ("CapAmb", CAP_NET_BIND_SERVICE),
        # Of a user who is not root only what is ambient survives the exec (capabilities(7)).
        ("CapPrm", CAP_NET_BIND_SERVICE),
        ("CapEff", CAP_NET_BIND_SERVICE),
    ],
)
def test_the_five_sets_of_capabilities(facts: dict[str, str], kind: str, wanted: int) -> None:
    assert int(status(facts, kind)[0], 16) == wanted


def test_no_new_privileges(facts: dict[str, str]) -> None:
    assert status(facts, "NoNewPrivs") == ["1"]


def test_the_seccomp_filter_gives_the_errno_it_says(facts: dict[str, str]) -> None:
    assert status(facts, "Seccomp") == ["2"]
    assert "No space left on device" in facts["mkdir"]
    assert "Operation not permitted" in facts["chmod"]


def test_the_oom_score(facts: dict[str, str]) -> None:
    assert facts["oom"] == "321"


@pytest.mark.parametrize(
    ("name", "soft", "hard"),
    [("Max open files", "512", "1024"), ("Max core file size", "0", "0"),
     ("Max file size", "1048576", "1073741824")],
)  # fmt: skip
def test_rlimits(facts: dict[str, str], name: str, soft: str, hard: str) -> None:
    line = next(line for line in facts["limits"].splitlines() if line.startswith(name))
    assert line[len(name) :].split()[:2] == [soft, hard]


def test_the_working_directory_and_host_name(facts: dict[str, str]) -> None:
    assert facts["directory"] == "/tmp"
    assert facts["hostname"] == "hosty"


@pytest.mark.kata_only
def test_the_domain_name(facts: dict[str, str]) -> None:
    assert facts["domainname"] == "dom.test"


@pytest.mark.kata_only
def test_the_personality(facts: dict[str, str]) -> None:
    # runc 1.1, Debian's, does not know this field and leaves it out in silence.
    assert facts["machine"] == "i686"
    assert int(facts["personality"], 16) == 8


def test_masked_paths_are_empty(facts: dict[str, str]) -> None:
    assert facts["version"].split()[0] == "0"
    assert facts["group"].split()[0] == "0"


def test_read_only_paths_refuse_writes(facts: dict[str, str]) -> None:
    assert "Read-only file system" in facts["write_sys"]
    assert "Read-only file system" in facts["write_home"]


@pytest.mark.kata_only
def test_the_root_is_shared_as_asked(facts: dict[str, str]) -> None:
    root = next(line for line in facts["mounts"].splitlines() if line.split()[4] == "/")
    assert any(field.startswith("shared:") for field in root.split())


def test_device_nodes_have_number_mode_and_owner(facts: dict[str, str]) -> None:
    nodes = {line.split()[-1]: line.split() for line in facts["dev"].splitlines() if len(line.split()) > 8}
    assert nodes["fuse"][0] == "crw-rw-rw-"
    assert nodes["fuse"][4:6] == ["10,", "229"]
    assert nodes["tun"][4:6] == ["10,", "200"]
    assert nodes["pipe"][0] == "prw-r-----"
    assert nodes["pipe"][2:4] == ["7", "8"]


@pytest.mark.kata_only
def test_devices_are_the_guests(facts: dict[str, str]) -> None:
    """runc makes the nodes likewise, but the host that runs this test may have no such devices."""
    assert facts["fuse_read"] == "done"
    assert facts["tun"] == "done"


def test_device_rules_are_enforced(facts: dict[str, str]) -> None:
    assert "Operation not permitted" in facts["fuse_write"]
    assert facts["null"] == "done"


def test_sysctls_of_the_containers_namespaces(facts: dict[str, str]) -> None:
    assert facts["sysctl"].split() == ["1", "4096", "17", "80"]


@pytest.mark.kata_only
def test_the_cgroup_is_its_own_root(facts: dict[str, str]) -> None:
    assert facts["cgroup"] == "0::/"


# --- limits, measured ------------------------------------------------------------------------------

CGROUP_FACTS = """
cd /sys/fs/cgroup
for file in memory.max memory.low memory.swap.max memory.high cpu.max cpu.max.burst cpu.weight pids.max \
    cpuset.cpus cpuset.mems hugetlb.2MB.max cgroup.max.depth io.max; do echo "$file=$(cat $file)"; done
"""


@pytest.fixture(scope="module")
def written(pod: Pod) -> dict[str, str]:
    """The files of a cgroup with a limit of every kind."""
    change = limited(
        memory={"limit": 64 * MIB, "reservation": 32 * MIB, "swap": 96 * MIB},
        cpu={"shares": 512, "quota": 20000, "period": 50000, "burst": 5000, "cpus": "0", "mems": "0"},
        pids={"limit": 50},
        hugepageLimits=[{"pageSize": "2MB", "limit": 4 * MIB}, {"pageSize": "64GB", "limit": 0}],
        unified={"memory.high": str(60 * MIB), "cgroup.max.depth": "3", "io.max": "254:0 rbps=1048576"},
    )
    done = pod.run(change, "sh", "-c", CGROUP_FACTS)
    return dict(line.partition("=")[::2] for line in done.lines)


@pytest.mark.kata_only
@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("memory.max", str(64 * MIB)),
        ("memory.low", str(32 * MIB)),
        ("memory.swap.max", str(32 * MIB)),
        ("memory.high", str(60 * MIB)),
        ("cpu.max", "20000 50000"),
        ("cpu.max.burst", "5000"),
        ("cpu.weight", "20"),
        ("cpuset.cpus", "0"),
        ("cpuset.mems", "0"),
        ("pids.max", "50"),
        ("hugetlb.2MB.max", str(4 * MIB)),
        ("cgroup.max.depth", "3"),
        ("io.max", "254:0 rbps=1048576 wbps=max riops=max wiops=max"),
    ],
)
def test_limits_are_in_the_guests_cgroup(written: dict[str, str], file: str, value: str) -> None:
    assert written[file] == value


@pytest.mark.kata_only
def test_the_cpu_quota_holds(pod: Pod) -> None:
    """A fifth of a CPU: of all the time that passes while it spins it gets about that, and is throttled."""
    script = """
    cd /sys/fs/cgroup
    spin() { i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; }
    used() { sed -n 's/^usage_usec //p;s/^nr_throttled //p' cpu.stat; cut -d' ' -f1 /proc/uptime; }
    spin; used
    until [ $(sed -n 's/^nr_throttled //p' cpu.stat) -ge 15 ]; do spin; done
    used
    """
    done = pod.run(limited(cpu={"quota": 20000, "period": 100000}), "sh", "-c", script)
    first, second = ([float(word) for word in done.lines[at : at + 3]] for at in (0, 3))
    share = (second[0] - first[0]) / 1e6 / (second[2] - first[2])
    assert second[1] >= 15
    assert share < 0.3, f"{share:.0%} of a CPU"


def test_memory_below_the_limit_is_granted_and_above_it_is_not(pod: Pod) -> None:
    # What lies in a tmpfs cannot be given back, as there is no swap.
    script = "cd /dev/shm; dd if=/dev/zero of=file bs=1M count=24 && echo all; du -m file; rm file"
    change = limited(memory={"limit": 32 * MIB, "swap": 32 * MIB})
    below = pod.run(change, "sh", "-c", script)
    above = pod.run(change, "sh", "-c", script.replace("24", "48"))
    assert below.lines == ["all", "24\tfile"]
    assert "all" not in above.lines
    assert 24 <= int(above.lines[0].split()[0]) <= 32
    assert "Killed" in above.err


def test_the_pids_limit_stops_forks(pod: Pod) -> None:
    script = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 60 & echo $i; done"
    done = pod.run(limited(pids={"limit": 8}), "sh", "-c", script)
    assert 5 <= len(done.lines) <= 7, done.out
    assert "can't fork" in done.err


# --- seccomp, devices, capabilities ---------------------------------------------------------------


def test_containerds_default_profile_is_applied(pod: Pod) -> None:
    script = "grep Seccomp: /proc/self/status; unshare -U true; echo $?; chroot / true; echo $?"
    done = pod.run(lambda _: None, "sh", "-c", script, options=("--seccomp",))
    assert [line.split()[-1] for line in done.lines] == ["2", "1", "0"]
    assert "Operation not permitted" in done.err
    without = pod.run(lambda _: None, "sh", "-c", script)
    assert [line.split()[-1] for line in without.lines] == ["0", "0", "0"]


def test_the_default_errno_of_a_profile(pod: Pod) -> None:
    def change(spec: Spec) -> None:
        spec["linux"]["seccomp"]["defaultErrnoRet"] = 38

    done = pod.run(change, "unshare", "-U", "true", options=("--seccomp",))
    assert done.code == 1
    assert "Function not implemented" in done.err


@pytest.mark.kata_only
def test_the_configuration_turns_seccomp_off(containerd: Containerd, runtime: str, tmp_path: Path) -> None:
    file = write_configuration(tmp_path / "c.toml", {"runtime": {"disable_guest_seccomp": True}})
    done = containerd.run(
        BUSYBOX, "grep", "Seccomp:", "/proc/self/status",
        runtime=runtime, options=("--seccomp", "--runtime-config-path", str(file)),
    )  # fmt: skip
    assert done.text.split() == ["Seccomp:", "0"]


def raw_devices(spec: Spec) -> None:
    spec["process"]["capabilities"] = capable("MKNOD", "SYS_ADMIN", "CHOWN")


SCRIPT_KMSG = "mknod /dev/own c 1 11 && echo made >&2 && (: < /dev/own) && echo opened"


def test_default_rules_keep_devices_closed_to_who_can_make_nodes(pod: Pod) -> None:
    done = pod.run(raw_devices, "sh", "-c", SCRIPT_KMSG)
    assert done.out == ""
    assert "made" in done.err
    assert "Operation not permitted" in done.err


def test_device_nodes_are_there_without_a_dev_of_memory(pod: Pod) -> None:
    """Without a mount at /dev, and at a path elsewhere: also where the root file system can hold no nodes."""

    def change(spec: Spec) -> None:
        spec["mounts"] = [mount for mount in spec["mounts"] if not mount["destination"].startswith("/dev")]
        elsewhere = {"path": "/nodes/below/zero", "type": "c", "major": 1, "minor": 5}
        spec["linux"].setdefault("devices", []).append(elsewhere | {"fileMode": 0o640, "uid": 7, "gid": 8})

    script = (
        "echo x >/dev/null && head -c 3 /nodes/below/zero | wc -c && head -c 2 /dev/urandom | wc -c;"
        "stat -c '%F %a %u %g %t %T' /nodes/below/zero /dev/null /dev/tty"
    )
    assert pod.run(change, "sh", "-c", script).lines == [
        *("3", "2"),
        "character special file 640 7 8 1 5",
        "character special file 666 0 0 1 3",
        "character special file 666 0 0 5 0",
    ]


def test_a_rule_for_all_devices_opens_them(pod: Pod) -> None:
    def change(spec: Spec) -> None:
        raw_devices(spec)
        spec["process"]["capabilities"] = capable("MKNOD", "SYS_ADMIN", "SYSLOG")
        spec["linux"]["resources"]["devices"] = [{"allow": True, "access": "rwm"}]

    assert pod.run(change, "sh", "-c", SCRIPT_KMSG).lines == ["opened"]


@pytest.mark.kata_only
def test_a_privileged_container_has_the_guests_devices(pod: Pod) -> None:
    """Its spec lists whatever this host has; what the guest lacks is left out."""

    def change(spec: Spec) -> None:
        spec["linux"]["devices"] += [
            {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
            {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
            {"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232},
        ]

    done = pod.run(change, "ls", "/dev", options=("--privileged",))
    assert {"fuse", "null", "kmsg"} <= set(done.lines)
    assert not {"sda", "kvm"} & set(done.lines)


def test_privileges_are_not_limited_where_nobody_asks(pod: Pod) -> None:
    def change(spec: Spec) -> None:
        spec["process"]["capabilities"] = capable("SYS_ADMIN")
        spec["process"]["noNewPrivileges"] = False

    script = (
        "mount -t tmpfs none /home && grep -c ' /home tmpfs' /proc/mounts; grep NoNewPrivs /proc/self/status"
    )
    done = pod.run(change, "sh", "-c", script)
    assert [line.split()[-1] for line in done.lines] == ["1", "0"]


def test_a_user_namespace_maps_its_root(pod: Pod) -> None:
    def change(spec: Spec) -> None:
        mapping = [{"containerID": 0, "hostID": 100000, "size": 65536}]
        spec["linux"]["namespaces"].append({"type": "user"})
        spec["linux"].update(uidMappings=mapping, gidMappings=mapping)

    script = "id -u; cat /proc/self/uid_map; stat -c %u /bin; touch /root/x"
    done = pod.run(change, "sh", "-c", script)
    assert [line.split() for line in done.lines] == [["0"], ["0", "100000", "65536"], ["65534"]]
    assert "Permission denied" in done.err


# --- execs -----------------------------------------------------------------------------------------


def test_an_exec_has_its_own_privileges_under_the_containers_filter(pod: Pod) -> None:
    def change(spec: Spec) -> None:
        rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}
        spec["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}

    task = pod.create(change, "sleep", "100000")
    task.start()
    script = "grep -E 'CapEff|NoNewPrivs|Groups|Seccomp:' /proc/self/status; mkdir /tmp/y 2>&1"
    fields = {
        "user": {"uid": 0, "gid": 0, "additionalGids": [77]},
        "capabilities": capable("KILL"),
        "noNewPrivileges": True,
    }
    process = task.exec("sh", "-c", script, exec_id="own", stdin=False, fields=fields)
    process.start()
    lines = Done(process).lines
    assert f"CapEff:\t{CAP_KILL:016x}" in lines
    assert "NoNewPrivs:\t1" in lines
    assert "Seccomp:\t2" in lines
    assert any(line.startswith("Groups:") and "77" in line.split() for line in lines)
    assert "No space left on device" in lines[-1]


@pytest.mark.kata_only
def test_an_exec_has_its_own_umask(pod: Pod) -> None:
    """runc 1.1 takes it from the spec of the container's init process only."""
    fields = {"user": {"uid": 0, "gid": 0, "umask": 0o077}}
    task = pod.create(lambda _: None, "sleep", "100000")
    task.start()
    process = task.exec("sh", "-c", "umask", exec_id="umask", stdin=False, fields=fields)
    process.start()
    assert Done(process).lines == ["0077"]


def test_keys_in_other_letters_are_the_same_keys(pod: Pod) -> None:
    """As runc's decoder has it: there is no second way into the spec."""

    def shout(value: Any, free: bool = False) -> Any:
        if isinstance(value, dict):
            return {
                key if free else key.upper(): shout(member, key in ("annotations", "sysctl"))
                for key, member in value.items()
            }
        return [shout(member) for member in value] if isinstance(value, list) else value

    def change(spec: Spec) -> None:
        spec["process"]["user"]["uid"] = 1234
        spec["hostname"] = "loud"
        loud = shout(spec)
        spec.clear()
        spec.update(loud)

    assert pod.run(change, "sh", "-c", "id -u; hostname").lines == ["1234", "loud"]


# --- refused, or told ------------------------------------------------------------------------------


def put(path: str, value: Any) -> Change:
    """Set the field at `path`, such as "linux.intelRdt"."""

    def change(spec: Spec) -> None:
        *steps, key = path.split(".")
        for step in steps:
            spec = spec.setdefault(step, {})
        spec[key] = value

    return change


def device(path: str, kind: str, major: int, minor: int) -> Change:
    return put("linux.devices", [{"path": path, "type": kind, "major": major, "minor": minor}])


@pytest.mark.kata_only
@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (put("linux.intelRdt", {"l3CacheSchema": "L3:0=ff"}), "UNIMPLEMENTED", "linux.intelRdt"),
        (put("process.scheduler", {"policy": "SCHED_FIFO"}), "UNIMPLEMENTED", "process.scheduler"),
        (put("process.ioPriority", {"class": "IOPRIO_CLASS_RT"}), "UNIMPLEMENTED", "process.ioPriority"),
        (put("linux.timeOffsets", {"boottime": {"secs": 9}}), "UNIMPLEMENTED", "linux.timeOffsets"),
        (put("linux.resources.rdma", {"mlx5_1": {"hcaHandles": 3}}), "UNIMPLEMENTED", "linux.resources.rdma"),
        (put("linux.resources.cpu", {"realtimeRuntime": 9}), "UNIMPLEMENTED", "cpu.realtimeRuntime"),
        (put("linux.seccomp", {"listenerPath": "/run/x"}), "UNIMPLEMENTED", "linux.seccomp.listenerPath"),
        (put("linux.rootfsPropagation", "fancy"), "INVALID_ARGUMENT", "linux.rootfsPropagation"),
        (device("/dev/sda", "b", 4000, 0), "FAILED_PRECONDITION", "/dev/sda"),
        (device("/dev/mine", "c", 241, 0), "UNIMPLEMENTED", "/dev/mine"),
        (device("/dev/kvm", "c", 10, 232), "INVALID_ARGUMENT", "/dev/kvm"),
        (put("linux.resources.unified", {"nosuch.max": "1"}), "INVALID_ARGUMENT", "nosuch"),
        (put("linux.sysctl", {"vm.swappiness": "1"}), "INVALID_ARGUMENT", "vm.swappiness"),
        (
            put("process.rlimits", [{"type": "RLIMIT_X", "soft": 1, "hard": 1}]),
            "INVALID_ARGUMENT",
            "RLIMIT_X",
        ),
        (put("hooks", {"createRuntime": [{"path": "x"}]}), "INVALID_ARGUMENT", "createRuntime[0].path"),
        (put("Hooks", {"CreateRuntime": [{"Path": "x"}]}), "INVALID_ARGUMENT", "createRuntime[0].path"),
        (put("LINUX", {}), "INVALID_ARGUMENT", "LINUX is there twice, the other one as linux"),
        (
            put("process.user.uid", 2**32 - 1),
            "INVALID_ARGUMENT",
            "process.user.uid must be an integer from 0",
        ),
        (put("process.env", "A=b"), "INVALID_ARGUMENT", "process.env must be a list, not a string"),
        (put("linux.resources.memory.limit", 1.5), "INVALID_ARGUMENT", "linux.resources.memory.limit"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(pod: Pod, change: Change, code: str, named: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        pod.create(change, "true")
    assert isinstance(caught.value, grpc.Call)
    if "unmarshal spec" in caught.value.details():  # containerd 2 reads the spec before us
        code, named = "UNKNOWN", named.split(maxsplit=1)[0]
    assert named in caught.value.details()
    assert caught.value.code().name == code


@pytest.mark.kata_only
def test_what_has_no_effect_is_in_the_log(pod: Pod, containerd: Containerd) -> None:
    def change(spec: Spec) -> None:
        spec["process"].update(apparmorProfile="a-profile", selinuxLabel="system_u:object_r:x:s0")
        spec["process"]["capabilities"]["bounding"].append("CAP_FLY")
        spec["linux"]["mountLabel"] = "system_u:object_r:x:s0"
        spec["linux"]["resources"].update(
            memory={"kernel": 1 << 30, "swappiness": 10}, network={"classID": 7}, blockIO={"weight": 100}
        )
        spec["process"]["fancy"] = True

    done = pod.run(change, "echo", "runs")
    assert done.lines == ["runs"]
    told = ""
    for line in containerd.log.read_text(errors="replace").splitlines():
        if "not passed to the guest" in line and pod.names[-1] in line:
            told += json.loads(line)["keys"]
    for key in ("process.apparmorProfile", "process.selinuxLabel", "process.capabilities.bounding CAP_FLY",
                "linux.mountLabel", "linux.resources.memory.kernel", "linux.resources.memory.swappiness",
                "linux.resources.network", "linux.resources.blockIO", "process.fancy"):  # fmt: skip
        assert key in told
