"""The text of the configuration: the base file and its drop-ins, merged.

What: `Source.read` reads the base file, then every `*.toml` of `config.d/` beside the file that the base
file really is (symlinks followed), in the order of their names. Tables are merged, every other value
is replaced, arrays too. `locate` tells which file set a key last, and its line.
Invariants: a file is regular, UTF-8 and at most MAX_BYTES long, else ConfigError; hidden files and
other endings (editors' copies) in config.d are left alone. It belongs to root or to who reads it, and not
everybody may write it.
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Mapping
from typing import Any

from devices.errors import ConfigError
from shim.config.fill import Table

__all__ = ["MAX_BYTES", "Source", "drop_in_directory"]

MAX_BYTES = 1 << 20


def drop_in_directory(base: str) -> str:
    """config.d beside the file that `base` really is."""
    return os.path.join(os.path.dirname(os.path.realpath(base)), "config.d")


class Source:
    """The merged content, and which file set what.

    `files` has the text of each file by its path, in the order of reading.
    """

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.values: dict[str, Any] = {}
        self._origin: dict[tuple[str, ...], str] = {}

    @classmethod
    def read(cls, base: str, texts: Mapping[str, str] | None = None) -> Source:
        """Read the base file and its drop-ins. Raises ConfigError.

        `texts`: what to take for the content of these files (real paths), which need not exist yet.
        """
        source = cls()
        texts = texts or {}
        real = os.path.realpath(base)
        source._add(real, texts)
        directory = drop_in_directory(real)
        try:
            names = set(os.listdir(directory))
        except (FileNotFoundError, NotADirectoryError):
            names = set()
        except OSError as error:
            raise ConfigError(f"{directory}: {error.strerror}", phase="config") from error
        names |= {os.path.basename(path) for path in texts if os.path.dirname(path) == directory}
        for name in sorted(names):
            if name.endswith(".toml") and not name.startswith("."):
                source._add(os.path.join(directory, name), texts)
        return source

    def _add(self, path: str, texts: Mapping[str, str]) -> None:
        text = texts[path] if path in texts else _read_text(path)
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            what, _, place = str(error).rstrip(")").partition(" (at line ")
            line, _, column = place.partition(", ")  # empty at the end of the document
            where = f"{path}:{line}" if line else path
            raise ConfigError(
                f"{where}: not TOML: {what}" + (f" ({column})" if column else ""),
                phase="config",
                hint="correct the syntax there",
            ) from error
        self.files[path] = text
        self._merge(self.values, values, (), path)

    def _merge(self, into: dict[str, Any], values: dict[str, Any], at: tuple[str, ...], path: str) -> None:
        for key, value in values.items():
            self._origin[(*at, key)] = path
            present = into.get(key)
            if isinstance(present, dict) and isinstance(value, dict):
                self._merge(present, value, (*at, key), path)
            else:
                into[key] = value

    def origin(self, *key: str) -> str:
        """The file that set a key, or the table it would be in, last; "" if none did."""
        found = (self._origin.get(key[:length]) for length in range(len(key), 0, -1))
        return next((file for file in found if file is not None), "")

    def locate(self, *key: str) -> tuple[str, int]:
        """(file, line) of a key or table; the first file and 0 if nothing names it."""
        from shim.config.position import find_line  # only when there is something to say

        file = self.origin(*key)
        return (file, find_line(self.files[file], key)) if file else (next(iter(self.files)), 0)

    def table(self, *name: str) -> Table:
        """A section by its path; an absent one is empty. Raises ConfigError if it is no table."""
        values: Any = self.values
        for part in name:
            values = values.get(part, {})
            if not isinstance(values, dict):
                file, line = self.locate(*name)
                raise ConfigError(f"{file}:{line}: {'.'.join(name)} must be a table", phase="config")
        return Table(".".join(name), values, lambda *key: self.locate(*name, *key))


def _check_file(path: str, info: os.stat_result) -> None:
    """Who may write what names the programs that run as root, is root: nobody else may."""
    if not stat.S_ISREG(info.st_mode):
        raise ConfigError(f"{path}: not a regular file", phase="config")
    if info.st_mode & stat.S_IWOTH:
        raise ConfigError(
            f"{path}: everybody may write it, and so choose what runs as root",
            phase="config",
            hint=f"chmod o-w {path}",
        )
    if info.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"{path}: it belongs to user {info.st_uid}, who could choose what runs as root",
            phase="config",
            hint=f"chown root {path}",
        )


def _read_text(path: str) -> str:
    try:
        # O_NONBLOCK: a FIFO in this place must not hang the shim.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            _check_file(path, os.fstat(fd))
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", phase="config") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes", phase="config")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error}", phase="config") from error
