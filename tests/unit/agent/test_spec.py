"""The protobuf Spec becomes exactly the config.json that the host's spec was, field by field."""

from __future__ import annotations

import pytest

from agent.spec import cgroup_path, process_json, resources_json, spec_json
from proto import oci_pb2
from ttrpc import Code, RpcError


def _full() -> oci_pb2.Spec:
    spec = oci_pb2.Spec(Version="1.1.0", Hostname="box")
    process = spec.Process
    process.Terminal = True
    process.ConsoleSize.Height, process.ConsoleSize.Width = 24, 80
    process.User.UID, process.User.GID = 1000, 100
    process.User.AdditionalGids.extend((4, 27))
    process.User.Username = "joe"
    process.Args.extend(("sh", "-c", "true"))
    process.Env.extend(("PATH=/bin", "A=b=c"))
    process.Cwd = "/work"
    process.Capabilities.Bounding.append("CAP_KILL")
    process.Capabilities.Effective.append("CAP_CHOWN")
    process.Capabilities.Inheritable.append("CAP_FOWNER")
    process.Capabilities.Permitted.append("CAP_SETUID")
    process.Capabilities.Ambient.append("CAP_SETGID")
    process.Rlimits.add(Type="RLIMIT_NOFILE", Hard=4096, Soft=1024)
    process.NoNewPrivileges = True
    process.OOMScoreAdj = -998
    spec.Root.Path, spec.Root.Readonly = "/run/rootfs", True
    spec.Mounts.add(destination="/proc", type="proc", source="proc", options=["nosuid"])
    spec.Hooks.StartContainer.add(Path="/hook", Args=["hook", "a"], Env=["E=1"], Timeout=5)
    spec.Hooks.Prestart.add(Path="/host-hook")
    spec.Annotations["io.example"] = "yes"
    linux = spec.Linux
    linux.UIDMappings.add(HostID=1, ContainerID=2, Size=3)
    linux.GIDMappings.add(HostID=4, ContainerID=5, Size=6)
    linux.Sysctl["net.ipv4.ip_forward"] = "1"
    linux.CgroupsPath = "/default/box"
    linux.Namespaces.add(Type="pid")
    linux.Namespaces.add(Type="ipc", Path="/proc/1/ns/ipc")
    linux.Devices.add(Path="/dev/fuse", Type="c", Major=10, Minor=229, FileMode=0o666, UID=1, GID=2)
    linux.Devices.add(Path="/dev/fifo", Type="p")
    linux.RootfsPropagation = "slave"
    linux.MaskedPaths.append("/proc/kcore")
    linux.ReadonlyPaths.append("/proc/sys")
    seccomp = linux.Seccomp
    seccomp.DefaultAction = "SCMP_ACT_ERRNO"
    seccomp.Architectures.append("SCMP_ARCH_X86_64")
    seccomp.Flags.append("SECCOMP_FILTER_FLAG_LOG")
    call = seccomp.Syscalls.add(Names=["personality"], Action="SCMP_ACT_ALLOW")
    call.Args.add(Index=0, Value=8, ValueTwo=9, Op="SCMP_CMP_EQ")
    seccomp.Syscalls.add(Names=["clone3"], Action="SCMP_ACT_ERRNO", errnoret=0)
    return spec


def test_a_full_spec() -> None:
    expected = {
        "ociVersion": "1.0.2",  # of the file, whatever the sender's
        "hostname": "box",
        "process": {
            "terminal": True,
            "consoleSize": {"height": 24, "width": 80},
            "user": {"uid": 1000, "gid": 100, "additionalGids": [4, 27], "username": "joe"},
            "args": ["sh", "-c", "true"],
            "env": ["PATH=/bin", "A=b=c"],
            "cwd": "/work",
            "capabilities": {
                "bounding": ["CAP_KILL"],
                "effective": ["CAP_CHOWN"],
                "inheritable": ["CAP_FOWNER"],
                "permitted": ["CAP_SETUID"],
                "ambient": ["CAP_SETGID"],
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 4096, "soft": 1024}],
            "noNewPrivileges": True,
            "oomScoreAdj": -998,
        },
        "root": {"path": "/run/rootfs", "readonly": True},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]}],
        "hooks": {"startContainer": [{"path": "/hook", "args": ["hook", "a"], "env": ["E=1"], "timeout": 5}]},
        "annotations": {"io.example": "yes"},
        "linux": {
            "uidMappings": [{"hostID": 1, "containerID": 2, "size": 3}],
            "gidMappings": [{"hostID": 4, "containerID": 5, "size": 6}],
            "sysctl": {"net.ipv4.ip_forward": "1"},
            "cgroupsPath": "/default/box",
            "namespaces": [{"type": "pid"}, {"type": "ipc", "path": "/proc/1/ns/ipc"}],
            "devices": [
                {
                    "path": "/dev/fuse",
                    "type": "c",
                    "major": 10,
                    "minor": 229,
                    "fileMode": 0o666,
                    "uid": 1,
                    "gid": 2,
                },
                {"path": "/dev/fifo", "type": "p", "uid": 0, "gid": 0},
            ],
            "rootfsPropagation": "slave",
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": ["/proc/sys"],
            "seccomp": {
                "defaultAction": "SCMP_ACT_ERRNO",
                "architectures": ["SCMP_ARCH_X86_64"],
                "flags": ["SECCOMP_FILTER_FLAG_LOG"],
                "syscalls": [
                    {
                        "names": ["personality"],
                        "action": "SCMP_ACT_ALLOW",
                        "args": [{"index": 0, "value": 8, "valueTwo": 9, "op": "SCMP_CMP_EQ"}],
                    },
                    {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 0},
                ],
            },
        },
    }

    assert spec_json(_full()) == expected


def test_what_is_unset_stays_absent() -> None:
    spec = oci_pb2.Spec()
    spec.Process.Args.append("true")

    config = spec_json(spec)

    assert config["process"] == {
        "terminal": False,
        "user": {"uid": 0, "gid": 0},
        "args": ["true"],
        "env": [],
        "cwd": "/",
        "noNewPrivileges": False,
    }
    assert config["linux"] == {"namespaces": []}
    assert "hooks" not in config


def test_the_console_size_needs_a_terminal() -> None:
    process = oci_pb2.Process(ConsoleSize=oci_pb2.Box(Height=1, Width=1))

    assert "consoleSize" not in process_json(process)


def test_resources() -> None:
    resources = oci_pb2.LinuxResources()
    resources.Devices.add(Allow=False, Type="a", Access="rwm")
    resources.Devices.add(Allow=True, Type="c", Major=1, Minor=-1, Access="rw")
    resources.Memory.Limit, resources.Memory.Swap = 1 << 20, -1
    resources.CPU.Shares, resources.CPU.Quota, resources.CPU.Period = 512, -1, 100000
    resources.CPU.Cpus = "0-1"
    resources.Pids.Limit = 7
    resources.BlockIO.Weight = 10
    resources.BlockIO.WeightDevice.add(Major=8, Minor=0, Weight=3)
    resources.BlockIO.ThrottleReadBpsDevice.add(Major=8, Minor=0, Rate=4)
    resources.HugepageLimits.add(Pagesize="2MB", Limit=8)
    resources.Network.ClassID = 5
    resources.Network.Priorities.add(Name="eth0", Priority=1)

    assert resources_json(resources) == {
        "devices": [
            {"allow": False, "type": "a", "access": "rwm"},
            {"allow": True, "type": "c", "major": 1, "minor": -1, "access": "rw"},
        ],
        "memory": {"limit": 1 << 20, "swap": -1},
        "cpu": {"shares": 512, "quota": -1, "period": 100000, "cpus": "0-1"},
        "pids": {"limit": 7},
        "blockIO": {
            "weight": 10,
            "weightDevice": [{"major": 8, "minor": 0, "weight": 3}],
            "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 4}],
        },
        "hugepageLimits": [{"pageSize": "2MB", "limit": 8}],
        "network": {"classID": 5, "priorities": [{"name": "eth0", "priority": 1}]},
    }


@pytest.mark.parametrize(
    ("wanted", "path"),
    [
        ("", "/kata/c1"),
        ("/default/c1", "/default/c1"),
        ("kubepods/pod1/c1", "/kubepods/pod1/c1"),
        ("/../../etc/./c1", "/etc/c1"),
        ("../..", "/kata/c1"),
        ("system.slice:cri:c1", "/system.slice/cri/c1"),
    ],
)
def test_a_cgroup_path_stays_below_the_root(wanted: str, path: str) -> None:
    assert cgroup_path(wanted, "c1") == path


def test_words_of_katas_shims() -> None:
    """Kata 4.1.0's, as it sent them to our guest. crun left the capabilities out, without a word."""
    spec = oci_pb2.Spec()
    process, linux = spec.Process, spec.Linux
    process.Args.append("true")
    process.Capabilities.Bounding.extend(("AUDIT_WRITE", '"CAP_KILL"', "CAP_CHOWN"))
    for name in ("mnt", "net", "pid", "network", "mount"):
        linux.Namespaces.add(Type=name)
    linux.Seccomp.DefaultAction = "SCMP_ACT_ERRNO"
    linux.Seccomp.Syscalls.add(Names=["read"], Action="SCMP_ACT_ALLOW", errnoret=0)
    linux.Seccomp.Syscalls.add(Names=["bpf"], Action="SCMP_ACT_ERRNO", errnoret=1)
    linux.Resources.Devices.add(Allow=True, Type="c", Access="m")
    linux.Resources.Devices.add(Allow=True, Type="c", Access="rwm", Major=5, Minor=0)

    config = spec_json(spec)

    assert config["process"]["capabilities"]["bounding"] == ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_CHOWN"]
    types = [each["type"] for each in config["linux"]["namespaces"]]
    assert types == ["mount", "network", "pid", "network", "mount"]
    assert config["linux"]["seccomp"]["syscalls"] == [
        {"names": ["read"], "action": "SCMP_ACT_ALLOW"},
        {"names": ["bpf"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1},
    ]
    assert config["linux"]["resources"]["devices"] == [
        {"allow": True, "type": "c", "access": "m", "major": -1, "minor": -1},
        {"allow": True, "type": "c", "access": "rwm", "major": 5, "minor": 0},
    ]


def test_words_that_are_none_are_refused_by_name() -> None:
    """crun would leave out the capability, and name no field of either."""
    spec = oci_pb2.Spec()
    spec.Process.Capabilities.Effective.append("CAP_FLY")
    with pytest.raises(RpcError, match=r"process\.capabilities: 'CAP_FLY' is no capability") as unknown:
        spec_json(spec)
    assert unknown.value.code == Code.INVALID_ARGUMENT
    spec = oci_pb2.Spec()
    spec.Linux.Namespaces.add(Type="space")
    with pytest.raises(RpcError, match=r"linux\.namespaces: 'space' is no type of namespace"):
        spec_json(spec)
