"""What a child or a guest said last is bounded, cleaned for a terminal, searched for a panic."""

from __future__ import annotations

import asyncio
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.console import Console
from devices.tail import TailBuffer


def test_only_the_newest_bytes_are_kept() -> None:
    buffer = TailBuffer(8)
    for piece in (b"12345", b"678", b"9", b"abcdefghijkl"):
        buffer.write(piece)
        assert len(buffer) <= 8

    assert buffer.raw() == b"efghijkl"
    assert buffer.total == 21


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_it_is_the_end_of_the_stream_and_fit_for_a_terminal(pieces: list[bytes]) -> None:
    buffer = TailBuffer(64)
    for piece in pieces:
        buffer.write(piece)

    assert buffer.raw() == b"".join(pieces)[-64:]
    assert buffer.tail(100).replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (b"plain\nlines\n", "plain\nlines"),
        (b"\x1b[1;31mred\x1b[0m\r\n\n  \nnext", "red\nnext"),
        (b"\x1b]0;title\x07text\x1b]2;other\x1b\\!", "text!"),
        (b"\xc2\x9b31mC1\x7f\x00\x08", "31mC1"),
        (b"gr\xc3\xbcn \xff", "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n \N{REPLACEMENT CHARACTER}"),
    ],
)
def test_escape_sequences_and_controls_are_taken_out(said: bytes, shown: str) -> None:
    buffer = TailBuffer()
    buffer.write(said)

    assert buffer.tail() == shown


def test_long_lines_are_cut_and_only_the_last_ones_given() -> None:
    buffer = TailBuffer()
    buffer.write(b"first\n" + b"x" * 5000 + b"\nlast\n")

    assert buffer.tail(1) == "last"
    assert buffer.tail(2) == "x" * 400 + "...\nlast"


async def said(*pieces: bytes) -> Console:
    """A console whose guest said this and is gone."""
    console = Console()
    for piece in pieces:
        os.write(console.guest_end, piece)
    console.handed_over()
    console.drain()
    return console


async def test_a_panic_is_found_with_what_led_to_it() -> None:
    console = await said(
        b"[    0.1] one\r\n[    0.2] VFS: cannot mount\r\n[    0.3] Kernel panic - not sync",
        b"ing: VFS: Unable to mount root fs\r\n" + b"[    0.4]  dump_stack+0x1\r\n" * 50,
    )

    assert console.panic() == "VFS: Unable to mount root fs"
    assert console.tail(2).splitlines() == [
        "[    0.2] VFS: cannot mount",
        "[    0.3] Kernel panic - not syncing: VFS: Unable to mount root fs",
    ]
    console.close()


async def test_no_panic_no_words() -> None:
    console = await said(b"all is well, no kernel panic here\n")

    assert console.panic() == ""
    assert console.tail() == "all is well, no kernel panic here"


async def test_a_guest_that_talks_all_the_time_is_read_and_bounded() -> None:
    heard = 0

    def count(data: bytes) -> None:
        nonlocal heard
        heard += len(data)

    console = Console(count)
    fd = os.dup(console.guest_end)
    console.handed_over()
    for _ in range(100):
        os.write(fd, b"x" * 4095 + b"\n")  # blocks for ever if nobody reads
        await asyncio.sleep(0)
    os.close(fd)
    console.drain()

    assert heard == 100 * 4096
    assert len(console.output) == 64 << 10
    console.close()


async def test_close_is_idempotent_and_keeps_what_was_said() -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    console = await said(b"last words\n")
    console.close()
    console.close()
    console.drain()

    assert console.tail() == "last words"
    assert sorted(os.listdir("/proc/self/fd")) == before
