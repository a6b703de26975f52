"""Processes of a sandbox that its journal does not know: found by what they carry, and ended.

What: `end_strays` kills the marked children of dead shims; `shim_of` tells whether a process is the shim of
a sandbox.
Why: between fork and the journal's next line a child runs whose pid nobody wrote down, and between its own
fork and its journal a daemon; and a journal can be damaged.
Invariants: nobody is killed for a path on his command line: an administrator may look at the sandbox's files.
What counts is the mark (`devices.mark`); in a jail, which begins with an empty environment, the jail's id
after `--id`, of a process that leads a session without a terminal, as our children do; and of a shim its own
command line, whole. Signals go by pidfd and start time.
"""

from __future__ import annotations

import os
import time

from devices.mark import mark_of
from shim.launch.flags import FlagError, parse
from shim.state.procfs import is_running, kill_process, start_time

__all__ = ["end_strays", "shim_of"]

_ROUNDS = 3  # one that is killed may just have started another


def end_strays(key: str, until: float, *, spare: int = 0) -> list[str]:
    """SIGKILL them all; what could not be ended by `until` (time.monotonic), in words.

    `spare`: children of the shim that was started at this time are its own affair.
    """
    for _ in range(_ROUNDS):
        found = _find(key, spare)
        if not found:
            return []
        for pid, start in found:
            kill_process(pid, start, max(0.05, min(1.0, until - time.monotonic())))
    return [f"process {pid} of this sandbox did not end after SIGKILL" for pid, _ in _find(key, spare)]


def _find(key: str, spare: int) -> list[tuple[int, int]]:
    """(pid, start time) of each."""
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        pid = int(name)
        try:
            start = start_time(pid)
            whose, shim = mark_of(pid)
            ours = _is_jailed(pid, key) if not whose else whose == key and shim != (spare or -1)
            if ours and is_running(pid, start):
                found.append((pid, start))
        except (OSError, ValueError):
            continue  # gone, or not ours to look at
    return found


def _is_jailed(pid: int, key: str) -> bool:
    """Whether it is a jailer of this sandbox, or what that became."""
    words = _command_line(pid)
    return _leads_session(pid) and any(
        word == f"--id={key}" or (word == "--id" and following == key)
        for word, following in zip(words, [*words[1:], ""], strict=True)
    )


def _leads_session(pid: int) -> bool:
    """Whether it leads a session, without a terminal."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()  # from the third on; the 6th and 7th count
    return int(fields[3]) == pid and int(fields[4]) == 0


def shim_of(pid: int, namespace: str, address: str, container_id: str) -> bool:
    """Whether that process is a shim which was started for this container. Raises OSError when it is gone."""
    words = _command_line(pid)
    for at, word in enumerate(words[:4]):  # an interpreter and its options come before
        if os.path.basename(word).startswith("containerd-shim-kata"):
            try:
                flags = parse(words[at + 1 :])
            except FlagError:
                return False
            told = (flags.namespace, flags.address, flags.id)
            return told == (namespace, address, container_id) and flags.action in (
                "start",
                "recover",
                "daemon",
                "",
            )
    return False


def _command_line(pid: int) -> list[str]:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return os.fsdecode(file.read(1 << 16)).split("\0")[:-1]
