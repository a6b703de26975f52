"""What each field of the OCI runtime spec must be, and how many entries its lists may have.

What: `FIELDS` has the kind of every field by its place (`linux.devices[].major`), `MOST` how many entries
every list and map may have, with the reason; `SPEC`, `PROCESS` and `RESOURCES` are made of the two: what a
config.json, an exec and an update are read with (`shim.spec.documents`).
Why one table: each place that read a field by itself took another type for granted, and what one forgot to
bound another went through in the square of it. What becomes of a field is `shim.spec.oci_fields`' to say.
Invariants: every field that Kata's protocol has is here with a range no wider than the protocol's; every list
has its number. docs/oci-spec.md has the numbers; tests compare.
Source: runtime-spec 1.2 (specs-go/config.go for the types); the kernel's limits where one is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shim.spec.shape import Flag, Integer, Kind, ListOf, MapOf, Opaque, Table, Text

__all__ = ["FIELDS", "MOST", "PROCESS", "RESOURCES", "SPEC"]

TEXT, FLAG, OPAQUE = Text(), Flag(), Opaque()
PATH = Text(longest=4095)  # PATH_MAX with its NUL
NAME = Text(longest=64)  # of a host, and of its domain: __NEW_UTS_LEN
U16, U32, U64 = (Integer(0, (1 << bits) - 1) for bits in (16, 32, 64))
I32, I64 = (Integer(-(1 << bits), (1 << bits) - 1) for bits in (31, 63))
#: 2^32-1 means "as it is" to setuid(2) and chown(2): who asks for it stays root.
ID = Integer(0, (1 << 32) - 2)
MAJOR, MINOR = Integer(0, (1 << 12) - 1), Integer(0, (1 << 20) - 1)  # the kernel's dev_t
ANY_MAJOR, ANY_MINOR = Integer(-1, MAJOR.high), Integer(-1, MINOR.high)
SECONDS = Integer(1, (1 << 31) - 1)
NAMESPACE = Text("pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time")

_STAGES = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
_CAPABILITIES = ("bounding", "effective", "inheritable", "permitted", "ambient")
_THROTTLES = ("ReadBps", "WriteBps", "ReadIOPS", "WriteIOPS")
_HOOK: Mapping[str, Kind] = {"path": PATH, "args[]": TEXT, "env[]": TEXT, "timeout": SECONDS}
_MAPPING: Mapping[str, Kind] = {"containerID": ID, "hostID": ID, "size": U32}

FIELDS: Mapping[str, Kind] = {
    "ociVersion": TEXT,
    "hostname": NAME,
    "domainname": NAME,
    "annotations{}": TEXT,
    "root.path": PATH,
    "root.readonly": FLAG,
    "process.terminal": FLAG,
    "process.consoleSize.height": U16,
    "process.consoleSize.width": U16,
    "process.user.uid": ID,
    "process.user.gid": ID,
    "process.user.umask": U32,
    "process.user.additionalGids[]": ID,
    "process.user.username": TEXT,
    "process.args[]": TEXT,
    "process.commandLine": TEXT,
    "process.env[]": TEXT,
    "process.cwd": PATH,
    **{f"process.capabilities.{kind}[]": TEXT for kind in _CAPABILITIES},
    "process.rlimits[].type": TEXT,
    "process.rlimits[].hard": U64,
    "process.rlimits[].soft": U64,
    "process.noNewPrivileges": FLAG,
    "process.apparmorProfile": TEXT,
    "process.oomScoreAdj": Integer(-1000, 1000),
    "process.selinuxLabel": TEXT,
    "process.scheduler.policy": TEXT,
    "process.scheduler.nice": I32,
    "process.scheduler.priority": I32,
    "process.scheduler.flags[]": TEXT,
    "process.scheduler.runtime": U64,
    "process.scheduler.deadline": U64,
    "process.scheduler.period": U64,
    "process.ioPriority.class": TEXT,
    "process.ioPriority.priority": I64,
    "process.execCPUAffinity.initial": TEXT,
    "process.execCPUAffinity.final": TEXT,
    "mounts[].destination": PATH,
    "mounts[].type": TEXT,
    "mounts[].source": PATH,
    "mounts[].options[]": TEXT,
    **{f"mounts[].uidMappings[].{key}": kind for key, kind in _MAPPING.items()},
    **{f"mounts[].gidMappings[].{key}": kind for key, kind in _MAPPING.items()},
    **{f"hooks.{stage}[].{key}": kind for stage in _STAGES for key, kind in _HOOK.items()},
    **{f"linux.uidMappings[].{key}": kind for key, kind in _MAPPING.items()},
    **{f"linux.gidMappings[].{key}": kind for key, kind in _MAPPING.items()},
    "linux.sysctl{}": TEXT,
    "linux.cgroupsPath": PATH,
    "linux.namespaces[].type": NAMESPACE,
    "linux.namespaces[].path": PATH,
    "linux.devices[].path": PATH,
    "linux.devices[].type": TEXT,
    "linux.devices[].major": MAJOR,
    "linux.devices[].minor": MINOR,
    "linux.devices[].fileMode": U32,
    "linux.devices[].uid": ID,
    "linux.devices[].gid": ID,
    "linux.netDevices{}.name": TEXT,
    "linux.rootfsPropagation": TEXT,
    "linux.maskedPaths[]": TEXT,
    "linux.readonlyPaths[]": TEXT,
    "linux.mountLabel": TEXT,
    "linux.intelRdt.closID": TEXT,
    "linux.intelRdt.schemata[]": TEXT,
    "linux.intelRdt.l3CacheSchema": TEXT,
    "linux.intelRdt.memBwSchema": TEXT,
    "linux.intelRdt.enableMonitoring": FLAG,
    "linux.memoryPolicy.mode": TEXT,
    "linux.memoryPolicy.nodes": TEXT,
    "linux.memoryPolicy.flags[]": TEXT,
    "linux.personality.domain": TEXT,
    "linux.personality.flags[]": TEXT,
    "linux.timeOffsets{}.secs": I64,
    "linux.timeOffsets{}.nanosecs": U32,
    "linux.seccomp.defaultAction": TEXT,
    "linux.seccomp.defaultErrnoRet": U32,
    "linux.seccomp.architectures[]": TEXT,
    "linux.seccomp.flags[]": TEXT,
    "linux.seccomp.listenerPath": PATH,
    "linux.seccomp.listenerMetadata": TEXT,
    "linux.seccomp.syscalls[].names[]": TEXT,
    "linux.seccomp.syscalls[].action": TEXT,
    "linux.seccomp.syscalls[].errnoRet": U32,
    "linux.seccomp.syscalls[].args[].index": U64,
    "linux.seccomp.syscalls[].args[].value": U64,
    "linux.seccomp.syscalls[].args[].valueTwo": U64,
    "linux.seccomp.syscalls[].args[].op": TEXT,
    "linux.resources.devices[].allow": FLAG,
    "linux.resources.devices[].type": TEXT,
    "linux.resources.devices[].major": ANY_MAJOR,
    "linux.resources.devices[].minor": ANY_MINOR,
    "linux.resources.devices[].access": TEXT,
    "linux.resources.memory.limit": I64,
    "linux.resources.memory.reservation": I64,
    "linux.resources.memory.swap": I64,
    "linux.resources.memory.kernel": I64,
    "linux.resources.memory.kernelTCP": I64,
    "linux.resources.memory.swappiness": U64,
    "linux.resources.memory.disableOOMKiller": FLAG,
    "linux.resources.memory.useHierarchy": FLAG,
    "linux.resources.memory.checkBeforeUpdate": FLAG,
    "linux.resources.cpu.shares": U64,
    "linux.resources.cpu.quota": I64,
    "linux.resources.cpu.burst": U64,
    "linux.resources.cpu.period": U64,
    "linux.resources.cpu.realtimeRuntime": I64,
    "linux.resources.cpu.realtimePeriod": U64,
    "linux.resources.cpu.cpus": TEXT,
    "linux.resources.cpu.mems": TEXT,
    "linux.resources.cpu.idle": I64,
    "linux.resources.pids.limit": I64,
    "linux.resources.blockIO.weight": U16,
    "linux.resources.blockIO.leafWeight": U16,
    "linux.resources.blockIO.weightDevice[].major": MAJOR,
    "linux.resources.blockIO.weightDevice[].minor": MINOR,
    "linux.resources.blockIO.weightDevice[].weight": U16,
    "linux.resources.blockIO.weightDevice[].leafWeight": U16,
    **{
        f"linux.resources.blockIO.throttle{what}Device[].{key}": kind
        for what in _THROTTLES
        for key, kind in {"major": MAJOR, "minor": MINOR, "rate": U64}.items()
    },
    "linux.resources.hugepageLimits[].pageSize": TEXT,
    "linux.resources.hugepageLimits[].limit": U64,
    "linux.resources.network.classID": U32,
    "linux.resources.network.priorities[].name": TEXT,
    "linux.resources.network.priorities[].priority": U32,
    "linux.resources.rdma{}.hcaHandles": U32,
    "linux.resources.rdma{}.hcaObjects": U32,
    "linux.resources.unified{}": TEXT,
    "solaris": OPAQUE,
    "windows": OPAQUE,
    "zos": OPAQUE,
    "freebsd": OPAQUE,
    "vm": OPAQUE,
}
"""Place -> kind. `[]` and `{}` stand for an entry of a list, of a map."""

_WORDS = "words of the whole, which has 4 MiB: more than the kernel takes for a program (2 MiB by default)"
_MAPPINGS = "the kernel takes 340 lines"
_PATHS = "each is a mount in the guest, as of mounts"
_BLOCK = "as of linux.devices"
_HOOKS = "each is a program of the host that Create waits for"

MOST: Mapping[str, tuple[int, str]] = {
    "annotations": (16_384, "Kubernetes has at most 256 KiB of them, 16 bytes each"),
    "process.args": (65_536, _WORDS),
    "process.env": (65_536, _WORDS),
    "process.user.additionalGids": (65_536, "NGROUPS_MAX"),
    **{f"process.capabilities.{kind}": (256, "there are 41") for kind in _CAPABILITIES},
    "process.rlimits": (64, "Linux has 16 kinds"),
    "process.scheduler.flags": (64, "there are 7"),
    "mounts": (1024, "each is a mount of the host, and a record of the journal"),
    "mounts.options": (256, "the kernel takes a page of them"),
    "mounts.uidMappings": (340, _MAPPINGS),
    "mounts.gidMappings": (340, _MAPPINGS),
    **{
        f"hooks.{stage}{key}": entry
        for stage in _STAGES
        for key, entry in {"": (64, _HOOKS), ".args": (65_536, _WORDS), ".env": (65_536, _WORDS)}.items()
    },
    "linux.uidMappings": (340, _MAPPINGS),
    "linux.gidMappings": (340, _MAPPINGS),
    "linux.sysctl": (1024, "Linux has about as many for namespaces"),
    "linux.namespaces": (8, "there are 8 kinds, each once"),
    "linux.devices": (8192, "a privileged container lists each node of the host"),
    "linux.netDevices": (256, "none is served"),
    "linux.maskedPaths": (1024, _PATHS),
    "linux.readonlyPaths": (1024, _PATHS),
    "linux.intelRdt.schemata": (64, "none is served"),
    "linux.memoryPolicy.flags": (64, "there are 3"),
    "linux.personality.flags": (64, "there are none so far"),
    "linux.timeOffsets": (64, "there are 2 clocks"),
    "linux.seccomp.architectures": (64, "there are 23"),
    "linux.seccomp.flags": (64, "there are 4"),
    "linux.seccomp.syscalls": (8192, "Linux has about 500 system calls, each with a few rules"),
    "linux.seccomp.syscalls.names": (4096, "Linux has about 500 system calls"),
    "linux.seccomp.syscalls.args": (64, "a system call has 6, each with a few comparisons"),
    "linux.resources.devices": (32_768, "four for each of linux.devices"),
    "linux.resources.blockIO.weightDevice": (8192, _BLOCK),
    **{f"linux.resources.blockIO.throttle{what}Device": (8192, _BLOCK) for what in _THROTTLES},
    "linux.resources.hugepageLimits": (64, "Linux has at most 4 sizes"),
    "linux.resources.network.priorities": (1024, "one for each interface"),
    "linux.resources.rdma": (256, "none is served"),
    "linux.resources.unified": (256, "cgroup v2 has about 60 files to write"),
}
"""Place of a list or map -> the entries that it may have, and why so many."""


def _table(entries: Iterable[tuple[str, Kind]], above: str = "") -> Table:
    """Of `entries`, whose places begin below `above`, the place of the object they belong to."""
    parts: dict[str, list[tuple[str, Kind]]] = {}
    for place, kind in entries:
        step, _, rest = place.partition(".")
        parts.setdefault(step, []).append((rest, kind))
    fields: dict[str, Kind] = {}
    for step, below in parts.items():
        name = step.removesuffix("[]").removesuffix("{}")
        here = f"{above}.{name}" if above else name
        inner = _table(below, here) if below[0][0] else below[0][1]
        if step != name:
            most, _ = MOST[here]
            inner = ListOf(inner, most) if step.endswith("[]") else MapOf(inner, most)
        fields[name] = inner
    return Table(fields)


def _inner(table: Table, name: str) -> Table:
    found = table.fields[name]
    assert isinstance(found, Table)
    return found


SPEC = _table(FIELDS.items())
PROCESS = _inner(SPEC, "process")
RESOURCES = _inner(_inner(SPEC, "linux"), "resources")
