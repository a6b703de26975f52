"""`python -m scripts.fetch DIRECTORY PACKAGE/SUITE...`: unpack packages of other Debian releases.

What: has apt fetch just these (signatures checked, `guest.debian`) and unpacks them into DIRECTORY;
nothing is installed.
Invariants: DIRECTORY is there when all of it is; what was there before is gone then.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from devices.errors import KataError
from guest.debian import Apt, deb_name, host_suite


def fetch(directory: str, wanted: Sequence[str]) -> None:
    """Raises KataError, CalledProcessError."""
    scratch = f"{directory}.new"
    shutil.rmtree(scratch, ignore_errors=True)
    os.makedirs(scratch)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(directory) or ".") as debs:
        for suite in dict.fromkeys(one.partition("/")[2] for one in wanted):  # apt takes seconds to start
            apt = Apt("" if suite == host_suite() else suite)
            apt.refresh()
            versions = apt.candidates(one.partition("/")[0] for one in wanted if one.endswith(f"/{suite}"))
            apt.download(versions, debs)
            for package, version in versions.items():
                print(package, version, suite, flush=True)
                archive = os.path.join(debs, deb_name(package, version))
                subprocess.run(["dpkg-deb", "-x", archive, scratch], check=True)
    shutil.rmtree(directory, ignore_errors=True)
    os.rename(scratch, directory)


def main() -> int:
    """The command line."""
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        fetch(os.path.abspath(sys.argv[1]), sys.argv[2:])
    except (KataError, subprocess.CalledProcessError) as error:
        print(f"fetch: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
