"""Writes the executable `containerd-shim-kata-v2` for an installation.

    python -m shim.launch.launcher_script OUT --python /opt/kata-shim/venv/bin/python3 [--path DIR]...

What: the compiled client (shim/launch/client.c) with interpreter, module path and the zygote's socket written
into it; where nobody compiled one, a Python script that sets its module path itself and runs with `-I -S`.
Why not the console script that pip makes: that one loads `re` and runs `site` (the .pth files of the
environment), which more than doubles what containerd waits for `start`. All three work.
Invariants: isolated (-I): neither containerd's environment (PYTHONPATH) nor the working directory,
which is the bundle, can add modules. The file is written whole or not at all, mode 0755.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence

__all__ = ["CLIENT", "ZYGOTES", "code_of", "filled", "main", "render", "write"]

CLIENT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "kata-start")
"""Where `make setup` puts the compiled client."""
ZYGOTES = "/run/kata-shim-zygote"
"""The directory of zygotes' sockets, root's alone; one for each installation."""
_MAX_SHEBANG = 255  # bytes of the first line that the kernel reads
_MAX_SOCKET = 100  # bytes of the zygote's; binding it takes a temporary name beside it
_ROOM = 8192  # bytes of `config` in the client
_PLACE = b"@KATA-SHIM-CLIENT-CONFIG@"

_TEMPLATE = """\
{shebang}
# Written by shim.launch.launcher_script. containerd runs this for each container: start, delete.
import sys

sys.path[:0] = {paths!r}
from shim.launch.launcher import main

sys.exit(main())
"""

_CODE = """\
import sys
sys.path[:0] = {paths!r}
del sys.argv[0]
from shim.launch.launcher import main
sys.exit(main(zygote={zygote!r}))"""


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


def code_of(paths: Sequence[str], zygote: str) -> str:
    """What the client has the interpreter run: `python -ISc CODE PROGRAM ARGUMENT...`."""
    return _CODE.format(paths=list(paths), zygote=zygote)


def filled(client: bytes, python: str, code: str, zygote: str) -> bytes:
    """The compiled client with its configuration. Raises ValueError if it does not fit."""
    at = client.find(_PLACE + b"\0")
    if at < 0 or client.find(_PLACE, at + 1) >= 0:
        raise ValueError("this is not the client that shim/launch/client.c becomes")
    config = b"".join(os.fsencode(word) + b"\0" for word in (python, code, zygote))
    if len(config) > _ROOM:
        raise ValueError(f"the module path is too long: {len(config)} bytes of configuration, {_ROOM} fit")
    if len(os.fsencode(zygote)) > _MAX_SOCKET:
        raise ValueError(f"the path of the zygote's socket is too long: {zygote!r}")
    return client[:at] + config.ljust(_ROOM, b"\0") + client[at + _ROOM :]


def write(
    out: str, python: str, paths: Sequence[str], *, client: str = "", zygote: str = "", root: str = ""
) -> None:
    """Write the program to the file `out`: of the compiled `client`, "" for the script.

    `zygote`: where this installation's zygote listens, "" for a place that is its own. `root`: a staging
    directory, of which the program must know nothing.
    """
    python, *paths = (path.removeprefix(root) if root else path for path in (python, *paths))
    text = render(python, paths).encode()  # which checks the paths
    if client:
        zygote = zygote or os.path.join(ZYGOTES, hashlib.sha256(text).hexdigest()[:16])
        with open(client, "rb") as file:
            text = filled(file.read(), python, code_of(paths, zygote), zygote)
    temporary = f"{out}.{os.getpid()}"
    with open(temporary, "wb") as file:
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
    parser.add_argument("--client", default=CLIENT, help="compiled client; the script without (%(default)s)")
    parser.add_argument("--script", action="store_true", help="write the script in any case")
    parser.add_argument("--zygote", default="", help="socket of the zygote (default: one by the paths)")
    parser.add_argument("--root", default="", help="staging directory that the paths lie in")
    options = parser.parse_args(argv)
    python = os.path.abspath(options.python)
    client = options.client if os.access(options.client, os.X_OK) and not options.script else ""
    try:
        paths = [*options.path, *_default_paths(python)]
        write(options.out, python, paths, client=client, zygote=options.zygote, root=options.root)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"launcher_script: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
