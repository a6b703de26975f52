"""`make install` puts everything in place below DESTDIR; `make uninstall` takes exactly that away."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from testing.guest import PROJECT, guest_files


def _make(target: str, destination: Path) -> str:
    done = subprocess.run(
        [str(PROJECT / "scripts/install.sh"), target],
        check=True,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "DESTDIR": str(destination), "PREFIX": "/opt/kata-shim"},
    )
    return done.stdout


def _files(destination: Path) -> set[str]:
    return {
        str(path.relative_to(destination))
        for path in destination.rglob("*")
        if path.is_file() or path.is_symlink()
    }


@pytest.mark.kata_only
def test_install_and_uninstall(tmp_path: Path) -> None:
    assert all(path.exists() for path in guest_files().values()), "run `make guest`"
    (tmp_path / "usr/local/bin").mkdir(parents=True)
    (tmp_path / "usr/local/bin/other").write_text("not ours")
    _make("install", tmp_path)
    shim = tmp_path / "usr/local/bin/containerd-shim-kata-v2"
    etc = tmp_path / "etc/kata-containers/configuration.toml"
    share = tmp_path / "opt/kata-shim/share"
    assert os.access(shim, os.X_OK)
    units = [tmp_path / "lib/systemd/system" / f"kata-shim-zygote.{kind}" for kind in ("socket", "service")]
    for path in (shim, tmp_path / "usr/local/bin/kata-ctl", *units):
        assert os.fsencode(tmp_path) not in path.read_bytes()
    # Client and socket unit name the same place.
    place = re.search(r"(?m)^ListenStream=(/run/kata-shim-zygote/\d+)$", units[0].read_text())
    assert place is not None
    assert place[1].encode() in shim.read_bytes()
    assert {path.name for path in guest_files().values()} <= {
        path.name for path in (share / "kata-containers").iterdir()
    }
    assert etc.read_text() == (share / "defaults/kata-containers/configuration.toml").read_text()
    # The installed package is complete: it runs without this checkout.
    python = tmp_path / "opt/kata-shim/venv/bin/python3"
    modules = "shim.launch.launcher, shim.launch.daemon, ctl, hypervisors.qemu.plugin"
    code = f"import {modules}; print(shim.launch.launcher.__file__)"
    out = subprocess.run([python, "-I", "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith(str(tmp_path))

    # A second install keeps what the administrator changed, and uninstall does too.
    etc.write_text(etc.read_text() + "# mine\n")
    assert "kept" in _make("install", tmp_path)
    assert etc.read_text().endswith("# mine\n")
    assert "kept" in _make("uninstall", tmp_path)
    assert _files(tmp_path) == {"usr/local/bin/other", "etc/kata-containers/configuration.toml"}

    # Unchanged, it goes too.
    etc.unlink()
    _make("install", tmp_path)
    _make("uninstall", tmp_path)
    assert _files(tmp_path) == {"usr/local/bin/other"}
