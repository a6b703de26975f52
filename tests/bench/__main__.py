"""`make bench`, or `python -m tests.bench --rows a,b --rounds 5`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from testing.containerd import Containerd
from testing.guest import PROJECT, guest_files
from testing.images import busybox_image
from tests.bench import hotplug, report, rows, templates
from tests.bench.figures import Row

ROWS = {
    "a": (rows.start, "start, and to the first answer, with a zygote and without: ours against runc's shim"),
    "b": (rows.boot, "ctr run to the first output: ours, a bare QEMU, runc"),
    "c": (rows.execs, "ctr task exec: ours, runc"),
    "d": (rows.round_trip, "ttrpc round trip: ours, Go's"),
    "e": (rows.memory, "PSS of an idle pod"),
    "f": (rows.stdout, "MB/s through stdout: ours, runc"),
    "g": (hotplug.plugs, "plug and unplug of each kind: ours, raw QMP"),
    "i": (templates.templates, "from a template against cold: agent ready, first output, PSS of a further"),
    "h": (rows.further, "PSS of each of several pods' shims, with a zygote: ours, runc's"),
}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Speed and memory as ratios against a peer, alternating in one run. Rows: "
        + "; ".join(f"{key}: {text}" for key, (_, text) in ROWS.items()),
    )
    parser.add_argument("--rows", default=",".join(ROWS), help="which ones (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="samples of each side (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="3 rounds: whether it runs, not how fast it is")
    parser.add_argument("--json", default="build/bench/bench.json", help="results (default: %(default)s)")
    parser.add_argument("--svg", default="build/bench/bench.svg", help="the plot (default: %(default)s)")
    parser.add_argument(
        "--publish", action="store_true", help="write docs/bench.json and docs/bench.svg instead"
    )
    return parser.parse_args()


def main() -> int:
    """Run the rows that were asked for; 0 if all could be measured, whatever they say."""
    options = _options()
    wanted = [key for key in options.rows.split(",") if key]
    unknown = [key for key in wanted if key not in ROWS]
    missing = [str(path) for path in guest_files().values() if not path.exists()]
    if unknown or missing or os.geteuid():
        problem = f"no row {', '.join(unknown)}" if unknown else ""
        problem = problem or (
            f"not built: {', '.join(missing)}; try: make setup" if missing else "run it as root"
        )
        print(f"bench: {problem}", file=sys.stderr)
        return 2
    rounds = 3 if options.quick else options.rounds
    load = os.getloadavg()[0]
    if load > 1:
        print(f"bench: the load average is {load:.1f}: other work will blur the figures", file=sys.stderr)
    results: list[Row] = []
    failed = []
    begin = time.monotonic()
    with Containerd() as containerd:
        archive = Path(containerd.root, "busybox.tar")
        busybox_image(archive, rows.IMAGE)
        containerd.ctr("image", "import", str(archive))
        for key in wanted:
            measure, text = ROWS[key]
            print(f"({key}) {text}", flush=True)
            try:
                results += measure(containerd, rounds, lambda line: print(f"    {line}", flush=True))
            except ImportError as error:
                failed.append(f"({key}) {error}")
    print()
    print(report.table(results))
    for problem in failed:
        print(f"not measured: {problem}", file=sys.stderr)
    folder = PROJECT / "docs" if options.publish else None
    json_file = folder / "bench.json" if folder else Path(options.json)
    svg_file = folder / "bench.svg" if folder else Path(options.svg)
    caption = (
        f"medians of up to {rounds} alternating rounds; QEMU with TCG, {os.cpu_count()} cores, "
        f"load {load:.1f} at the start; {time.strftime('%Y-%m-%d')}"
    )
    for path in (json_file, svg_file):
        path.parent.mkdir(parents=True, exist_ok=True)
    document = {"caption": caption, "rounds": rounds, "rows": [row.as_json() for row in results]}
    json_file.write_text(json.dumps(document, indent=1) + "\n")
    svg_file.write_text(report.svg(results, caption))
    print(f"\n{json_file} and {svg_file} are written; {time.monotonic() - begin:.0f} s in all")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
