"""What a sandbox of the Sandbox API is to be: CRI's PodSandboxConfig as the rest of the shim knows pods.

What: `sandbox_spec` gives the OCI spec that a pause container would have had, from which everything
else (configuration, sizes, name servers) is decided as for any pod; `write_files` makes the files that a
CRI plugin makes for pause containers, and `complete` gives them, and the pod's sysctls, to a container.
Why: with a pause container containerd prepares hosts, hostname and resolv.conf of the pod, and mounts
them into each container; without one nobody does (1.7 still asks for the mounts, 2.x not even that).
Invariants: only what is missing is made up: a file that exists, a sysctl that the container sets itself
stay. Of the pod's own annotations only Kata's are read: containerd's `pod_annotations`, which keeps the
others away from runtimes, does not apply here, and Kata's have a gate of their own (`enable_annotations`).
Source: facts/containerd-shim.md 1.13, 3.2; resolv.conf(5), hosts(5).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError

from devices.errors import CallerError, HostError
from devices.small_file import read_small
from proto import cri_pb2
from shim.spec.guest_spec import CONTAINER_TYPE
from shim.spec.oci_types import MOST
from shim.spec.shape import copied
from shim.state.bundle import OWN

__all__ = [
    "PodDefaults",
    "complete",
    "files_of",
    "parse_options",
    "pause_spec",
    "sandbox_spec",
    "shares_pids",
    "write_files",
]

_OPTIONS_TYPE = "runtime.v1.PodSandboxConfig"
_MAX_COPY = 1 << 20  # bytes of the host's /etc/hosts and /etc/resolv.conf that a pod gets
_ENDS = frozenset("\n\r\0")  # of a line of a file
_MAX_LINES = 64  # servers, searches, options; the resolver uses fewer
_HOSTS = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
_FILES = ("hostname", "hosts", "resolv.conf")
_CRI = "io.kubernetes.cri."
_KATA = "io.katacontainers."


@dataclass(frozen=True, slots=True)
class PodDefaults:
    """What each container of the pod gets unless it brings it: files by their path in it, sysctls.

    `shared_pids`: the containers are to see each other's processes.
    """

    files: Mapping[str, str]
    sysctls: Mapping[str, str]
    shared_pids: bool = False


def parse_options(options: AnyMessage) -> cri_pb2.PodSandboxConfig:
    """The options of CreateSandbox; those of other types are for other runtimes. Raises CallerError."""
    config = cri_pb2.PodSandboxConfig()
    if options.type_url.rsplit("/", 1)[-1] != _OPTIONS_TYPE:
        return config
    try:
        config.ParseFromString(options.value)
    except DecodeError as error:
        raise CallerError(
            f"the sandbox's options are not a {_OPTIONS_TYPE} message",
            code="INVALID_ARGUMENT",
            phase="config",
        ) from error
    for name, values in (
        ("servers", config.dns_config.servers),
        ("searches", config.dns_config.searches),
        ("options", config.dns_config.options),
    ):
        if len(values) > _MAX_LINES or any(set(value) & _ENDS for value in values):
            raise _wrong(f"dns_config.{name} must be at most {_MAX_LINES} words")
    if set(config.hostname) & _ENDS:
        raise _wrong("hostname must be one word")
    most, _ = MOST["linux.sysctl"]
    sysctls = config.linux.sysctls
    if len(sysctls) > most or any("\0" in text for pair in sysctls.items() for text in pair):
        raise _wrong(f"linux.sysctls must be at most {most} settings")
    return config


def _wrong(text: str) -> CallerError:
    return CallerError(text, code="INVALID_ARGUMENT", phase="config")


def shares_pids(config: cri_pb2.PodSandboxConfig) -> bool:
    """Whether the containers have one pid namespace. CRI's zero means yes, but is no wish if nobody chose."""
    options = config.linux.security_context
    return options.HasField("namespace_options") and options.namespace_options.pid == cri_pb2.POD


def pause_spec(hostname: str) -> dict[str, Any]:
    """What the guest is asked to hold the pod's pid namespace with: its own pause (agent/pause.py).

    Without it the namespace would be the first container's, and end with that.
    """
    return {
        "ociVersion": "1.0.2",
        "hostname": hostname,
        "process": {"user": {"uid": 65535, "gid": 65535}, "args": ["/pause"], "cwd": "/"},
        "root": {"path": "/", "readonly": True},
        "annotations": {CONTAINER_TYPE: OWN},
        "linux": {"namespaces": [{"type": kind} for kind in ("ipc", "uts", "mount")]},
    }


def sandbox_spec(
    base: Mapping[str, Any],
    config: cri_pb2.PodSandboxConfig,
    *,
    sandbox_id: str,
    netns: str,
    annotations: Mapping[str, str],
    files: Mapping[str, str],
) -> dict[str, Any]:
    """The spec of the pause container that there is not.

    `base` is the bundle's config.json, {} if it has none; `annotations` are the request's.
    """
    spec: dict[str, Any] = copied(dict(base))
    spec["hostname"] = config.hostname or spec.get("hostname") or ""
    spec["annotations"] = {
        **(spec.get("annotations") or {}),
        **{key: value for key, value in config.annotations.items() if key.startswith(_KATA)},
        **annotations,
        **_sizes(config.linux),
        f"{_CRI}container-type": "sandbox",
        f"{_CRI}sandbox-id": sandbox_id,
    }
    # The first that names a destination counts; a spec that brings its own keeps it.
    spec["mounts"] = [*(spec.get("mounts") or []), *(_mount(*file) for file in files.items())]
    if config.linux.cgroup_parent:
        linux = spec.setdefault("linux", {})
        linux["cgroupsPath"] = linux.get("cgroupsPath") or _cgroup(config.linux.cgroup_parent, sandbox_id)
    if netns:
        linux = spec.setdefault("linux", {})
        others = [space for space in linux.get("namespaces") or [] if space.get("type") != "network"]
        linux["namespaces"] = [*others, {"type": "network", "path": netns}]
    return spec


def _cgroup(parent: str, sandbox_id: str) -> str:
    """The sandbox's cgroup below the pod's, named as the CRI plugin names a pause container's."""
    name = os.path.basename(parent)
    return f"{name}:cri-containerd:{sandbox_id}" if name.endswith(".slice") else f"{parent}/{sandbox_id}"


def _sizes(linux: cri_pb2.LinuxPodSandboxConfig) -> dict[str, str]:
    """kubelet's sums over the containers, as containerd writes them for a pause container."""
    resources = linux.resources
    values = {
        "sandbox-cpu-period": resources.cpu_period,
        "sandbox-cpu-quota": resources.cpu_quota,
        "sandbox-cpu-shares": resources.cpu_shares,
        "sandbox-memory": resources.memory_limit_in_bytes,
    }
    return {f"{_CRI}{name}": str(value) for name, value in values.items() if value}


def files_of(directory: str) -> dict[str, str]:
    """The files that `write_files` makes there: {path in a container: path of ours}."""
    return {f"/etc/{name}": os.path.join(directory, name) for name in _FILES}


def write_files(directory: str, config: cri_pb2.PodSandboxConfig) -> None:
    """Make `directory` with the pod's files in it. Raises HostError. Blocks.

    Without name servers in `config` the pod gets the host's resolv.conf, like any pod of CRI.
    """
    dns = config.dns_config
    lines = [f"nameserver {server}" for server in dns.servers]
    if dns.searches:
        lines.append(f"search {' '.join(dns.searches)}")
    if dns.options:
        lines.append(f"options {' '.join(dns.options)}")
    texts = (
        f"{config.hostname or socket.gethostname()}\n",
        _read("/etc/hosts") or _HOSTS,
        "".join(f"{line}\n" for line in lines) or _read("/etc/resolv.conf"),
    )
    try:
        os.makedirs(directory, mode=0o755, exist_ok=True)
        for name, text in zip(_FILES, texts, strict=True):
            # Any user in a container may read them, and none of the host's gets to this directory.
            descriptor = os.open(os.path.join(directory, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            with open(descriptor, "w", encoding="utf-8") as file:
                os.fchmod(descriptor, 0o644)
                file.write(text)
    except OSError as error:
        raise HostError(f"cannot write the pod's files: {error}", phase="config") from error


def _read(path: str) -> str:
    try:
        return read_small(path, _MAX_COPY).decode(errors="replace")
    except OSError:
        return ""


def complete(spec: Mapping[str, Any], defaults: PodDefaults) -> dict[str, Any]:
    """A container's spec with the pod's sysctls, and our files where nobody made any. Blocks.

    Read-only: they lie in the host's memory, which no container is to fill.
    """
    completed = dict(spec)
    mounts = [_with_source(mount, defaults.files) for mount in spec.get("mounts") or []]
    mounted = {mount.get("destination") for mount in mounts}
    mounts += [_mount(path, source) for path, source in defaults.files.items() if path not in mounted]
    completed["mounts"] = mounts
    if defaults.sysctls:
        linux = dict(spec.get("linux") or {})
        linux["sysctl"] = {**defaults.sysctls, **(linux.get("sysctl") or {})}
        completed["linux"] = linux
    return completed


def _mount(path: str, source: str) -> dict[str, Any]:
    return {"destination": path, "type": "bind", "source": source, "options": ["rbind", "ro"]}


def _with_source(mount: dict[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    if mount.get("destination") not in files or os.path.isfile(mount.get("source", "")):
        return mount
    # containerd 1.7 makes a directory of the source that nobody has made a file of.
    return _mount(mount["destination"], files[mount["destination"]])
