"""`make storm`, or `python -m tests.stress`: many short containers, with a summary; 0 if all went well."""

from __future__ import annotations

import argparse
import os
import sys

from testing.containerd import KATA, VERSIONS, Containerd, own_version
from testing.guest import guest_files
from testing.images import busybox_image
from tests.stress.storm import Storm

IMAGE = "local/busybox:1"


def main() -> int:
    """Run; answers the exit code: 1 if anything was wrong, 2 if it could not begin."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="containers (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=8, help="at a time (default: %(default)s)")
    parser.add_argument("--pods", type=int, default=10, help="pods (default: %(default)s)")
    parser.add_argument(
        "--members",
        type=int,
        default=10,
        help="containers in each; the others are alone (default: %(default)s)",
    )
    parser.add_argument("--containerd", choices=VERSIONS, default=own_version(), help="default: %(default)s")
    parser.add_argument("--runtime", default=KATA, help="default: %(default)s")
    parser.add_argument(
        "--debug", action="store_true", help="show containerd's and the shims' log if it went wrong"
    )
    options = parser.parse_args()
    missing = [str(path) for path in guest_files().values() if not path.exists()]
    if missing or os.geteuid():
        problem = f"not built: {', '.join(missing)}; try: make setup" if missing else "run it as root"
        print(f"storm: {problem}", file=sys.stderr)
        return 2
    if options.pods * options.members > options.count or min(options.count, options.parallel) < 1:
        parser.error("at least one container at a time, and no more in pods than there are")
    with Containerd(debug=options.debug, version=options.containerd) as containerd:
        archive = containerd.root / "busybox.tar"
        busybox_image(archive, IMAGE)
        containerd.ctr("image", "import", str(archive))
        storm = Storm(
            containerd,
            containerd.root / "fifos",
            image=IMAGE,
            count=options.count,
            parallel=options.parallel,
            pods=options.pods,
            members=options.members,
            runtime=options.runtime,
            say=lambda line: print(f"storm: {line}", flush=True),
        )
        outcome = storm.run()
        if outcome.wrong and options.debug:
            print(containerd.log_tail(100_000), file=sys.stderr)
    for line in outcome.wrong:
        print(f"storm: wrong: {line}")
    print(f"storm: {outcome.summary()}")
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
