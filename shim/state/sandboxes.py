"""The sandboxes of this host, whoever's they are: for those who list them, choose one, or must name an owner.

What: `all_sandboxes` reads the state directories of both layouts.
Invariants: only reads; a directory whose journal does not say whose it is, is listed without an owner. Who
acts on one compares identities; nothing is anybody's because of its id.
"""

from __future__ import annotations

import os

from shim.state import identity as places
from shim.state.identity import Identity, is_key
from shim.state.journalfile import read_identity

__all__ = ["Found", "all_sandboxes", "owners_of", "places_of"]


class Found:
    """One state directory.

    `version`: of its journal; 0 if that cannot be read. `identity`: None where the journal does not say, as
    those of version 1. `name`: the sandbox's id, or the key where nothing tells it.
    """

    __slots__ = ("directory", "identity", "name", "share", "version")

    def __init__(self, directory: str, share: str, version: int, identity: Identity | None) -> None:
        self.directory = directory
        self.share = share
        self.version = version
        self.identity = identity
        self.name = identity.sandbox_id if identity is not None else os.path.basename(directory)

    def has_place_for(self, container_id: str) -> bool:
        """Whether a container of this id has, or had, files in what it shares with its guest."""
        return any(map(os.path.isdir, places_of(self.share, container_id)))

    def __str__(self) -> str:
        """For messages: whose it is, as far as that is known."""
        if self.identity is not None:
            return str(self.identity)
        return f"{self.name} in {self.directory}, which does not say whose it is"


def all_sandboxes(
    run: str = places.RUN_DIR, kata: str = places.KATA_RUN, shared: str = places.SHARED_ROOT
) -> list[Found]:
    """All that have a state directory, in the order of their directories' names."""
    found = []
    for name in _names(run):
        directory = os.path.join(run, name)
        if is_key(name) and _is_directory(directory):
            found.append(Found(directory, os.path.join(shared, name), *read_identity(directory)))
    for name in _names(kata):
        directory = os.path.join(kata, name)
        if _is_directory(directory) and os.path.lexists(os.path.join(directory, "journal")):
            found.append(Found(directory, os.path.join(shared, name), *read_identity(directory)))
    return found


def places_of(share: str, container_id: str) -> list[str]:
    """Where a container's files are in a share (`shim.resources.shared_dir`), in either of its forms."""
    forms = [("rw", "passthrough"), ("ro", "passthrough"), ("roots", "rw"), ("roots", "ro")]
    return [os.path.join(share, *form, container_id) for form in forms]


def owners_of(sandbox_id: str) -> list[Found]:
    """Those that have this id."""
    return [each for each in all_sandboxes() if each.name == sandbox_id]


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _is_directory(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)
