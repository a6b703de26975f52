"""`make bench-host`: a shell in the bench host. With CMD=...: a command's output and exit code."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from devices.errors import KataError

from .machine import MODULES, BenchHost, Settings


def main() -> int:
    """Run; answers the job's exit code, 125 if the machine ended before it."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchhost", description=__doc__)
    parser.add_argument("command", nargs="*", help="for bash; without it: an interactive shell")
    parser.add_argument("--limit", type=float, default=0, help="seconds (600; for a shell a day)")
    parser.add_argument("--memory", type=int, default=4096, help="MiB (default: %(default)s)")
    parser.add_argument("--disk", type=int, default=0, help="GiB of ext4 at /var/lib/containerd")
    parser.add_argument("--modules", default=" ".join(MODULES), help="kernel modules (default: %(default)s)")
    parser.add_argument("--append", default="", help="more words for the kernel command line")
    parser.add_argument(
        "--share", action="append", default=[], type=Path, metavar="DIR", help="also there, by its own name"
    )
    parser.add_argument("--console", action="store_true", help="show the kernel's console at the end")
    options = parser.parse_args()
    command = " ".join(options.command).strip()
    if not command:
        print("bench host: booting; `exit` ends it", file=sys.stderr)
    try:
        with BenchHost(
            command,
            Settings(
                limit=options.limit or (600 if command else 86400),
                memory=options.memory,
                disk_gib=options.disk,
                modules=options.modules.split(),
                append=options.append,
                shares=options.share,
                interactive=not command,
            ),
        ) as machine:
            for event in machine.events():
                stream = sys.stdout if event.kind == "output" else sys.stderr
                stream.buffer.write(event.data + (b"" if event.kind == "output" else b"\n"))
                stream.flush()
            result = machine.result
    except KataError as error:
        print(f"bench host: {error}", file=sys.stderr)
        return 125
    assert result is not None
    if options.console or result.code is None:
        print(result.console, file=sys.stderr)
    end = f"exit {result.code}" if result.code is not None else result.reason
    print(f"bench host: {end}; {result.seconds:.1f} s, boot {result.boot_seconds:.1f} s", file=sys.stderr)
    return 125 if result.code is None else result.code


if __name__ == "__main__":
    sys.exit(main())
