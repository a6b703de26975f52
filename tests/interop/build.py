"""Builds the Go peer (`peer/`), against Debian's ttrpc 1.1 and, if it can be had, ttrpc 1.2 with streams.

What: `peer(streams=False)` returns the path of the program; built once, into build/interop, which also
keeps Go's cache. Both ttrpcs are source packages, of Debian 12 and of sid, that compile with any Debian's Go
and libraries: `make setup` unpacks them below build/interop, never installed.
Raises `Unavailable` with what is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).parent / "peer"
BUILD = Path(__file__).parents[2] / "build" / "interop"
GOCODE = Path("/usr/share/gocode")
OLD, NEW = (BUILD / suite / "usr/share/gocode" for suite in ("bookworm", "sid"))


class Unavailable(Exception):  # noqa: N818  (the reason of a skip, not a fault)
    """Something that the build needs is not on this machine."""


def peer(*, streams: bool = False) -> Path:
    """The Go program, built if it is older than its source."""
    go = shutil.which("go")
    if go is None:
        raise Unavailable("Go is not installed (apt install golang-go golang-github-containerd-ttrpc-dev)")
    if not (GOCODE / "src/github.com/containerd/ttrpc").exists():
        raise Unavailable("Go's ttrpc is not installed (apt install golang-github-containerd-ttrpc-dev)")
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / ("peer-streams" if streams else "peer")
    newest = max(path.stat().st_mtime for path in SOURCE.iterdir())
    if program.exists() and program.stat().st_mtime > newest:
        return program
    ours = NEW if streams else OLD
    if not ours.exists():
        raise Unavailable(f"Go's ttrpc is not in {ours} (make setup fetches it)")
    gopath = f"{ours}:{GOCODE}"
    environment = {
        **os.environ,
        "GO111MODULE": "off",
        "GOPATH": gopath,
        "GOCACHE": str(BUILD / "cache"),
        "GOFLAGS": "-p=1",
        "CGO_ENABLED": "0",
    }
    sources = [str(path) for path in sorted(SOURCE.glob("*.go"))]
    tags = ["-tags", "streams"] if streams else []
    # `go build` of listed files ignores their build constraints, so only those that apply are listed.
    left_out = "unary.go" if streams else "streams.go"
    wanted = [path for path in sources if not path.endswith("/" + left_out)]
    built = subprocess.run(
        [go, "build", *tags, "-o", f"{program}.new", *wanted],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if built.returncode:
        raise RuntimeError(f"go build failed: {built.stderr}")
    Path(f"{program}.new").replace(program)
    return program
