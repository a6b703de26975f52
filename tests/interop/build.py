"""Builds the Go peer (`peer/`), against Debian's ttrpc 1.1 and, if it can be had, ttrpc 1.2 with streams.

What: `peer(streams=False)` returns the path of the program; built once, into build/interop, which also
keeps Go's cache. ttrpc 1.2 is two source packages of Debian sid that compile with Debian 12's Go and
libraries: they are downloaded, checked against their hashes, and unpacked there, never installed.
Raises `Unavailable` with what is missing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import urllib.request
from pathlib import Path

SOURCE = Path(__file__).parent / "peer"
BUILD = Path(__file__).parents[2] / "build" / "interop"
GOCODE = Path("/usr/share/gocode")
MIRRORS = (
    "mirror:/",
    "mirror:/",
)
PACKAGES = {
    "pool/main/g/golang-gogottrpc/golang-github-containerd-ttrpc-dev_1.2.7-1_all.deb": (
        "6e3462238cf8258c31e5cec47ff7fc00ce5785711215301df4828feccc151bb6"
    ),
    "pool/main/g/golang-github-containerd-log/golang-github-containerd-log-dev_0.1.0-2_all.deb": (
        "675676bc6d90cd22a28b2d245cadc0dff32d01283e7f4a99a8d69acc40139e5a"
    ),
}


class Unavailable(Exception):  # noqa: N818  (the reason of a skip, not a fault)  # noqa: N818  (a state of the machine, not a fault)
    """Something that the build needs is not on this machine."""


def _fetch(path: str, digest: str) -> Path:
    target = BUILD / path.rsplit("/", 1)[1]
    if target.exists() and hashlib.sha256(target.read_bytes()).hexdigest() == digest:
        return target
    reasons = []
    for mirror in MIRRORS:
        try:
            with urllib.request.urlopen(mirror + path, timeout=30) as answer:
                data = answer.read()
        except OSError as error:
            reasons.append(f"{mirror}: {error}")
            continue
        if hashlib.sha256(data).hexdigest() == digest:
            target.write_bytes(data)
            return target
        reasons.append(f"{mirror}: another hash")
    raise Unavailable(f"{target.name} cannot be had: {'; '.join(reasons)}")


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
    gopath = str(GOCODE)
    if streams:
        unpacked = BUILD / "sid"
        for path, digest in PACKAGES.items():
            subprocess.run(["dpkg-deb", "-x", _fetch(path, digest), unpacked], check=True)
        gopath = f"{unpacked / 'usr/share/gocode'}:{gopath}"
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
