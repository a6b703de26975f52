"""Where on the host a pod's cgroup is: the hierarchies that are mounted, and the path in them.

What: `hierarchies` reads what there is, of version 1, version 2 or both (hybrid); `relative_path` makes of
linux.cgroupsPath, in either of its two forms, the directory below each of them; `memberships` says where a
process is.
Why two forms: kubelet's and Docker's `cgroupfs` driver names a directory ("/kubepods/burstable/pod1/abc"),
their `systemd` driver a slice and a scope in it ("kubepods-burstable-pod1.slice:cri-containerd:abc").
Invariants: pure but for reading /proc/self/mountinfo and /proc/PID/cgroup. A path never leaves its hierarchy,
and never names a file of the kernel's.
Source: runtime-spec `config-linux.md` (cgroupsPath), cgroups(7), systemd.slice(5): the name says the path;
runc's docs/systemd.md for the second form.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from devices.errors import CallerError
from devices.mounts import MountEntry, mount_table
from devices.plain import plain

__all__ = ["Hierarchy", "hierarchies", "is_scope", "memberships", "relative_path", "scope"]

_MAX_PATH, _MAX_PART = 2048, 255
_SLICE = ".slice"
_ROOT = "-.slice"


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One that is mounted.

    `identity` is how /proc/PID/cgroup names it: its controllers (version 1, "name=systemd" among them), or ""
    for version 2. `root`: the cgroup that is seen at `mount`; another than "/" in some containers.
    """

    mount: str
    identity: str
    root: str = "/"

    @property
    def unified(self) -> bool:
        """Whether it is version 2."""
        return not self.identity

    @property
    def controllers(self) -> frozenset[str]:
        """Of version 1."""
        return frozenset(self.identity.split(",")) if self.identity else frozenset()

    def named(self, relative: str) -> str:
        """How /proc/PID/cgroup names the cgroup at this path below `mount`."""
        return f"{self.root.rstrip('/')}/{relative}"


def hierarchies(
    mounts: Iterable[MountEntry] | None = None, known: Iterable[str] | None = None
) -> list[Hierarchy]:
    """Those that are mounted, each at its last mount that shows it whole. `known`: of /proc/self/cgroup."""
    found: dict[str, Hierarchy] = {}
    identities = list(memberships() if known is None else known)
    for entry in mount_table() if mounts is None else mounts:
        if entry.fstype == "cgroup2":
            identity = ""
        elif entry.fstype == "cgroup":
            words = set(entry.super_options.split(","))
            identity = next((each for each in identities if each and words.issuperset(each.split(","))), "-")
        else:
            continue
        whole = identity in found and found[identity].root == "/"
        if identity in identities and (entry.root == "/" or not whole):
            found[identity] = Hierarchy(entry.target, identity, entry.root)
    return list(found.values())


def memberships(pid: int | str = "self") -> dict[str, str]:
    """The cgroup of a process in each hierarchy, by `Hierarchy.identity`. Raises OSError."""
    with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
        parts = [line.rstrip("\n").split(":", 2) for line in file]
    return {identity: path for _, identity, path in parts}


def relative_path(path: str, default: str) -> str:
    """The directory below a hierarchy's mount, without a slash in front. `default`: for no path.

    Raises CallerError (INVALID_ARGUMENT) for what leads elsewhere.
    """
    if not path:
        return default
    text = path
    if is_scope(path):
        slice_name, unit = scope(path)
        words = slice_name.removesuffix(_SLICE).split("-")
        above = ["-".join(words[: end + 1]) + _SLICE for end in range(len(words))]
        text = "/".join([*(above if slice_name != _ROOT else []), unit])
    parts = [part for part in text.split("/") if part]
    problem = ""
    if not parts:
        problem = "names no cgroup"
    elif len(text) > _MAX_PATH or any(len(part) > _MAX_PART for part in parts):
        problem = f"is longer than {_MAX_PATH} bytes, or a part of it than {_MAX_PART}"
    elif any(part in (".", "..") for part in parts):
        problem = "has a part that leads elsewhere"
    elif any(part.startswith("cgroup.") or part != plain(part) for part in parts):
        problem = "has a part that is no name of a cgroup"
    if problem:
        raise CallerError(
            f"config.json: linux.cgroupsPath {path[:200]!a} {problem}",
            phase="bundle",
            code="INVALID_ARGUMENT",
        )
    return "/".join(parts)


def is_scope(path: str) -> bool:
    """Whether it has systemd's form, slice:prefix:name."""
    return path.count(":") == 2 and not path.startswith("/")


def scope(path: str) -> tuple[str, str]:
    """The slice and the unit that slice:prefix:name stands for. Raises CallerError (INVALID_ARGUMENT)."""
    slice_name, prefix, name = path.split(":")
    slice_name = slice_name or "system.slice"
    words = slice_name.removesuffix(_SLICE).split("-")
    is_slice = slice_name == _ROOT or (slice_name.endswith(_SLICE) and all(words))
    if "/" in path or not name or not is_slice or path != plain(path):
        raise CallerError(
            f"config.json: linux.cgroupsPath {path[:200]!a} is not slice:prefix:name",
            phase="bundle",
            code="INVALID_ARGUMENT",
        )
    if name.endswith(_SLICE):
        return slice_name, name
    return slice_name, f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
