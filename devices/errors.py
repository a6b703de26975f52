"""The errors of kata-shim: one root, and one class for each owner of a fault.

What: every error that can reach containerd or an operator derives from `KataError` and says whose
fault it is (its class), in which phase it happened, why, and what to try.
Why here: `devices` is the lowest layer that raises them; nothing imports upwards, so the classes
live at the bottom and `shim.errors` is only the place where they become ttrpc statuses.
Invariants: `str(error)` is one paragraph without newlines, and plain (`devices.plain`) whatever it quotes;
`code` is a name of google.rpc.Code.

    KataError
    +-- ConfigError       the administrator's file or annotation is wrong
    +-- HostError         this host lacks something (binary, device, kernel feature, memory)
    +-- HypervisorError   the VMM refused, died or did not answer
    |   +-- UnsupportedByHypervisor   the VMM says beforehand that it cannot
    +-- GuestError        the guest or its agent failed
    +-- CallerError       the request is wrong (unknown id, illegal state, bad bundle)
    +-- BugError          ours
"""

from __future__ import annotations

from devices.plain import plain

__all__ = [
    "BugError",
    "CallerError",
    "ConfigError",
    "GuestError",
    "HostError",
    "HypervisorError",
    "KataError",
    "UnsupportedByHypervisor",
]


def _one_line(text: str) -> str:
    return " ".join(plain(text).split())


class KataError(Exception):
    """Root of all errors. Not raised itself.

    `phase` is a short name such as "boot", `cause` one sentence, `hint` what to try, `code` the name
    of a google.rpc.Code such as "NOT_FOUND", `details` further evidence by name: the VMM's last
    stderr lines, the guest console's last lines.
    """

    default_code = "UNKNOWN"
    owner = "kata-shim"

    def __init__(
        self,
        cause: str,
        *,
        phase: str = "",
        hint: str = "",
        code: str = "",
        details: dict[str, str] | None = None,
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.phase = phase
        self.hint = hint
        self.code = code or self.default_code
        self.details = dict(details or {})

    def with_context(
        self, *, phase: str = "", hint: str = "", details: dict[str, str] | None = None
    ) -> KataError:
        """Fill in what is still unknown on the way up, and return the same error."""
        self.phase = self.phase or phase
        self.hint = self.hint or hint
        for name, text in (details or {}).items():
            self.details.setdefault(name, text)
        return self

    def __str__(self) -> str:
        parts = [f"{self.phase}: {self.cause}" if self.phase else self.cause]
        parts += [f"{name}: {text}" for name, text in self.details.items() if text.strip()]
        if self.hint:
            parts.append(f"try: {self.hint}")
        return "; ".join(_one_line(part) for part in parts)


class ConfigError(KataError):
    """The configuration is wrong: file, line and key belong in the cause.

    `key`: a key of the section in question, from who knows no file (a plugin): the loader adds the place.
    """

    default_code = "INVALID_ARGUMENT"
    owner = "configuration"

    def __init__(self, cause: str, *, key: str = "", phase: str = "", hint: str = "", code: str = "") -> None:
        super().__init__(cause, phase=phase, hint=hint, code=code)
        self.key = key


class HostError(KataError):
    """The host lacks what the sandbox needs."""

    default_code = "FAILED_PRECONDITION"
    owner = "host"


class HypervisorError(KataError):
    """The VMM refused, died, or did not answer in time."""

    default_code = "UNAVAILABLE"
    owner = "hypervisor"


class UnsupportedByHypervisor(HypervisorError):  # noqa: N818  (the name is the design's)
    """The VMM cannot do this, and says so before anything is attempted."""

    default_code = "UNIMPLEMENTED"

    def __init__(self, hypervisor: str, what: str) -> None:
        super().__init__(f"{hypervisor} does not support {what}")


class GuestError(KataError):
    """The guest or its agent failed. Its text is the guest's: bounded, never trusted."""

    default_code = "UNKNOWN"
    owner = "guest"


class CallerError(KataError):
    """The request cannot be served as it is: unknown id, wrong state, malformed bundle."""

    default_code = "FAILED_PRECONDITION"
    owner = "caller"


class BugError(KataError):
    """A broken promise of our own code."""

    default_code = "INTERNAL"
