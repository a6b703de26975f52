"""What of a container's OCI spec goes to the guest, and how it is changed on the way.

What: `guest_spec` takes the parsed `config.json` and returns the spec for the agent; `plan_volumes`
says which of its mounts need something of the host. Both are pure: no mount, no file.
Why: namespaces, paths, hooks and devices of the host mean nothing inside the VM, or mean harm.
Invariants: no path of the host reaches the guest except as the name of a share; hooks other than
startContainer never reach the guest; what is left out is listed, never silently lost.
Source: Kata's amend_spec (facts/kata.md 3.2 step 13 and 3.4).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from devices.errors import CallerError
from shim.spec.guest_devices import HostDevice, guest_nodes, guest_rules, take_limits
from shim.spec.shape import copied
from shim.state.bundle import MEMBER, OWN

__all__ = [
    "CONTAINER_TYPE",
    "GUEST_ROOTS",
    "GUEST_SHARE",
    "GUEST_SHM",
    "Volume",
    "guest_rootfs",
    "guest_spec",
    "own_shm",
    "plan_volumes",
    "wants_sandbox_pidns",
]

#: Where the guest mounts the virtio-fs share; the same path as Kata's, so a stock agent agrees.
GUEST_SHARE = "/run/kata-containers/shared/containers"
#: And the share of root file systems, where they have one of their own.
GUEST_ROOTS = "/run/kata-containers/shared/roots"
GUEST_SHM = "/run/kata-containers/sandbox/shm"

CONTAINER_TYPE = "io.katacontainers.pkg.oci.container_type"
_BUNDLE_PATH = "io.katacontainers.pkg.oci.bundle_path"
# Of a pod's member: the kinds of namespaces that it does not share with the pod (agent/sandbox.py).
_PRIVATE = "io.kata-shim.private-namespaces"

#: Bind mounts of these trees mean the guest's own, as in Kata: the host's are never shared. What somebody
#: keeps in the host's /dev/shm is data like any other.
_GUESTS_OWN = ("/proc", "/sys", "/dev")
_HOSTS_SHM = "/dev/shm"
_ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Volume:
    """One bind mount of the spec that needs a path of the host in the share.

    `index` is its place in spec.mounts, `share_name` its name below `passthrough/`. `deep`: read-only are the
    mounts below it, too ("rro"); `nested`: there are some, on the host.
    """

    index: int
    source: str
    destination: str
    readonly: bool
    recursive: bool
    share_name: str
    deep: bool = False
    nested: bool = False

    @property
    def guest_path(self) -> str:
        return f"{GUEST_SHARE}/passthrough/{self.share_name}"


def guest_rootfs(container_id: str) -> str:
    """Where the container's root file system appears in the guest."""
    return f"{GUEST_SHARE}/passthrough/{container_id}/rootfs"


def wants_sandbox_pidns(spec: Mapping[str, Any]) -> bool:
    """A pid namespace by path means: the pod's, shared (runtime-spec, linux.namespaces)."""
    return "pid" in _shared_kinds(spec)


def own_shm(spec: Mapping[str, Any]) -> str:
    """What a pod's own container has at /dev/shm, which is then the pod's; "" for a tmpfs of its own."""
    for mount in spec.get("mounts") or []:
        if mount.get("destination") == "/dev/shm" and _is_bind(mount, mount.get("options") or []):
            return str(mount.get("source", ""))
    return ""


def plan_volumes(spec: Mapping[str, Any], container_id: str, pod_shm: str = "") -> list[Volume]:
    """The bind mounts that must be shared with the guest. `pod_shm`: what `own_shm` says of the pod's own
    container. Raises CallerError for malformed mounts."""
    volumes: list[Volume] = []
    for index, mount in enumerate(spec.get("mounts") or []):
        source, destination = mount.get("source", ""), mount.get("destination", "")
        if not destination:
            raise CallerError(
                f"config.json: mounts[{index}] needs a destination", phase="bundle", code="INVALID_ARGUMENT"
            )
        options = mount.get("options") or []
        if not _is_bind(mount, options):
            continue
        if destination == "/dev/shm" and (source == pod_shm or _is_engines_shm(source, spec, container_id)):
            continue
        if _below(source, _GUESTS_OWN) and not source.startswith(f"{_HOSTS_SHM}/"):
            continue
        if not source.startswith("/"):
            raise CallerError(
                f"config.json: mounts[{index}].source must be an absolute path, not {source[:80]!r}",
                phase="bundle",
                code="INVALID_ARGUMENT",
            )
        digest = hashlib.sha256(f"{index}:{destination}".encode()).hexdigest()[:8]
        base = "".join(c if c.isalnum() or c in "._-" else "_" for c in destination.rsplit("/", 1)[-1])[:64]
        volumes.append(
            Volume(
                index=index,
                source=source,
                destination=destination,
                readonly="ro" in options or "rro" in options,
                deep="rro" in options,
                recursive="bind" not in options or "rbind" in options,
                share_name=f"{container_id}-{digest}-{base or 'root'}",
            )
        )
    return volumes


def guest_spec(
    spec: Mapping[str, Any],
    *,
    container_id: str,
    bundle: str,
    container_type: str,
    volumes: Sequence[Volume],
    root: str = "",
    disable_seccomp: bool = False,
    keep_cpuset: bool = False,
    devices: Sequence[HostDevice] = (),
) -> tuple[dict[str, Any], list[str]]:
    """The spec as the agent gets it, and what was left out (for the log).

    `container_type`: SINGLE, OWN (it does nothing: it gets no volumes) or MEMBER (`shim.state.bundle`).
    `root`: where its root file system will be; "": `guest_rootfs`. `keep_cpuset`: the agent knows the host's
    CPU numbers from the guest's, as ours does (`agent.fit`). `devices`: those of the host that it gets.
    """
    left_out: list[str] = []
    guest: dict[str, Any] = copied(dict(spec))
    guest["root"] = {
        "path": root or guest_rootfs(container_id),
        "readonly": bool((spec.get("root") or {}).get("readonly")),
    }
    mounts = guest.get("mounts") or []
    if container_type == OWN:
        mounts = [mount for mount in mounts if not _is_bind(mount, mount.get("options") or [])]
    guest["mounts"] = _guest_mounts(mounts, {volume.index: volume for volume in volumes})
    annotations = guest.get("annotations") or {}
    annotations[CONTAINER_TYPE] = container_type
    annotations[_BUNDLE_PATH] = bundle
    if container_type == MEMBER:
        annotations[_PRIVATE] = ",".join(_private_namespaces(spec))
    guest["annotations"] = annotations
    hooks = guest.pop("hooks", None) or {}
    if hooks.get("startContainer"):
        guest["hooks"] = {"startContainer": hooks["startContainer"]}
    linux = guest.get("linux")
    if linux is not None:
        if container_type != MEMBER:  # there is nobody in the guest to share with yet
            left_out.extend(f"linux.namespaces.{kind}.path" for kind in sorted(_shared_kinds(spec)))
        _guest_linux(linux, left_out, disable_seccomp, keep_cpuset, devices)
    return guest, left_out


def _shared_kinds(spec: Mapping[str, Any]) -> set[str]:
    """The kinds of namespaces that are given by a path, but for the network's, which the VM stands in."""
    return {space["type"] for space in _namespaces(spec) if space.get("path")} - {"network"}


def _private_namespaces(spec: Mapping[str, Any]) -> list[str]:
    """Of the kinds that a pod can share, those that this container is to have of its own."""
    own = {space["type"] for space in _namespaces(spec) if not space.get("path")}
    return [kind for kind in ("ipc", "uts") if kind in own]


def _guest_linux(
    linux: dict[str, Any],
    left_out: list[str],
    disable_seccomp: bool,
    keep_cpuset: bool,
    devices: Sequence[HostDevice],
) -> None:
    spaces = []
    for space in linux.get("namespaces") or []:
        # pid: the agent decides by sandbox_pidns; network: the VM's own is the pod's.
        if space["type"] == "time":
            left_out.append("linux.namespaces time (offsets are not supported, so it would change nothing)")
        if space["type"] in {"pid", "network", "time"}:
            continue
        spaces.append({"type": space["type"]})
    # The guest is on cgroup v2, where containerd asks for one; on a v1 host it does not, and without
    # it a mounted cgroup file system shows the whole guest's.
    if {"type": "cgroup"} not in spaces:
        spaces.append({"type": "cgroup"})
    linux["namespaces"] = spaces
    resources = linux.get("resources") or {}
    resources["devices"] = guest_rules(resources.get("devices") or [], left_out, devices)
    take_limits(resources, devices)
    if linux.get("devices"):
        linux["devices"] = guest_nodes(linux["devices"], left_out, devices)
    if resources.get("cpu") and not keep_cpuset:
        _drop(resources["cpu"], ("cpus", "mems"), "linux.resources.cpu", left_out)
    linux["resources"] = resources
    if disable_seccomp:
        _drop(linux, ("seccomp",), "linux", left_out)


def _drop(table: dict[str, Any], keys: Sequence[str], place: str, left_out: list[str]) -> None:
    left_out.extend(f"{place}.{key}" for key in keys if table.pop(key, None))


def _guest_mounts(mounts: list[dict[str, Any]], volumes: Mapping[int, Volume]) -> list[dict[str, Any]]:
    rewritten = []
    for index, mount in enumerate(mounts):
        volume = volumes.get(index)
        options = mount.get("options") or []
        changed: dict[str, Any] = {}
        if volume is not None:
            kept = [o for o in options if o not in {"bind", "rbind"}]
            if volume.nested and not volume.deep:
                # What is mounted below comes to the guest when it is walked to, and takes over "ro" from
                # where it hangs. The host's mount of the volume itself is read-only all the same.
                kept.remove("ro")
            changed = {"type": "bind", "source": volume.guest_path, "options": ["rbind", *kept]}
        elif mount.get("destination") == "/dev/shm" and _is_bind(mount, options):
            changed = {"type": "bind", "source": GUEST_SHM, "options": ["rbind"]}
        rewritten.append({**mount, **changed})
    return rewritten


def _is_engines_shm(source: str, spec: Mapping[str, Any], container_id: str) -> bool:
    """Whether the engine made it for the container or its pod, and not a volume that a user put at /dev/shm.

    containerd: .../sandboxes/ID/shm, Docker: .../containers/ID/mounts/shm, CRI-O and podman:
    .../overlay-containers/ID/userdata/shm; the host's for `hostIPC`.
    """
    *folders, last = source.split("/")
    ids = {container_id, *(spec.get("annotations") or {}).values()}
    named = any(folder in ids or _ID.fullmatch(folder) for folder in folders if folder)
    return source in ("", _HOSTS_SHM) or (last == "shm" and named)


def _is_bind(mount: Mapping[str, Any], options: Sequence[str]) -> bool:
    return mount.get("type") == "bind" or "bind" in options or "rbind" in options


def _below(path: str, trees: Sequence[str]) -> bool:
    return any(path == tree or path.startswith(tree + "/") for tree in trees)


def _namespaces(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = (spec.get("linux") or {}).get("namespaces") or []
    return found
