"""Promised: the frame reader finds the same frames however the bytes are portioned, and never raises."""

from __future__ import annotations

import itertools
import struct

from hypothesis import given
from hypothesis import strategies as st

from ttrpc._frames import HEADER_SIZE, MAX_MESSAGE, Frame, FrameReader, encode_frame

LIMIT = 64

frames = st.lists(
    st.tuples(
        st.integers(0, 2**32 - 1), st.integers(0, 255), st.integers(0, 255), st.binary(max_size=2 * LIMIT)
    ),
    max_size=8,
)


def portions(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` cut at these places (taken modulo its length)."""
    places = sorted({cut % (len(data) + 1) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


@given(frames, st.lists(st.integers(0, 10_000), max_size=20))
def test_any_portioning_gives_the_same_frames(
    sent: list[tuple[int, int, int, bytes]], cuts: list[int]
) -> None:
    stream = b"".join(encode_frame(*frame) for frame in sent)
    expected: list[Frame] = [
        (stream_id, kind, flags, data if len(data) <= LIMIT else None, len(data))
        for stream_id, kind, flags, data in sent
    ]
    reader = FrameReader(LIMIT)

    actual = [frame for portion in portions(stream, cuts) for frame in reader.feed(portion)]

    assert expected == actual
    assert not reader.in_frame


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_garbage_never_raises_and_is_never_hoarded(garbage: list[bytes]) -> None:
    reader = FrameReader(LIMIT)
    for portion in garbage:
        reader.feed(portion)

        assert len(reader._pending) < HEADER_SIZE + LIMIT


def test_the_callers_buffer_may_be_reused() -> None:
    reader = FrameReader()
    buffer = bytearray(encode_frame(1, 1, 0, b"first") + encode_frame(3, 1, 0, b"second")[:-2])
    first = reader.feed(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    second = reader.feed(b"nd")

    assert [frame[3] for frame in first + second] == [b"first", b"second"]


def test_an_oversize_frame_is_reported_before_its_data_comes_and_skipped() -> None:
    reader = FrameReader()
    header = struct.pack(">IIBB", MAX_MESSAGE + 1, 5, 1, 0)

    assert reader.feed(header) == [(5, 1, 0, None, MAX_MESSAGE + 1)]
    assert reader.in_frame
    for _ in range(MAX_MESSAGE // 65536):
        assert reader.feed(bytes(65536)) == []
    assert reader.feed(b"\xff" + encode_frame(7, 2, 0, b"x")) == [(7, 2, 0, b"x", 1)]


def test_a_frame_at_the_limit_is_whole() -> None:
    data = bytes(MAX_MESSAGE)

    assert [(1, 3, 4, data, MAX_MESSAGE)] == FrameReader().feed(encode_frame(1, 3, 4, data))


def test_the_layout_of_a_frame() -> None:
    assert bytes.fromhex("00000003000000050201") + b"abc" == encode_frame(5, 2, 1, b"abc")
