"""Writes the executable `containerd-shim-kata-v2` for an installation.

    python -m shim.launch.launcher_script OUT --python /opt/kata-shim/venv/bin/python3 [--path DIR]...

What: a Python script that sets its module path itself and runs with `-I -S`.
Why not the console script that pip makes: that one loads `re` and runs `site` (the .pth files of the
environment), which more than doubles what containerd waits for `start`. Both work.
Invariants: isolated (-I): neither containerd's environment (PYTHONPATH) nor the working directory,
which is the bundle, can add modules. The file is written whole or not at all, mode 0755.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

__all__ = ["main", "render", "write"]

_MAX_SHEBANG = 255  # bytes of the first line that the kernel reads

_TEMPLATE = """\
{shebang}
# Written by shim.launch.launcher_script. containerd runs this for each container: start, delete.
import sys

sys.path[:0] = {paths!r}
from shim.launch.launcher import main

sys.exit(main())
"""


def render(python: str, paths: Sequence[str]) -> str:
    """The script's text. Raises ValueError if the kernel could not run it."""
    shebang = f"#!{python} -IS"
    if not python.startswith("/") or any(blank in python for blank in " \t\n"):
        raise ValueError(f"the interpreter's path must be absolute and without blanks: {python!r}")
    if len(os.fsencode(shebang)) > _MAX_SHEBANG:
        raise ValueError(f"the interpreter's path is too long for a #! line: {python!r}")
    for path in paths:
        if not path.startswith("/"):
            raise ValueError(f"module paths must be absolute: {path!r}")
    return _TEMPLATE.format(shebang=shebang, paths=list(paths))


def write(out: str, python: str, paths: Sequence[str]) -> None:
    """Write the script to the file `out`."""
    text = render(python, paths)
    temporary = f"{out}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(temporary, 0o755)  # noqa: S103  (a program)
    os.rename(temporary, out)


_ASK = """\
import importlib.util, os, sysconfig
spec = importlib.util.find_spec("shim.launch.launcher")
print(spec.origin.removesuffix("/shim/launch/launcher.py") if spec else "")
print(sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sep="\\n")
"""


def _default_paths(python: str) -> list[str]:
    """Where that interpreter finds this package (here, if it does not), and its environment's others.

    An editable installation is found by a .pth file, which -S does not read; so its place is written.
    """
    result = subprocess.run(
        [python, "-I", "-c", _ASK], capture_output=True, text=True, check=True, timeout=30
    )
    own, *packages = result.stdout.split("\n")[:3]
    here = os.path.abspath(__file__).removesuffix("/shim/launch/launcher_script.py")
    return list(dict.fromkeys([own or here, *packages]))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m shim.launch.launcher_script", description=__doc__.split("\n")[0]
    )
    parser.add_argument("out", help="file to write, such as /usr/local/bin/containerd-shim-kata-v2")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment")
    parser.add_argument(
        "--path",
        action="append",
        default=[],
        help="directory with packages, searched in this order, before the environment's own; may be repeated",
    )
    options = parser.parse_args(argv)
    python = os.path.abspath(options.python)
    try:
        write(options.out, python, [*options.path, *_default_paths(python)])
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"launcher_script: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
