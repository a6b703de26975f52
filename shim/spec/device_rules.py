"""The device rules of a spec (linux.resources.devices), asked about one device after the other.

What: `DeviceRules` answers what the rules leave of a device, whether one names it, and whether they open all.
Why an index: a spec may have thousands of devices and tens of thousands of rules; to go through the rules for
each device took 45 seconds.
Invariants: the answers are those of going through the rules in their order, the last one that fits a device
deciding for each of "r", "w" and "m". A device costs eight look-ups, however many rules there are.
Source: runtime-spec `config-linux.md` (allowed device list); no type, or "a", means any, as does no number
or -1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

__all__ = ["DeviceRules", "device_rules"]

_ANY = -1
_LETTERS = "rwm"


class DeviceRules:
    """See the module's docstring. `rules` as `shim.spec.documents` gives them."""

    def __init__(self, rules: Sequence[Mapping[str, Any]]) -> None:
        #: (type, major, minor), each of which may be "any" -> letter -> (index of the last rule, it allows).
        self._last: dict[tuple[str, int, int], dict[str, tuple[int, bool]]] = {}
        self._named: set[tuple[str | None, int | None, int | None]] = set()
        self.open = False
        """A rule opens all devices: then containerd lists those of the host without being asked for each."""
        for index, rule in enumerate(rules):
            allow = rule.get("allow", False)
            kind = rule.get("type") or "a"
            major, minor = rule.get("major", _ANY), rule.get("minor", _ANY)
            last = self._last.setdefault((kind, major, minor), {})
            last.update(dict.fromkeys(rule.get("access") or _LETTERS, (index, allow)))
            if allow:
                self._named.add((rule.get("type"), rule.get("major"), rule.get("minor")))
                self.open = self.open or kind == "a"

    def access(self, kind: str, major: int, minor: int) -> frozenset[str]:
        """What the rules leave of this device, of "r", "w" and "m"."""
        fitting = [
            self._last[key] for key in product(("a", kind), (_ANY, major), (_ANY, minor)) if key in self._last
        ]
        found = set()
        for letter in _LETTERS:
            _, allow = max((last[letter] for last in fitting if letter in last), default=(0, False))
            if allow:
                found.add(letter)
        return frozenset(found)

    def name(self, kind: str, major: int, minor: int) -> bool:
        """One allows this device by its very type and number."""
        return (kind, major, minor) in self._named


def device_rules(spec: Mapping[str, Any]) -> DeviceRules:
    """Those of a spec."""
    return DeviceRules(((spec.get("linux") or {}).get("resources") or {}).get("devices") or ())
