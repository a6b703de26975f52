"""`make fuzz`, or `python -m tests.fuzz [--seconds N | --runs N] [--target NAME]`.

Each target runs in a process of its own, so that one that dies or hangs is a finding of that target only.
Inputs that find new code are kept below build/fuzz/TARGET; those worth keeping for others are copied to
tests/fuzz/corpora by `--merge`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fuzz import all_targets

MAX_INPUT = 4096
"""Bytes of one input; the readers' limits above that have tests of their own."""
SLOWEST = 10
"""Seconds that one input may take; libFuzzer calls what takes longer a finding."""
MEMORY = 2048  # MiB
FOLDER = Path("build/fuzz")
KEPT, LONGEST = 10 << 10, 1 << 10
"""Bytes of a target's corpus that are checked in, and of one of its files: the smallest go first."""


def _options() -> argparse.Namespace:
    names = list(all_targets())
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", choices=names, help="one of these (default: all)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--seconds", type=float, default=60, help="in all, over all targets (default: 60)")
    how.add_argument("--runs", type=int, help="executions of each target instead")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="targets at a time")
    parser.add_argument(
        "--merge", action="store_true", help="put what found new code into tests/fuzz/corpora"
    )
    return parser.parse_args()


def inside(name: str, arguments: list[str]) -> None:
    """In the child: instrument, then hand over to libFuzzer, which ends the process."""
    import atheris

    with atheris.instrument_imports(include=["shim", "devices", "hypervisors", "ttrpc", "ctl", "agent"]):
        from tests.fuzz import all_targets as instrumented

        function = instrumented()[name]
    atheris.Setup([f"{FOLDER}/{name}.sh", *arguments], function)  # merging runs it by that name again
    atheris.Fuzz()


def fuzz(name: str, folder: Path, limits: list[str]) -> tuple[int, float, str]:
    """(executions, seconds, what was found) of one target."""
    work = folder / name
    work.mkdir(parents=True, exist_ok=True)
    from tests.fuzz.seeds import seeds, words

    known = seeds(name)
    for number, data in enumerate(known):
        (work / f"seed-{number}").write_bytes(data)
    dictionary = folder / f"{name}.dict"
    dictionary.write_text("".join(f'"{word}"\n' for word in words(name, known)) or '"\\x00"\n')
    begin = time.monotonic()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzz", "--inside", name),
            str(work),
            *limits,
            f"-dict={dictionary}",
            f"-max_len={MAX_INPUT}",
            f"-timeout={SLOWEST}",
            f"-rss_limit_mb={MEMORY}",
            f"-artifact_prefix={folder}/found-{name}-",
            "-print_final_stats=1",
        ],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    (folder / f"{name}.log").write_text(done.stderr + done.stdout)
    count = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    found = ""
    if done.returncode or not count:
        raised = re.findall(r"(?m)^\w[\w.]*(?:Error|Exception)\b.*$", done.stdout + done.stderr)
        told = re.findall(r"(?m)^.*(?:ALARM|ERROR: libFuzzer).*$", done.stderr)
        found = [*raised[-1:], *told, f"exit {done.returncode}"][0][:200]
    return int(count[1]) if count else 0, time.monotonic() - begin, found


def main() -> int:
    """Fuzz what was asked for; 1 if anything was found."""
    if sys.argv[1:2] == ["--inside"]:  # before anything that is to be instrumented is imported
        inside(sys.argv[2], sys.argv[3:])
        return 0
    options = _options()
    folder = FOLDER
    names = options.target or list(all_targets())
    each = max(1, round(options.seconds * options.jobs / len(names)))
    limits = [f"-runs={options.runs}"] if options.runs is not None else [f"-max_total_time={each}"]
    total, findings = 0, 0
    # libFuzzer ends its process in the middle: what the targets lay there is for us to remove.
    with (
        tempfile.TemporaryDirectory(prefix="kata-fuzz-") as scratch,
        ThreadPoolExecutor(options.jobs) as pool,
    ):
        os.environ["TMPDIR"] = scratch
        for name, (count, seconds, found) in zip(
            names, pool.map(lambda name: fuzz(name, folder, limits), names), strict=True
        ):
            total += count
            findings += bool(found)
            rate = f"{count / seconds:.0f}/s" if seconds else ""
            print(
                f"{name:20} {count:>10} executions in {seconds:5.0f} s  {rate:>8}  {found or 'nothing'}",
                flush=True,
            )
        if options.merge:
            list(pool.map(lambda name: merge(name, folder), names))
    print(f"{'all':20} {total:>10} executions; {findings or 'no'} findings; inputs and logs: {folder}/")
    return 1 if findings else 0


def merge(name: str, folder: Path) -> None:
    """A small set of inputs with the same coverage becomes the corpus that is checked in."""
    from tests.fuzz.seeds import CORPUS

    kept, new = CORPUS / name, folder / f"{name}.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    kept.mkdir(parents=True, exist_ok=True)
    program = folder / f"{name}.sh"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tests.fuzz --inside {name} "$@"\n')
    program.chmod(0o755)
    subprocess.run(
        [
            *(sys.executable, "-m", "tests.fuzz", "--inside", name),
            *(str(new), str(kept), str(folder / name), "-merge=1", f"-max_len={LONGEST}"),
        ],
        capture_output=True,
        check=True,
    )
    for path in kept.iterdir():
        path.unlink()
    room = KEPT
    for data in sorted((path.read_bytes() for path in new.iterdir()), key=lambda data: (len(data), data)):
        room -= len(data)
        if room < 0:
            break
        (kept / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONHASHSEED", "0")
    sys.exit(main())
