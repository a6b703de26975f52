"""What Firecracker writes to its FIFOs: lines come whole, and no flood of them holds anybody up."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from devices.lines import BURST, LineLog
from hypervisors.firecracker.fifo import LINE_LIMIT, LINES, Fifo, LineFifo
from tests.unit.turns import LIMIT, turns


async def written(path: Path, data: bytes) -> None:
    await asyncio.to_thread(path.write_bytes, data)
    await asyncio.sleep(0.01)


async def test_lines_come_whole_and_too_long_ones_not(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "f")
    lines: list[bytes] = []
    fifo = LineFifo(str(path), lines.append)
    await written(path, b"one\ntw")
    await written(path, b"o\n")
    await written(path, b"x" * (LINE_LIMIT + 70_000) + b"\nthree\n")
    fifo.drain()
    assert lines == [b"one", b"two", b"three"]
    await written(path, b"\n".join(b"%d" % number for number in range(1000)) + b"\n")
    fifo.drain()
    assert lines[3:] == [b"%d" % number for number in range(1000 - LINES, 1000)]
    fifo.close()


async def test_a_flood_of_short_lines_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(path := tmp_path / "f")
    said: list[str] = []
    fifo = Fifo(str(path), LineLog("firecracker", said.append).write)
    async with turns() as longest:
        await written(path, b"e\n" * 32768 * 40)
        fifo.drain()
        for _ in range(BURST):
            await asyncio.sleep(0)
    assert longest.seconds < LIMIT
    assert BURST <= len(said) < 2 * BURST
    fifo.close()
