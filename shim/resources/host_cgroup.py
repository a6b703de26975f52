"""The pod's cgroup on the host: whom VM, daemons and shim are charged to, and how far they may go.

What: `HostCgroup.open` makes the directories and has every child from then on begin in them; `follow` moves
the shim, and whatever of the VM is elsewhere; `limit` bounds memory and CPU by the VM's size; `close` leaves
and removes them. `cgroup_settings` reads what is wanted of configuration and spec.
Why by file, not by asking each VMM: a child writes itself into its cgroup before it is the program
(`devices.child.place_children`), so that not a page of the guest is charged to containerd; and it costs
nothing there, while to move a process with threads waits for the kernel's grace period.
Kata's rule (sandbox_cgroup_only): true has all in the pod's cgroup, the one that linux.cgroupsPath names.
false has what the pod pays for there (version 1: the threads of its vCPUs, in the hierarchies that count CPU
time; version 2, which has no cgroups for threads: the VMM), and the rest in /kata_overhead/<sandbox>.
Invariants:
- What is made is in the undo log before it is made, and only empty directories are ever removed. A cgroup
  that is there already is joined, never limited, never removed; somebody else's process that is in ours when
  we go is moved out, never ended.
- A host that gives no cgroup, or not all controllers, gets a warning and runs the pod.
Source: the kernel's admin-guide/cgroup-v1 and cgroup-v2.rst; kata.md 1.10; runc's libcontainer for the files.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog

from devices.child import place_children
from devices.threads import acquire
from devices.undo import Entry, UndoLog
from shim.resources.cgroup_paths import (
    Hierarchy,
    hierarchies,
    is_scope,
    memberships,
    relative_path,
    scope,
)
from shim.resources.systemd_scope import manages, start_scope
from shim.spec.limits import Size

__all__ = ["CgroupSettings", "HostCgroup", "cgroup_settings", "release"]

OVERHEAD = "kata_overhead"
_OVERHEAD_SLICE = "kata-overhead.slice"
_DEFAULT = "kata_sandboxed_pod"
_COUNT_CPU = frozenset({"cpu", "cpuacct", "cpuset"})  # of version 1, by threads
_WANTED = ("cpuset", "cpu", "io", "memory", "pids", "hugetlb")  # of version 2, for the cgroups below
_PERIOD = 100_000  # microseconds
_ROOM = Size(vcpus=0.25, memory=512 << 20)
"""What a pod's host side may have beside the VM's size: VMM, daemons, shim, and files in memory."""
_EMULATION = 1 << 30  # bytes more for QEMU's translated code under TCG
_MOST_TASKS = 4096
_GRACE = 2.0  # seconds in which the kernel lets go of the dead
_log = structlog.get_logger("cgroup")


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupSettings:
    """`path`: below each hierarchy; `overhead`: the other one, "" if all are in the first. `scope` and
    `overhead_scope`: the same as slice:prefix:name, if the path is given so: systemd is asked for it.
    `limited`: the pod says how much memory, or how many CPUs (in `limited.vcpus`), its containers may have
    together; 0 says nothing. `shares` of the CPU, as of version 1; 0 for the kernel's. `keep_shim`: the shim
    was put somewhere by its caller, and stays.
    """

    path: str
    overhead: str = ""
    scope: str = ""
    overhead_scope: str = ""
    limited: Size = field(default_factory=Size)
    shares: int = 0
    keep_shim: bool = False


def cgroup_settings(
    spec: Mapping[str, Any], alias: str, *, only: bool, limited: Size, keep_shim: bool
) -> CgroupSettings:
    """`alias`: what no other sandbox of this host is called; `only`: the key sandbox_cgroup_only. Raises
    CallerError."""
    linux = spec.get("linux") or {}
    path = str(linux.get("cgroupsPath") or "")
    shares = ((linux.get("resources") or {}).get("cpu") or {}).get("shares") or 0
    scope = path if is_scope(path) else ""
    rest = f"{_OVERHEAD_SLICE}:kata:{alias}" if scope else f"{OVERHEAD}/{alias}"
    return CgroupSettings(
        path=relative_path(path, f"{_DEFAULT}/{alias}"),
        overhead="" if only else relative_path(rest, ""),
        scope=scope,
        overhead_scope=rest if scope and not only else "",
        limited=limited,
        shares=shares if isinstance(shares, int) and 2 <= shares <= 1 << 18 else 0,
        keep_shim=keep_shim,
    )


@dataclass(slots=True)
class _Place:
    """One cgroup in one hierarchy. `made`: the directory is ours; `given`: systemd made it for us."""

    hierarchy: Hierarchy
    relative: str
    made: bool = False
    given: bool = False

    @property
    def path(self) -> str:
        return os.path.join(self.hierarchy.mount, self.relative)

    @property
    def ours(self) -> bool:
        return self.made or self.given

    @property
    def name(self) -> str:
        return self.hierarchy.named(self.relative)


@dataclass(slots=True)
class HostCgroup:
    """See the module's docstring. One sandbox's; its methods are called one after the other."""

    settings: CgroupSettings
    undo: UndoLog
    _pods: list[_Place] = field(default_factory=list)
    _rest: list[_Place] = field(default_factory=list)  # the overhead's, if there is one
    _later: list[_Place] = field(default_factory=list)  # the pod's that systemd makes, with the VMM in it
    _left: dict[str, str] = field(default_factory=dict)  # where the shim came from, by hierarchy
    _entry: Entry | None = None
    _systemd: bool = False  # it made our homes

    async def open(self) -> None:
        """Make it, and have all children begin in it. Never fails: what the host does not give is logged."""
        await acquire(self._open)

    async def follow(self, pids: Iterable[int], vcpus: Iterable[int] = ()) -> None:
        """Move the shim, and what of the VM's processes is elsewhere; `vcpus`: threads of the first."""
        await acquire(self._follow, list(pids), list(vcpus))

    async def limit(self, size: Size, *, emulated: bool = False) -> None:
        """The VM has this size, or is about to have it: what the pod's limits mean on the host follows.

        `emulated`: without KVM. Not before the guest is up: a VM boots before it has anything to do.
        """
        await acquire(self._limit, size, emulated)

    async def close(self) -> list[OSError]:
        """Leave, and remove what was made; all processes of the sandbox have ended. Idempotent."""
        place_children(())
        return await acquire(self._close)

    # --- in a thread

    def _open(self) -> None:
        try:
            found = hierarchies()
            self._left = memberships()
        except OSError as error:
            found = []
            _log.warning("the host's cgroups cannot be read", error=str(error))
        if not found:
            _log.warning("this host has no cgroups: the pod is charged to nobody", path=self.settings.path)
            return
        self._pods = [_Place(each, self.settings.path) for each in found]
        if self.settings.overhead:
            self._rest = [_Place(each, self.settings.overhead) for each in found]
        if self.settings.scope and not self.settings.keep_shim and manages():
            self._systemd = self._ask(self._rest or self._pods, [os.getpid()])
        if self._rest and self._systemd:
            self._later, self._pods = self._pods, []
        elif self._rest:
            # The pod's own is for what is counted there alone.
            self._pods = [
                place
                for place in self._pods
                if place.hierarchy.unified or place.hierarchy.controllers & _COUNT_CPU
            ]
        self._record()
        self._pods = [place for place in self._pods if self._make(place) and self._takes(place)]
        self._rest = [place for place in self._rest if self._make(place) and self._takes(place)]
        self._forget_others()
        if not self._pods and not self._rest:
            _log.warning("the pod has no cgroup on this host: it is charged to its caller's")
            return
        self._bound()
        homes = self._rest or self._pods
        threads = [f"{place.path}/tasks" for place in homes if not place.hierarchy.unified]
        if threads:
            place_children(threads)  # and version 2, if it is there too, follows
        elif self.settings.keep_shim:
            place_children([f"{place.path}/cgroup.procs" for place in homes])
        else:
            self._move(os.getpid(), homes)  # children are where the shim is when it forks

    def _ask(self, places: Sequence[_Place], pids: Sequence[int]) -> bool:
        """Have systemd make them, in its hierarchies, with the processes in them; False: it does not."""
        text = self.settings.overhead_scope if places is self._rest else self.settings.scope
        slice_name, unit = scope(text)
        if not unit.endswith(".scope"):
            return False

        def arrived() -> bool:
            now = memberships(pids[0])
            return any(now.get(place.hierarchy.identity) == place.name for place in places)

        try:
            start_scope(unit, slice_name, pids, arrived=arrived)
        except OSError as error:
            _log.warning("systemd does not make the pod's scope", unit=unit, error=str(error))
            return False
        for place in places:
            place.given = os.path.isdir(place.path)
        return True

    def _record(self) -> None:
        """In the undo log: all that is not there yet, the deepest first."""
        missing: list[str] = []
        for place in [*self._pods, *self._rest]:
            at = place.path
            while at != place.hierarchy.mount and not os.path.isdir(at):
                if at not in missing:
                    missing.append(at)
                at = os.path.dirname(at)
        if missing:
            facts: dict[str, str | int] = {"paths": "\n".join(sorted(missing, key=len, reverse=True))}
            self._entry = self.undo.record("cgroups", self._release, **facts)

    async def _release(self) -> None:
        """For the undo log, if nobody has closed it."""
        if self._entry is not None:
            await acquire(release, self._entry.facts)

    def _make(self, place: _Place) -> bool:
        """The directory, with all above it; what version 2 needs besides is asked of those above."""
        at = place.hierarchy.mount
        if place.given:
            return True
        try:
            for part in place.relative.split("/"):
                if place.hierarchy.unified:
                    _enable(at)
                at = os.path.join(at, part)
                try:
                    os.mkdir(at, 0o755)
                    place.made = True
                except FileExistsError:
                    place.made = False
                else:
                    if "cpuset" in place.hierarchy.controllers:
                        _inherit_cpuset(at)
        except OSError as error:
            _log.warning(
                "no cgroup for the pod",
                path=at,
                error=error.strerror,
                hierarchy=place.hierarchy.identity or "version 2",
            )
            return False
        if not place.made:
            _log.warning("the pod's cgroup is somebody else's: it is joined, and not limited", path=at)
        return True

    def _forget_others(self) -> None:
        """A directory that somebody else made meanwhile is not ours to remove."""
        if self._entry is None:
            return
        theirs = {place.path for place in [*self._pods, *self._rest] if not place.made}
        paths = [path for path in str(self._entry.facts["paths"]).split("\n") if path not in theirs]
        self.undo.update(self._entry, paths="\n".join(paths))

    def _takes(self, place: _Place) -> bool:
        """Whether a thread can go there, tried with this one: a child that cannot would not be started."""
        if place.hierarchy.unified:
            return True
        if not _try_write(f"{place.path}/tasks", 0):
            return False
        _try_write(f"{self._origin(place.hierarchy)}/tasks", 0)
        return True

    def _origin(self, hierarchy: Hierarchy) -> str:
        """The directory of the cgroup that the shim came from."""
        name = self._left.get(hierarchy.identity, "/")
        return hierarchy.mount + name.removeprefix(hierarchy.root.rstrip("/")).rstrip("/")

    def _bound(self) -> None:
        """Limits that hold from the start."""
        for place in self._pods:
            if place.ours and self.settings.shares:
                _set_shares(place, self.settings.shares)
        for place in [*self._pods, *self._rest]:
            if place.ours:
                _set(place, "pids", {"pids.max": _MOST_TASKS}, {"pids.max": _MOST_TASKS})

    def _limit(self, size: Size, emulated: bool) -> None:
        limited = self.settings.limited
        memory = size.memory + _ROOM.memory + (_EMULATION if emulated else 0)
        for place in self._pods:
            if not place.ours:
                continue
            if limited.memory:
                _set(place, "memory", {"memory.limit_in_bytes": memory}, {"memory.max": memory})
            if limited.vcpus:
                quota = math.ceil((size.vcpus + _ROOM.vcpus) * _PERIOD)
                old = {"cpu.cfs_period_us": _PERIOD, "cpu.cfs_quota_us": quota}
                _set(place, "cpu", old, {"cpu.max": f"{quota} {_PERIOD}"})

    def _follow(self, pids: Sequence[int], vcpus: Sequence[int]) -> None:
        homes = self._rest or self._pods
        if not self.settings.keep_shim:
            self._move(os.getpid(), homes)
        for pid in pids[1:]:
            self._move(pid, homes)
        if self._later and pids and self._ask(self._later, pids[:1]):
            self._pods, self._later = [place for place in self._later if place.given], []
        # Where threads cannot be apart from their process, the VMM is the pod's.
        whole = (
            [place for place in self._pods if place.hierarchy.unified or place.given] if self._rest else []
        )
        elsewhere = {place.hierarchy.identity for place in whole}
        for pid in pids[:1]:
            self._move(pid, [place for place in homes if place.hierarchy.identity not in elsewhere])
            self._move(pid, whole)
        for place in self._pods if self._rest else []:
            if place not in whole:
                for thread in vcpus:
                    _try_write(f"{place.path}/tasks", thread)

    def _move(self, pid: int, places: Sequence[_Place]) -> None:
        """Each move waits for the kernel, so what is there already is left in peace."""
        try:
            now = memberships(pid)
        except OSError:
            return  # it is gone
        for place in places:
            if now.get(place.hierarchy.identity) != place.name:
                _try_write(f"{place.path}/cgroup.procs", pid)

    def _close(self) -> list[OSError]:
        self._go_back()
        errors: list[OSError] = []
        if self._entry is not None:
            try:
                release(self._entry.facts)
            except OSError as error:
                errors.append(error)
            else:
                self.undo.forget(self._entry)
                self._entry = None
        self._pods, self._rest, self._later = [], [], []
        return errors

    def _go_back(self) -> None:
        """The shim to where it came from, or if that is gone to the root, where everybody may be."""
        now = memberships() if self._pods or self._rest else {}
        for place in [*self._pods, *self._rest]:
            hierarchy = place.hierarchy
            if now.get(hierarchy.identity) != place.name:
                continue
            if not _try_write(f"{self._origin(hierarchy)}/cgroup.procs", os.getpid(), quiet=True):
                _try_write(f"{hierarchy.mount}/cgroup.procs", os.getpid())


def release(facts: Mapping[str, str | int], timeout: float = _GRACE) -> None:
    """Remove the directories that were made, the deepest first. Idempotent. Raises OSError. Blocks."""
    until = time.monotonic() + timeout
    paths = [path for path in str(facts["paths"]).split("\n") if path.startswith("/")]
    parents = {os.path.dirname(path) for path in paths}
    for path in paths:
        if path in parents:  # others may have moved in below
            with contextlib.suppress(OSError):
                os.rmdir(path)
        else:
            _remove(path, until)


def _remove(path: str, until: float) -> None:
    """The kernel lets go of the dead a moment later, and tells nobody. What has cgroups of others below is
    theirs now: we made it, and somebody else the one that both are in."""
    while True:
        try:
            os.rmdir(path)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno == errno.EBUSY and _has_cgroups(path):
                return
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise
        if time.monotonic() > until - _GRACE / 2:
            _evacuate(path)
        time.sleep(0.01)


def _has_cgroups(path: str) -> bool:
    with contextlib.suppress(OSError), os.scandir(path) as entries:
        return any(entry.is_dir(follow_symlinks=False) for entry in entries)
    return False


def _evacuate(path: str) -> None:
    """Whoever is still in there is none of ours (a hook's, a logger's child): to the hierarchy's root."""
    root = path
    while os.path.exists(os.path.join(os.path.dirname(root), "cgroup.procs")):
        root = os.path.dirname(root)
    try:
        with open(os.path.join(path, "cgroup.procs"), encoding="ascii") as file:
            pids = [int(word) for word in file.read().split()]
    except OSError:
        return
    for pid in pids:
        _try_write(os.path.join(root, "cgroup.procs"), pid)


def _enable(directory: str) -> None:
    """Have the cgroups below count and limit what this one may. Version 2; what it does not give is missing
    below, which shows when it is limited."""
    try:
        with open(f"{directory}/cgroup.controllers", encoding="ascii") as file:
            here = file.read().split()
        with open(f"{directory}/cgroup.subtree_control", encoding="ascii") as file:
            below = file.read().split()
    except OSError:
        return
    for name in _WANTED:
        if name in here and name not in below:
            _try_write(f"{directory}/cgroup.subtree_control", f"+{name}", quiet=True)


def _inherit_cpuset(directory: str) -> None:
    """Version 1: a new one has no CPU and no memory, and takes nobody in."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        with open(f"{os.path.dirname(directory)}/{name}", encoding="ascii") as file:
            value = file.read().strip()
        with open(f"{directory}/{name}", "w", encoding="ascii") as file:
            file.write(value)


def _set_shares(place: _Place, shares: int) -> None:
    weight = 1 + ((shares - 2) * 9999) // 262142  # as runc has it
    _set(place, "cpu", {"cpu.shares": shares}, {"cpu.weight": weight})


def _set(place: _Place, controller: str, old: Mapping[str, object], new: Mapping[str, object]) -> None:
    """Write limits: `old` are version 1's files, if this hierarchy has the controller, `new` version 2's."""
    if not place.hierarchy.unified and controller not in place.hierarchy.controllers:
        return
    for name, value in (new if place.hierarchy.unified else old).items():
        path = f"{place.path}/{name}"
        if os.path.exists(path):
            _try_write(path, value)
        elif _has_controllers(place):
            _log.warning("the host does not limit the pod", missing=path)


def _has_controllers(place: _Place) -> bool:
    """Whether its hierarchy counts anything: beside version 1, version 2 does not."""
    if not place.hierarchy.unified:
        return True
    with contextlib.suppress(OSError), open(f"{place.hierarchy.mount}/cgroup.controllers") as file:
        return bool(file.read().split())
    return False


def _try_write(path: str, value: object, *, quiet: bool = False) -> bool:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(value).encode())
        finally:
            os.close(fd)
    except OSError as error:
        if not quiet and error.errno != errno.ESRCH:
            _log.warning(
                "the host's cgroup does not do it", path=path, value=str(value), error=error.strerror
            )
        return False
    return True
