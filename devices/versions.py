"""Which version a program is: asked once for each binary, not once for each start.

What: `version_of` gives what a program says of itself, from a small file below /run if this very binary was
asked before on this boot.
Why a file: one daemon serves one pod, so its memory is as short as the pod's life; and asking costs 5 to 30
ms, of which a start has few. Which arguments and operations a program takes depends on its version
(devices/share_fs.py, hypervisors/qemu/abilities.py).
Invariants: a binary is known by device, inode, time and size: one that was replaced is asked again. The
file is root's, replaced whole, and only ever saves time: one that is missing, broken or too large is
nothing but empty, and one that cannot be written is no error. A program that does not answer in time, or
says no version, has version ().
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass

from devices import strict_json
from devices.child import Child
from devices.confine import Confinement
from devices.errors import HostError
from devices.small_file import read_small
from devices.undo import UndoLog

__all__ = ["CACHE", "Version", "parse", "version_of"]

CACHE = "/run/kata-shim/versions.json"
_TIMEOUT = 5.0  # seconds for `PROGRAM --version`
_MOST = 64  # programs that are remembered
_MAX_BYTES = 64 << 10
_MAX_TEXT = 400  # characters of what a program says


@dataclass(frozen=True, slots=True)
class Version:
    """`numbers`: such as (10, 0, 13), () if it says none; `text`: its words, with line ends."""

    numbers: tuple[int, ...] = ()
    text: str = ""

    def __str__(self) -> str:
        return ".".join(map(str, self.numbers)) or "unknown"


def parse(text: str) -> Version:
    """The first dotted number of the words is the version."""
    found = re.search(r"(?<![\w.])v?(\d+(?:\.\d+)+)", text)
    return Version(tuple(map(int, found[1].split("."))) if found else (), text[:_MAX_TEXT])


async def version_of(path: str, undo: UndoLog) -> Version:
    """The version of the program at `path`. Raises HostError if it cannot be run."""
    try:
        facts = os.stat(path)
    except OSError as error:
        raise HostError(f"{path} cannot be run: {error.strerror}", phase="devices") from error
    identity = [facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_size]
    known = _read(CACHE)
    if path in known and known[path][:4] == identity:
        return parse(str(known[path][4]))
    version = await _ask(path, undo)
    if version.numbers:
        known.pop(path, None)
        kept = dict(list(known.items())[-(_MOST - 1) :])
        _write(CACHE, {**kept, path: [*identity, version.text]})
    return version


async def _ask(path: str, undo: UndoLog) -> Version:
    name = os.path.basename(path)
    child = await Child.spawn([path, "--version"], name=name, undo=undo, confinement=Confinement())
    try:
        await child.wait(_TIMEOUT)
    except TimeoutError:
        return Version()
    finally:
        await child.kill()
    return parse(child.stderr_tail())


def _read(cache: str) -> dict[str, list[object]]:
    """Path -> [device, inode, time, size, text]; what makes no sense is left out."""
    try:
        found = strict_json.parse(read_small(cache, _MAX_BYTES))
    except (OSError, strict_json.JsonError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        path: entry
        for path, entry in found.items()
        if isinstance(entry, list) and len(entry) == 5 and isinstance(entry[4], str)
    }


def _write(cache: str, known: dict[str, list[object]]) -> None:
    """Replace it whole: whoever reads meanwhile has the old one or the new one."""
    scratch = f"{cache}.{os.getpid()}"
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(cache), mode=0o700, exist_ok=True)
        try:
            descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(known, file)
            os.replace(scratch, cache)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(scratch)
            raise
