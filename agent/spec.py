"""From the protobuf `Spec` of Kata's agent protocol to the OCI runtime's `config.json`.

What: pure functions, message in, JSON-ready dict out, field by field after the OCI runtime
specification 1.0.2.
Why by hand: the protobuf's names are CamelCase of another kind than OCI's lowerCamelCase, and
proto3 cannot say "unset" for numbers, so each field needs its own rule of what a zero means.
`agent.dialect` knows what shims of Kata's write otherwise.
Invariants: nothing is invented: a field that the message leaves at its default is absent from the
result wherever OCI distinguishes absence from zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from agent.dialect import capability, device_numbers, namespace_type, takes_errno

if TYPE_CHECKING:
    from proto import oci_pb2

__all__ = ["cgroup_path", "process_json", "resources_json", "spec_json"]

Json = dict[str, Any]

# The version of what is written here, not of the sender's file: containerd 1.7 and 2.x send 1.1 and 1.2,
# of which crun 1.8 refuses the number, and whose additions these functions do not write.
_VERSION = "1.0.2"


def _put(target: Json, **fields: Any) -> Json:
    """Add the fields that carry something: not None, zero, empty or False."""
    target.update({name: value for name, value in fields.items() if value})
    return target


def cgroup_path(wanted: str, container_id: str) -> str:
    """A cgroup path below the guest's root that cannot climb out of it.

    The host may send a cgroupfs path or systemd's `slice:prefix:name`; without any, the container
    gets `/kata/<id>`.
    """
    parts = [part for part in wanted.replace(":", "/").split("/") if part not in ("", ".", "..")]
    return "/" + "/".join(parts) if parts else f"/kata/{container_id}"


def process_json(process: oci_pb2.Process) -> Json:
    """OCI `process`; also the file for `crun exec --process`."""
    user: Json = {"uid": process.User.UID, "gid": process.User.GID}
    _put(user, additionalGids=list(process.User.AdditionalGids), username=process.User.Username)
    result: Json = {
        "terminal": process.Terminal,
        "user": user,
        "args": list(process.Args),
        "env": list(process.Env),
        "cwd": process.Cwd or "/",
        "noNewPrivileges": process.NoNewPrivileges,
    }
    size = process.ConsoleSize
    if process.Terminal and size.Height and size.Width:
        result["consoleSize"] = {"height": size.Height, "width": size.Width}
    if process.HasField("Capabilities"):
        caps = process.Capabilities
        result["capabilities"] = {
            "bounding": [capability(name) for name in caps.Bounding],
            "effective": [capability(name) for name in caps.Effective],
            "inheritable": [capability(name) for name in caps.Inheritable],
            "permitted": [capability(name) for name in caps.Permitted],
            "ambient": [capability(name) for name in caps.Ambient],
        }
    if process.Rlimits:
        result["rlimits"] = [{"type": r.Type, "hard": r.Hard, "soft": r.Soft} for r in process.Rlimits]
    return _put(
        result,
        apparmorProfile=process.ApparmorProfile,
        oomScoreAdj=process.OOMScoreAdj,
        selinuxLabel=process.SelinuxLabel,
    )


def _mount_json(mount: oci_pb2.Mount) -> Json:
    result: Json = {"destination": mount.destination}
    return _put(result, source=mount.source, type=mount.type, options=list(mount.options))


def _device_json(device: oci_pb2.LinuxDevice) -> Json:
    result: Json = {"path": device.Path, "type": device.Type, "uid": device.UID, "gid": device.GID}
    if device.Type != "p":
        result.update(major=device.Major, minor=device.Minor)
    return _put(result, fileMode=device.FileMode)


def _seccomp_json(seccomp: oci_pb2.LinuxSeccomp) -> Json:
    result: Json = {"defaultAction": seccomp.DefaultAction}
    _put(result, architectures=list(seccomp.Architectures), flags=list(seccomp.Flags))
    rules = []
    for call in seccomp.Syscalls:
        rule: Json = {"names": list(call.Names), "action": call.Action}
        if call.HasField("errnoret") and takes_errno(call.Action, call.errnoret):
            rule["errnoRet"] = call.errnoret
        if call.Args:
            rule["args"] = [
                {"index": arg.Index, "value": arg.Value, "valueTwo": arg.ValueTwo, "op": arg.Op}
                for arg in call.Args
            ]
        rules.append(rule)
    return _put(result, syscalls=rules)


def _throttle_json(devices: Iterable[oci_pb2.LinuxThrottleDevice]) -> list[Json]:
    return [{"major": d.Major, "minor": d.Minor, "rate": d.Rate} for d in devices]


def _block_io_json(block: oci_pb2.LinuxBlockIO) -> Json:
    weights = []
    for device in block.WeightDevice:
        weight: Json = {"major": device.Major, "minor": device.Minor}
        weights.append(_put(weight, weight=device.Weight, leafWeight=device.LeafWeight))
    return _put(
        {},
        weight=block.Weight,
        leafWeight=block.LeafWeight,
        weightDevice=weights,
        throttleReadBpsDevice=_throttle_json(block.ThrottleReadBpsDevice),
        throttleWriteBpsDevice=_throttle_json(block.ThrottleWriteBpsDevice),
        throttleReadIOPSDevice=_throttle_json(block.ThrottleReadIOPSDevice),
        throttleWriteIOPSDevice=_throttle_json(block.ThrottleWriteIOPSDevice),
    )


def _device_rule_json(rule: oci_pb2.LinuxDeviceCgroup) -> Json:
    # In proto3 an absent number is 0, and 0 would mean device 0; the sender says "all" with -1.
    result: Json = {"allow": rule.Allow}
    _put(result, type=rule.Type, access=rule.Access)
    if rule.Type not in ("", "a"):
        major, minor = device_numbers(rule.Major, rule.Minor)
        result.update(major=major, minor=minor)
    return result


def resources_json(resources: oci_pb2.LinuxResources) -> Json:
    """OCI `linux.resources`; also the file for `crun update`."""
    memory = _put(
        {},
        limit=resources.Memory.Limit,
        reservation=resources.Memory.Reservation,
        swap=resources.Memory.Swap,
        kernel=resources.Memory.Kernel,
        kernelTCP=resources.Memory.KernelTCP,
        swappiness=resources.Memory.Swappiness,
        disableOOMKiller=resources.Memory.DisableOOMKiller,
    )
    cpu = _put(
        {},
        shares=resources.CPU.Shares,
        quota=resources.CPU.Quota,
        period=resources.CPU.Period,
        realtimeRuntime=resources.CPU.RealtimeRuntime,
        realtimePeriod=resources.CPU.RealtimePeriod,
        cpus=resources.CPU.Cpus,
        mems=resources.CPU.Mems,
    )
    network = _put(
        {},
        classID=resources.Network.ClassID,
        priorities=[{"name": p.Name, "priority": p.Priority} for p in resources.Network.Priorities],
    )
    return _put(
        {},
        devices=[_device_rule_json(rule) for rule in resources.Devices],
        memory=memory,
        cpu=cpu,
        pids=_put({}, limit=resources.Pids.Limit),
        blockIO=_block_io_json(resources.BlockIO),
        hugepageLimits=[{"pageSize": h.Pagesize, "limit": h.Limit} for h in resources.HugepageLimits],
        network=network,
    )


def _mappings_json(mappings: Iterable[oci_pb2.LinuxIDMapping]) -> list[Json]:
    return [{"hostID": m.HostID, "containerID": m.ContainerID, "size": m.Size} for m in mappings]


def _linux_json(linux: oci_pb2.Linux) -> Json:
    result = _put(
        {},
        uidMappings=_mappings_json(linux.UIDMappings),
        gidMappings=_mappings_json(linux.GIDMappings),
        sysctl=dict(linux.Sysctl),
        resources=resources_json(linux.Resources),
        cgroupsPath=linux.CgroupsPath,
        devices=[_device_json(device) for device in linux.Devices],
        rootfsPropagation=linux.RootfsPropagation,
        maskedPaths=list(linux.MaskedPaths),
        readonlyPaths=list(linux.ReadonlyPaths),
        mountLabel=linux.MountLabel,
    )
    result["namespaces"] = [
        _put({"type": namespace_type(each.Type)}, path=each.Path) for each in linux.Namespaces
    ]
    if linux.HasField("Seccomp") and linux.Seccomp.DefaultAction:
        result["seccomp"] = _seccomp_json(linux.Seccomp)
    return result


def _hooks_json(hooks: oci_pb2.Hooks) -> Json:
    # Only these run in the container's own namespaces from the guest's files; the others are the
    # host's, which ran them already or will.
    return _put(
        {},
        startContainer=[
            _put({"path": h.Path}, args=list(h.Args), env=list(h.Env), timeout=h.Timeout)
            for h in hooks.StartContainer
        ],
    )


def spec_json(spec: oci_pb2.Spec) -> Json:
    """The whole `config.json`."""
    result: Json = {
        "ociVersion": _VERSION,
        "process": process_json(spec.Process),
        "root": {"path": spec.Root.Path, "readonly": spec.Root.Readonly},
        "mounts": [_mount_json(mount) for mount in spec.Mounts],
        "linux": _linux_json(spec.Linux),
    }
    return _put(
        result,
        hostname=spec.Hostname,
        hooks=_hooks_json(spec.Hooks),
        annotations=dict(spec.Annotations),
    )
