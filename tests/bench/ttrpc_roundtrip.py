"""Row (d): a ttrpc round trip over a unix socket, client and server in two processes, ours against Go's."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.bench.figures import Row, Series
from tests.interop.echo import ROOT, build_go

__all__ = ["rows"]

CALLS = 2000


def _round_trip(server: list[str], client: list[str]) -> float:
    """The median of CALLS round trips in microseconds; "SOCKET" in the arguments is replaced."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "s"))

        def at(argv: list[str]) -> list[str]:
            return [path if word == "SOCKET" else word for word in argv]

        with subprocess.Popen(at(server), stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"listening\n"
            try:
                done = subprocess.run(at(client), capture_output=True, check=True, timeout=120, cwd=ROOT)
            finally:
                process.kill()
    times = [int(line) / 1000 for line in done.stdout.split()]
    assert len(times) == CALLS
    return statistics.median(times)


def rows(rounds: int, say: Callable[[str], None]) -> list[Row]:
    """Measure both alternately. Raises ImportError when the Go peer cannot be had."""
    try:
        go = build_go()
    except FileNotFoundError as error:
        raise ImportError(str(error)) from error
    echo = [sys.executable, "-m", "tests.interop.echo"]
    contenders = {
        "kata-shim": lambda: _round_trip([*echo, "SOCKET"], [*echo, "SOCKET", str(CALLS)]),
        "Go's ttrpc": lambda: _round_trip([go, "server", "SOCKET"], [go, "bench", "SOCKET", str(CALLS)]),
    }
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(max(3, rounds // 2)):
        names = list(contenders)
        for name in names if number % 2 == 0 else reversed(names):
            samples[name].append(contenders[name]())
        say(f"round {number + 1}: " + ", ".join(f"{n} {v[-1]:.1f} us" for n, v in samples.items()))
    ours, peer = (Series(name, tuple(values)) for name, values in samples.items())
    return [Row(key="d", title="ttrpc round trip", unit="us", ours=ours, peer=peer, target=4.0)]
