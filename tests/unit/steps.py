"""Lets a test act between any two system calls of the code under test.

What: `Steps` counts the calls that look at, open or mount something by a path or a descriptor, whoever makes
them, and runs `act` just before the one with the number `at`. A run without one counts them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from devices import syscalls

__all__ = ["Steps"]

_CALLS = (
    "open",
    "chown",
    "mkfifo",
    "stat",
    "lstat",
    "fstat",
    "listdir",
    "scandir",
    "readlink",
    "pread",
    "mkdir",
    "unlink",
    "rmdir",
)


class Steps:
    """`opened`: the kinds of files that were opened, not merely found, by `os.open` or openat2."""

    def __init__(self, act: Callable[[], None] = lambda: None, at: int = 0) -> None:
        self.count = 0
        self.opened: list[int] = []
        self._act = act
        self._at = at
        self._inside = False

    def step(self) -> None:
        """One more: for what is a step of the test's own, such as a call of the guest's."""
        if self._inside:
            return
        self.count += 1
        if self.count == self._at:
            self._inside = True
            try:
                self._act()
            finally:
                self._inside = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count, and act, while this lasts."""
        with pytest.MonkeyPatch.context() as patch:
            fstat = os.fstat
            for name in _CALLS:
                patch.setattr(os, name, self._wrapped(getattr(os, name), fstat if name == "open" else None))
            libc = syscalls._libc
            for name in ("syscall", "mount", "umount2"):
                patch.setattr(libc, name, self._wrapped(getattr(libc, name), None))
            yield

    def _wrapped(self, call: Callable[..., Any], fstat: Callable[[int], os.stat_result] | None) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.step()
            result = call(*args, **kwargs)
            if fstat is not None and not self._inside:
                self.opened.append(fstat(result).st_mode)
            if isinstance(result, int) and result < 0:
                ctypes.set_errno(ctypes.get_errno())  # nothing in between may change it
            return result

        return wrapped
