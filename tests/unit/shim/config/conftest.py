"""What the tests of the configuration share: a hypervisor plugin of their own and a writer of files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from devices.errors import ConfigError
from shim.config import Config, load_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A section with one field of each kind."""

    path: str = ""
    kernel: str = ""
    initrd: str = ""
    image: str = ""
    shared_fs: str = "virtio-fs"
    virtio_fs_daemon: str = ""
    seccomp_sandbox: str = ""
    default_vcpus: float = 1.0
    default_memory: int = 0
    enable_debug: bool = False
    virtio_fs_extra_args: tuple[str, ...] = ()


class Plugin:
    """Adjusts one value and refuses another, and counts what it was asked."""

    name = "qemu"
    section = Section

    def __init__(self) -> None:
        self.validated: list[Section] = []

    def adjust_config(self, section: Section) -> Section:
        return replace(section, default_memory=section.default_memory or 128)

    def validate_config(self, section: Section) -> None:
        self.validated.append(section)
        if section.default_memory == 13:
            raise ConfigError("13 MiB bring bad luck")


class Files:
    """Writes configuration files below a directory and loads them with the test's plugin."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.plugin = Plugin()
        self.asked: list[str] = []

    @property
    def base(self) -> Path:
        return self.directory / "configuration.toml"

    def write(self, text: str, name: str = "configuration.toml") -> Path:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def get_plugin(self, name: str) -> Any:
        self.asked.append(name)
        return self.plugin

    def load(self, text: str | None = None, **arguments: Any) -> Config:
        if text is not None:
            self.write(text)
        return load_config(str(self.base), get_plugin=self.get_plugin, **arguments)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[[str], str]:
    def make(name: str) -> str:
        path = tmp_path / name
        path.write_bytes(b"")
        path.chmod(0o755)
        return str(path)

    return make
