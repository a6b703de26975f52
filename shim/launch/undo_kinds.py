"""How each kind of journal record is undone, those that belong to one wing included.

What: `release(record)` for `delete` and for a daemon that finds an earlier one's remains.
Why here: this is the highest place that undoes; what a record means is said by the wing that makes it, and
whoever merely keeps journals (`shim.state`) knows of no wing.
Invariants: those of `shim.state.releases`; a wing is imported when a record of its kind is released.
"""

from __future__ import annotations

from shim.state import releases
from shim.state.journalfile import Record
from shim.state.releases import KINDS, Facts

__all__ = ["release"]


def _tap(facts: Facts, _timeout: float) -> None:
    """A pod's link and what joined it to a VM."""
    from shim.resources.network.endpoint import release_facts

    release_facts(facts)


def _poststop(facts: Facts, timeout: float) -> None:
    """The poststop hooks that a dead shim owes."""
    from shim.hooks.owed import run_poststop

    run_poststop(facts, timeout)


def _cgroups(facts: Facts, timeout: float) -> None:
    """The cgroups of a sandbox on the host."""
    from shim.resources.host_cgroup import release as remove

    remove(facts, timeout)


def _remote_vm(facts: Facts, timeout: float) -> None:
    """A VM on another machine."""
    from devices.errors import HypervisorError
    from hypervisors.remote.service import stop_blocking

    try:
        stop_blocking(str(facts["socket"]), str(facts["vm"]), timeout)
    except HypervisorError as error:
        raise releases.ReleaseError(str(error)) from error


_KINDS = {**KINDS, "cgroups": _cgroups, "poststop": _poststop, "remote-vm": _remote_vm, "tap": _tap}


def release(record: Record, timeout: float = 2.0) -> None:
    """Undo one acquisition. Raises ReleaseError or OSError. Blocks."""
    releases.release(record, timeout, kinds=_KINDS)
