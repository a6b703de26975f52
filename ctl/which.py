"""Which sandbox the user means: `NAMESPACE/ID`, `--namespace`, `--address`.

What: `Which` is what was asked for; `only` finds the one that it fits.
Why: an id is unique within one namespace of one containerd, and a host may have several of both.
Invariants: nothing is guessed: what fits several sandboxes is refused, and they are named.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from devices.errors import CallerError

__all__ = ["ANY", "Owned", "Which", "add_arguments", "name_of", "only", "which"]


class Owned(Protocol):
    """Something of a sandbox's. `namespace`, and `containerd` (its socket's address), are "" if unknown."""

    @property
    def id(self) -> str: ...
    @property
    def namespace(self) -> str: ...
    @property
    def containerd(self) -> str: ...


_T = TypeVar("_T", bound=Owned)


@dataclass(frozen=True, slots=True)
class Which:
    """What the user asked for; "" for what he did not say. `id` may be the beginning of one."""

    id: str = ""
    namespace: str = ""
    containerd: str = ""

    def __str__(self) -> str:
        """For messages."""
        where = f" of the containerd at {self.containerd}" if self.containerd else ""
        return repr("/".join(part for part in (self.namespace, self.id) if part)) + where

    def fits(self, what: Owned) -> bool:
        """Whether it can be this one's, whatever its id is."""
        return self.namespace in ("", what.namespace) and self.containerd in ("", what.containerd)


ANY = Which()


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of a command that takes a sandbox."""
    command.add_argument("--namespace", metavar="NAMESPACE", default="", help="containerd's, of the sandbox")
    command.add_argument("--address", metavar="PATH", default="", help="that of its containerd's socket")


def which(text: str | None, namespace: str = "", address: str = "") -> Which:
    """`text` is ID or NAMESPACE/ID. Raises CallerError if it contradicts `namespace`."""
    before, slash, after = (text or "").rpartition("/")
    if slash and namespace not in ("", before):
        raise CallerError(f"{text} is not of the namespace {namespace}", code="INVALID_ARGUMENT")
    return Which(after, before if slash else namespace, address.removeprefix("unix://"))


def name_of(what: Owned, among: Iterable[Owned] = ()) -> str:
    """NAMESPACE/ID, with the containerd where others in `among` have both in common."""
    text = f"{what.namespace or '?'}/{what.id}"
    twins = {each.containerd for each in among if (each.namespace, each.id) == (what.namespace, what.id)}
    return f"{text} ({what.containerd})" if len(twins) > 1 else text


def only(wanted: Which, found: Sequence[_T], phase: str, what: str) -> _T:
    """The one of `found` that fits; of several that are the same sandbox's, the first. Raises CallerError."""
    fitting = [each for each in found if wanted.fits(each)]
    exact = [each for each in fitting if each.id == wanted.id]
    fitting = exact or [each for each in fitting if each.id.startswith(wanted.id)]
    names = list(dict.fromkeys(name_of(each, fitting) for each in fitting))
    if len(names) > 1:
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise CallerError(
            f"{what}: {shown}",
            phase=phase,
            code="INVALID_ARGUMENT",
            hint="name one as NAMESPACE/ID, or add --namespace and --address",
        )
    if not fitting:
        raise LookupError
    return fitting[0]
