"""What a dead shim has left of its sandbox, undone by its journal.

What: `Remains` is that of one state directory, which the caller has locked; `undo` releases what the journal
records, ends strays, removes what lies at known places. `clear` does it for a daemon that starts.
Why apart from `delete`: the next daemon of the same sandbox does the same if `delete` never came.
Invariants:
- Processes first, the last acquired first: they hold what the other records name.
- What was released is dropped from the journal before the time is up, so the next one goes on from there.
- After damage only what came before it is released, and every marked process is ended; then the journal stays
  as evidence, since what else was acquired nobody knows. It says so each time until a person removes it.
- A tree is removed only when no process of the sandbox is known to live, and never across a mount.
"""

from __future__ import annotations

import os
import time

from shim.launch.strays import end_strays
from shim.launch.undo_kinds import release
from shim.state import journalfile
from shim.state.identity import Identity
from shim.state.journalfile import History, JournalError, Record
from shim.state.names import remove_link
from shim.state.procfs import is_running
from shim.state.releases import ReleaseError
from shim.state.statedir import Owned, StateDir

__all__ = ["NotOurs", "Remains", "clear", "daemon_of", "detach", "old_home", "read", "remove"]

_CLEAR_LIMIT = 20.0  # seconds for a daemon that starts; containerd waits for its Create as long as it likes
_RESERVE = 0.3  # seconds to write the journal anew and to remove what lies at known places
_SAVE_EVERY = 1.0
_EVIDENCE = frozenset({"journal", "journal.damaged"})


def read(directory: str) -> History:
    """The journal there; one that cannot be read at all counts as damaged in its first line."""
    try:
        return journalfile.load(directory)
    except (JournalError, OSError) as error:
        history = History()
        history.damage = str(error)
        return history


def daemon_of(history: History) -> Record | None:
    """The record of the daemon if it still runs."""
    for record in history.records:
        if record.kind == "process" and record.facts.get("name") == "shim":
            pid, start = record.facts.get("pid"), record.facts.get("start")
            if isinstance(pid, int) and isinstance(start, int) and is_running(pid, start):
                return record
    return None


class NotOurs(Exception):  # noqa: N818  (a state, not a fault)
    """The journal says that it is another sandbox's; the text says whose."""


class Remains:
    """See the module's docstring. Raises NotOurs unless what is there is that of the sandbox `identity`.

    `spare`: see `shim.launch.strays.end_strays`. `problems`: what could not be undone, in words.
    """

    def __init__(self, home: StateDir, share: str, identity: Identity, *, spare: int = 0) -> None:
        self.home = home
        self.history = read(home.path)
        if self.history.identity not in (None, identity):
            raise NotOurs(f"{home.path} is that of {self.history.identity}; it is left alone")
        self.problems: list[str] = []
        self._share = share
        self._key = identity.key
        self._spare = spare
        self._saved = time.monotonic()

    def undo(self, until: float) -> bool:
        """Release everything; whether all of it is, so that the state directory may go."""
        history = self.history
        left = {record.number: record for record in history.records}
        processes = [record for record in history.records if record.kind == "process"]
        others = [record for record in history.records if record.kind != "process"]
        self._release(processes, left, until)
        alive: list[str] = []
        if left.keys() & {r.number for r in processes} or history.damage or _unseen(processes):
            alive = end_strays(self._key, until, spare=self._spare)
            self.problems += alive
        alive += [str(record) for record in processes if record.number in left]
        detach(self._share, until, self.problems)
        self._release(others, left, until)
        if not alive:
            remove(self._share, until, self.problems)
        if history.damage:
            self.problems.append(_told(history.damage, self.home.path))
        if not left and not self.problems:
            return True
        self._save(left)
        if not alive:
            self._sweep()
        return False

    def release_of(self, container_id: str, until: float) -> None:
        """Release what the journal records for one container of the pod."""
        left = {record.number: record for record in self.history.records}
        mine = [r for r in self.history.records if r.facts.get("container") == container_id]
        self._release(mine, left, until)
        if mine:
            self._save(left)

    def _release(self, records: list[Record], left: dict[int, Record], until: float) -> None:
        for done, record in enumerate(reversed(records)):
            time_left = until - _RESERVE - time.monotonic()
            if time_left <= 0:
                self.problems.append(
                    f"{len(records) - done} of {len(records)} acquisitions are left: no more time;"
                    " the next delete goes on"
                )
                return
            try:
                release(record, max(0.05, min(2.0, time_left)))
                del left[record.number]
            except (ReleaseError, OSError) as error:
                self.problems.append(f"{record.kind}: {error}")
            if time.monotonic() - self._saved > _SAVE_EVERY:
                self._save(left)

    def _save(self, left: dict[int, Record]) -> None:
        """Have the journal record only what is left; one that is damaged is kept as it was beside it."""
        history = self.history
        self._saved = time.monotonic()
        if not history.header:
            return  # it says nothing that could be written anew
        keep = bool(history.damage)
        lines = [journalfile.encode_record(record) for record in left.values()]
        try:
            os.close(journalfile.rewrite(self.home.path, history.header, lines, keep=keep))
        except OSError as error:
            self.problems.append(f"cannot write {self.home.path}/journal: {error.strerror}")

    def _sweep(self) -> None:
        try:
            self.home.empty(_EVIDENCE)
        except OSError as error:
            self.problems.append(str(error))


def _unseen(processes: list[Record]) -> bool:
    """Whether one of them was never seen to run: it may, unknown to the journal."""
    return any("pid" not in record.facts for record in processes)


def _told(damage: str, directory: str) -> str:
    return (
        f"the journal is damaged: {damage}; what came before is released, what came after is not known;"
        f" try: see there what it may still hold (taps, cgroups, drivers), then remove {directory}"
    )


def remove(path: str, until: float, problems: list[str]) -> None:
    """Remove a tree of ours, and what is still mounted in it; nothing of it if the time is up before."""
    if not os.path.lexists(path) or not detach(path, until, problems):
        return
    from shim.state.safefs import remove_tree

    try:
        remove_tree(path)
    except OSError as error:
        problems.append(str(error))


def detach(path: str, until: float, problems: list[str]) -> bool:
    """Detach what is mounted at and below `path`: the outermost mounts, and with each, by the same call of
    the kernel, all below it (a thousand one by one take seconds). Whether nothing is mounted there then."""
    if not os.path.lexists(path):
        return True
    from devices.mounts import mounts_below, unmount

    try:
        while entries := mounts_below(path):
            targets = {entry.target for entry in entries}
            for target in sorted(targets, key=len):
                if time.monotonic() > until:
                    problems.append(f"{len(targets)} mounts below {path} are left: no more time")
                    return False
                if not _is_below(target, targets):
                    unmount(target)
    except OSError as error:
        problems.append(f"cannot unmount below {path}: {error.strerror}")
        return False
    return True


def _is_below(path: str, others: set[str]) -> bool:
    """Whether one of the directories above it is among them."""
    while len(path) > 1:
        path = os.path.dirname(path)
        if path in others:
            return True
    return False


def old_home(identity: Identity) -> str:
    """The state directory that an older shim (journal version 1) made for this very sandbox, or "".

    Its journal does not say whose it is; the socket that it recorded does.
    """
    path = identity.link
    if os.path.islink(path) or not os.path.isdir(path):
        return ""
    history = read(path)
    ours = history.version == 1 and os.path.basename(history.socket) == identity.digest
    return path if ours else ""


def clear(identity: Identity, home: StateDir, start: int) -> list[str] | None:
    """For the daemon that was started at `start` and has the lock: undo what an earlier one of this sandbox
    left; what could not be undone, None if there was nothing. Blocks."""
    until = time.monotonic() + _CLEAR_LIMIT
    problems: list[str] = []
    found = False
    if os.listdir(home.path):
        found = True
        try:
            remains = Remains(home, identity.share_dir, identity, spare=start)
        except NotOurs as whose:
            return [str(whose)]
        if remains.undo(until):
            remove_link(identity.link, identity.state_dir)
            home.empty()
        problems += remains.problems
    old = old_home(identity)
    if old:
        found = True
        problems += _clear_old(old, identity, until)
    return problems if found else None


def _clear_old(path: str, identity: Identity, until: float) -> list[str]:
    try:
        home = StateDir.find(path, 1.0)
    except Owned:
        return [f"{path} is in use"]
    if home is None:
        return []
    try:
        share = os.path.join(os.path.dirname(identity.share_dir), identity.sandbox_id)
        remains = Remains(home, share, identity)
        if daemon_of(remains.history) is not None:
            return [f"an older shim of {identity} still runs"]
        if remains.undo(until):
            home.remove()
        return remains.problems
    finally:
        home.close()
