"""The templates of this host: a directory in memory with one directory for each class.

What: `find`; `begin`, `finish` and `end` (make one aside, rename it when it is whole); `failed` and `fail`
(why a class has none); `listed` and `destroy`.
Why a file system and no daemon: what is there is there for every shim, also after the one that made it has
ended, and it goes with the host's memory or by `kata-ctl factory destroy`.
Invariants:
- A directory with the name of a class is complete; its files never change again. It is made under another
  name and renamed, by whoever holds the store's lock; nobody waits for that lock.
- Whoever has taken a template's files into a VM keeps their content, whatever becomes of their names.
- The store belongs to us, and nobody else can write it: else whoever can would choose what runs in all VMs.
- What a build that was killed has left is removed by the next one, or by `destroy`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from devices.errors import HostError
from devices.small_file import read_small
from shim.state.safefs import remove_tree

__all__ = ["DEVICE_STATE", "INFO", "MEMORY", "Building", "BusyError", "Listed", "Store"]

MEMORY, DEVICE_STATE, INFO = "memory", "device_state", "template.json"
RETRY = 600.0
"""Seconds after which a class that could not be made is tried again."""
_LOCK, _NEW, _FAILED = "lock", ".new", ".failed"
_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_LONGEST = 1000  # characters of a reason
_MAX_INFO = 16 << 10


class BusyError(HostError):
    """Somebody else makes or removes a template right now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One template. `config`: the file that it was made for; `made`: seconds since the epoch; `bytes`: of
    memory that it occupies."""

    digest: str
    config: str
    hypervisor: str
    made: float
    bytes: int


@dataclass(slots=True)
class Building:
    """A template that is being made in `path`; `lock`: the descriptor that keeps others from it."""

    digest: str
    path: str
    lock: int


class Store:
    """That in `directory`, an absolute path. Its methods block for milliseconds and raise HostError."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def find(self, digest: str) -> str:
        """The directory of the class's template, "" if there is none."""
        path = f"{self.directory}/{digest}"
        if not os.path.exists(f"{path}/{INFO}"):
            return ""
        self._check()
        return path

    def failed(self, digest: str) -> str:
        """Why the class has no template, if somebody tried a moment ago; else ""."""
        path = f"{self.directory}/{digest}{_FAILED}"
        try:
            if not 0 <= time.time() - os.stat(path).st_mtime < RETRY:
                return ""
            return read_small(path, _MAX_INFO).decode(errors="replace")
        except OSError:
            return ""

    def fail(self, digest: str, reason: str) -> None:
        """It could not be made, or no VM could begin with it: nobody tries again for a while."""
        with contextlib.suppress(OSError), self._locked():
            remove_tree(f"{self.directory}/{digest}")
            path = f"{self.directory}/{digest}{_FAILED}"
            with open(path, "w", encoding="utf-8") as file:
                file.write(reason[:_LONGEST])

    def begin(self, digest: str) -> Building:
        """A new directory to make the template in. Raises BusyError."""
        lock = self._lock()
        path = f"{self.directory}/{digest}{_NEW}"
        try:
            for name in os.listdir(self.directory):
                if name.endswith(_NEW):
                    remove_tree(f"{self.directory}/{name}")
            os.mkdir(path, 0o700)
        except OSError as error:
            os.close(lock)
            raise HostError(f"{path}: {error.strerror}", phase="template") from error
        return Building(digest, path, lock)

    def finish(self, building: Building, *, config: str, hypervisor: str) -> str:
        """It is whole, and nothing of it changes any more; its directory. Who began must still `end` it."""
        path = building.path
        for name in (MEMORY, DEVICE_STATE):
            os.chmod(f"{path}/{name}", 0o444)
        size = sum(os.stat(f"{path}/{name}").st_blocks * 512 for name in (MEMORY, DEVICE_STATE))
        info = Listed(
            digest=building.digest, config=config, hypervisor=hypervisor, made=time.time(), bytes=size
        )
        with open(f"{path}/{INFO}", "x", encoding="utf-8") as file:
            json.dump(asdict(info), file)
        final = f"{self.directory}/{building.digest}"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{final}{_FAILED}")
        if not os.path.exists(final):
            os.rename(path, final)
        return final

    def end(self, building: Building) -> None:
        """Remove what was not finished, and let the next one build. Idempotent."""
        if building.lock >= 0:
            try:
                remove_tree(building.path)
            finally:
                os.close(building.lock)
                building.lock = -1

    def forget_others(self, digest: str, config: str) -> None:
        """The class of this configuration is this one now: those that it had before go."""
        with self._locked():
            for one in self.listed():
                if one.config == config and one.digest != digest:
                    remove_tree(f"{self.directory}/{one.digest}")

    def listed(self) -> list[Listed]:
        """All templates, oldest first."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.directory):
                with contextlib.suppress(OSError, ValueError, TypeError):
                    one = Listed(**json.loads(read_small(f"{self.directory}/{name}/{INFO}", _MAX_INFO)))
                    found += [one] if one.digest == name else []
        return sorted(found, key=lambda one: one.made)

    def destroy(self) -> int:
        """Remove everything; how many templates that were. Raises BusyError."""
        if not os.path.isdir(self.directory):
            return 0
        number = len(self.listed())
        with self._locked():
            for name in os.listdir(self.directory):
                if os.path.isdir(f"{self.directory}/{name}"):
                    remove_tree(f"{self.directory}/{name}")
                elif name.endswith(_FAILED):
                    os.unlink(f"{self.directory}/{name}")
        return number

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self._lock()
        try:
            yield
        finally:
            os.close(lock)

    def _lock(self) -> int:
        """The descriptor that has the store's lock until it is closed. Raises BusyError."""
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            self._check()
            lock = os.open(f"{self.directory}/{_LOCK}", _LOCK_FLAGS, 0o600)
        except OSError as error:
            raise HostError(f"{self.directory}: {error.strerror}", phase="template") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise BusyError(
                f"another process makes or removes a template in {self.directory}", phase="template"
            ) from None
        return lock

    def _check(self) -> None:
        info = os.lstat(self.directory)
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
            raise HostError(
                f"{self.directory} is not a directory that only user {os.geteuid()} can write",
                phase="template",
                hint="remove it, or set template_path in [hypervisor.NAME.factory] to another one",
            )
