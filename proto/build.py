"""Builds the Python modules and type stubs of the .proto files beside this one.

What: runs protoc (of grpcio-tools) with mypy-protobuf over every proto/*.proto, in name order, into
a temporary directory, and copies what changed to `proto/`. `--check` compares instead and fails
when a checked-in file differs from a fresh build, is missing, or belongs to no .proto file.
Why a module and not a recipe: the Makefile, CI and the tests call the same code.
Invariants: the output depends on the .proto files and the pinned tools only, so two builds are equal
byte for byte; files that did not change keep their time stamps.

    python -m proto.build [--check]
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
SUFFIXES = ("_pb2.py", "_pb2.pyi")


class BuildError(Exception):
    """protoc refused an input or is not installed; the text is for people."""


def compile_to(out: Path, package: Path = PACKAGE) -> dict[str, bytes]:
    """Compiles every .proto file of `package` below `out`; file name -> content.

    Raises BuildError when the tools are absent or a file does not compile; protoc writes the reason,
    with file and line, to stderr.
    """
    try:
        from grpc_tools import protoc
    except ImportError as error:
        raise BuildError(f"{error}; install the development tools: pip install grpcio-tools") from error
    plugin = Path(sysconfig.get_path("scripts")) / "protoc-gen-mypy"
    if not plugin.exists():
        raise BuildError(f"{plugin} is not there; install the development tools: pip install mypy-protobuf")
    well_known = Path(protoc.__file__).parent / "_proto"
    sources = sorted(path.name for path in package.glob("*.proto"))
    code = protoc.main(
        [
            "protoc",
            f"--proto_path={package.parent}",
            f"--proto_path={well_known}",
            f"--plugin=protoc-gen-mypy={plugin}",
            f"--python_out={out}",
            f"--mypy_out=quiet:{out}",
            *(f"{package.name}/{name}" for name in sources),
        ]
    )
    if code != 0:
        raise BuildError(f"protoc ended with code {code}")
    return {path.name: path.read_bytes() for path in sorted((out / package.name).iterdir())}


def checked_in(package: Path = PACKAGE) -> dict[str, bytes]:
    """The generated files as they lie in the repository; file name -> content."""
    return {
        path.name: path.read_bytes() for path in sorted(package.iterdir()) if path.name.endswith(SUFFIXES)
    }


def differences(fresh: dict[str, bytes], present: dict[str, bytes]) -> list[str]:
    """One line for each file that a fresh build would add, change or remove."""
    lines = []
    for name in sorted(fresh.keys() | present.keys()):
        if name not in present:
            lines.append(f"{name} is missing")
        elif name not in fresh:
            lines.append(f"{name} belongs to no .proto file")
        elif fresh[name] != present[name]:
            lines.append(f"{name} is not what its .proto file gives")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 built or equal, 1 different (--check), 2 could not build."""
    parser = argparse.ArgumentParser(prog="python -m proto.build", description="Build the protobuf modules.")
    parser.add_argument("--check", action="store_true", help="only say whether a build would change a file")
    check: bool = parser.parse_args(argv).check
    with tempfile.TemporaryDirectory(prefix="kata-proto-") as scratch:
        try:
            fresh = compile_to(Path(scratch))
        except BuildError as error:
            print(f"proto: {error}", file=sys.stderr)
            return 2
    present = checked_in()
    changed = differences(fresh, present)
    if check:
        for line in changed:
            print(f"proto: {line}", file=sys.stderr)
        if changed:
            print("proto: run `make proto` and check the result in", file=sys.stderr)
        return 1 if changed else 0
    for name, content in fresh.items():
        if present.get(name) != content:
            temporary = PACKAGE / f".{name}.new"
            temporary.write_bytes(content)
            os.replace(temporary, PACKAGE / name)
    for name in present.keys() - fresh.keys():
        (PACKAGE / name).unlink()
    print(f"proto: {len(fresh)} files, {len(changed)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
