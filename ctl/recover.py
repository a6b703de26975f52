"""`kata-ctl recover`: a new shim for a sandbox whose VM outlived the old one.

What: finds the sandboxes, and runs the shim that each was started by, with the action `recover`
(`shim.launch.takeover`), which says how it went.
Why that program and not this process: the daemon is a shim like any other, of its version
and with its command line.
Invariants: a sandbox whose shim lives is as it should be: with --all that is no error, and nothing is done.
"""

from __future__ import annotations

import os
import subprocess
import sys

from ctl.which import Which, name_of, only
from devices.errors import CallerError, HostError
from devices.plain import plain
from shim.launch.order import Plight
from shim.launch.takeover import Unrecoverable, argv_of, judge
from shim.state.sandboxes import Found, all_sandboxes

__all__ = ["run"]

_SLOW = 2.0  # seconds after which one says what one waits for
_LIMIT = 90.0  # seconds; the program itself gives up before


class _Listed:
    """A sandbox as `ctl.which` looks for it."""

    def __init__(self, found: Found) -> None:
        assert found.identity is not None
        self.found = found
        self.identity = found.identity
        self.id = found.identity.sandbox_id
        self.namespace = found.identity.namespace
        self.containerd = found.identity.address


def run(wanted: Which | None) -> int:
    """One, or (None) all whose shim is dead and whose VM was kept; the exit code."""
    listed = [_Listed(found) for found in all_sandboxes() if found.identity is not None]
    if wanted is not None:
        return _one(_find(wanted, listed), listed)
    code = 0
    for each in listed:
        try:
            plight = judge(each.identity)
        except Unrecoverable as why:
            if not why.lives:  # `delete` is the word for those: containerd says it
                print(f"{plain(name_of(each, listed))}: left: {plain(str(why))}")
            continue
        try:
            _recover(plight, plain(name_of(each, listed)))
        except HostError as error:
            print(f"kata-ctl: {error}", file=sys.stderr)
            code = 1
    return code


def _find(wanted: Which, listed: list[_Listed]) -> _Listed:
    try:
        return only(wanted, listed, "recover", f"{wanted} fits several sandboxes")
    except LookupError:
        raise CallerError(
            f"there is no sandbox {wanted}",
            phase="recover",
            code="NOT_FOUND",
            hint="`kata-ctl list` shows those of this host",
        ) from None


def _one(each: _Listed, listed: list[_Listed]) -> int:
    name = plain(name_of(each, listed))
    try:
        plight = judge(each.identity)
    except Unrecoverable as why:
        hint = "" if why.lives else "docs/recovery.md says what can be recovered, and when"
        raise CallerError(
            f"{name} cannot be recovered: {why}", phase="recover", code="FAILED_PRECONDITION", hint=hint
        ) from None
    _recover(plight, name)
    return 0


def _recover(plight: Plight, name: str) -> None:
    """Raises HostError, with what the new shim says."""
    process = subprocess.Popen(
        argv_of(plight),
        cwd=plight.bundle,
        env={**os.environ, **plight.saved.daemon.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        _, said = process.communicate(timeout=_SLOW)
    except subprocess.TimeoutExpired:
        print(f"{name}: waiting for its VM and its agent ...", flush=True)
        try:
            _, said = process.communicate(timeout=_LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise HostError(f"{name}: no answer within {_LIMIT:.0f} s", phase="recover") from None
    if process.returncode:
        text = plain(said.decode("utf-8", "replace").strip()) or f"exit code {process.returncode}"
        raise HostError(
            f"{name}: {text}", phase="recover", hint="its VM is as it was; the log of its bundle may say more"
        )
    print(f"{name}: recovered")
