"""Promised: the core gives the same events for any portioning of bytes, and only RemoteProtocolError for
garbage; what one role sends the other understands; a broken rule on one stream leaves the others alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from tests.unit.ttrpc.test_frames import portions
from ttrpc import (
    MAX_MESSAGE,
    ClientConnection,
    Code,
    LocalProtocolError,
    MessageTooLarge,
    RemoteProtocolError,
    ServerConnection,
)
from ttrpc._connection import MAX_REORDERED
from ttrpc._events import (
    DataReceived,
    EndReceived,
    Event,
    RequestReceived,
    ResponseReceived,
    StreamFailed,
)
from ttrpc._frames import encode_frame
from ttrpc._state import Action, State
from ttrpc._wire_pb2 import KeyValue, Request, Response, Status

Make = Callable[[], ClientConnection | ServerConnection]


def client_with_streams() -> ClientConnection:
    """A client with a unary, a server-streaming and an open stream: 1, 3 and 5."""
    client = ClientConnection()
    for action in (Action.SEND_UNARY_REQUEST, Action.SEND_REQUEST, Action.SEND_OPEN_REQUEST):
        client.send_request("s", "m", b"", action=action)
    return client


def plausible_frames(kinds: tuple[int, ...]) -> st.SearchStrategy[bytes]:
    """Frames near the truth: small ids, known types and flags, whole and broken envelopes."""
    texts = st.text(max_size=5)
    envelopes = st.one_of(
        st.binary(max_size=30),
        st.builds(
            Request,
            service=texts,
            method=texts,
            payload=st.binary(max_size=9),
            timeout_nano=st.integers(-(2**63), 2**63 - 1),
            metadata=st.lists(st.builds(KeyValue, key=texts, value=texts), max_size=2),
        ).map(Request.SerializeToString),
        st.builds(
            Response,
            status=st.builds(Status, code=st.integers(-5, 20), message=texts),
            payload=st.binary(max_size=9),
        ).map(Response.SerializeToString),
    )
    return st.builds(
        encode_frame,
        st.integers(0, 9),
        st.sampled_from(kinds),
        st.sampled_from([0, 1, 2, 4, 5, 6, 7, 255]),
        envelopes,
    )


def got(connection: ClientConnection | ServerConnection, data: bytes) -> list[Event]:
    """The events of these bytes."""
    return list(connection.receive(data))


def events_of(make: Make, received: list[bytes]) -> tuple[list[Event], bool]:
    """All events, and whether it ended with RemoteProtocolError."""
    connection = make()
    events: list[Event] = []
    try:
        for data in received:
            for event in connection.receive(data):
                events.append(event)  # noqa: PERF402  (those before an error count)
        connection.receive_eof()
    except RemoteProtocolError:
        return events, True
    return events, False


@pytest.mark.parametrize("make", [client_with_streams, ServerConnection])
@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=10))
def test_garbage_raises_nothing_but_remote_protocol_error(make: Make, data: bytes, cuts: list[int]) -> None:
    events_of(make, portions(data, cuts))


@pytest.mark.parametrize(("make", "kinds"), [(client_with_streams, (2, 3, 9)), (ServerConnection, (1, 3, 9))])
@given(data=st.data())
def test_any_portioning_gives_the_same_events(
    make: Make, kinds: tuple[int, ...], data: st.DataObject
) -> None:
    frames = data.draw(st.lists(plausible_frames(kinds), max_size=12))
    stream = b"".join(frames)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=10))

    expected, expected_error = events_of(make, frames)
    actual, actual_error = events_of(make, portions(stream, cuts))

    assert expected_error == actual_error
    assert expected == actual


class Conversation(RuleBasedStateMachine):
    """A client and a server that only do what their tables allow understand each other."""

    def __init__(self) -> None:
        super().__init__()
        self.client = ClientConnection()
        self.server = ServerConnection()
        self.open: set[int] = set()  # ids that the server has not ended
        self.client_ends: set[int] = set()
        self.to_server: list[tuple[bytes, list[Event]]] = []
        self.to_client: list[tuple[bytes, list[Event]]] = []

    actions = st.sampled_from([Action.SEND_UNARY_REQUEST, Action.SEND_REQUEST, Action.SEND_OPEN_REQUEST])
    payloads = st.binary(max_size=20)

    @rule(
        action=actions,
        payload=payloads,
        metadata=st.dictionaries(st.text(max_size=3), st.lists(st.text(max_size=3), min_size=1, max_size=2)),
    )
    def begin(self, action: Action, payload: bytes, metadata: dict[str, list[str]]) -> None:
        stream_id, data = self.client.send_request(
            "svc", "Method", payload, action=action, timeout_nano=7, metadata=metadata
        )
        is_open = action is Action.SEND_OPEN_REQUEST
        self._to_server(data, [RequestReceived(stream_id, "svc", "Method", payload, 7, metadata, is_open)])
        self.open.add(stream_id)

    def _to_server(self, data: bytes, expected: list[Event]) -> None:
        assert expected == got(self.server, data)

    def _to_client(self, data: bytes, expected: list[Event]) -> None:
        assert expected == got(self.client, data)

    @rule(data=st.data(), payload=payloads)
    def client_sends(self, data: st.DataObject, payload: bytes) -> None:
        ids = [i for i in self.open if self.client.state(i) is State.OPEN]
        if ids:
            stream_id = data.draw(st.sampled_from(ids))
            self._to_server(self.client.send_data(stream_id, payload), [DataReceived(stream_id, payload)])

    @rule(data=st.data())
    def client_ends_its_half(self, data: st.DataObject) -> None:
        ids = [i for i in self.open if self.client.state(i) is State.OPEN]
        if ids:
            stream_id = data.draw(st.sampled_from(ids))
            self._to_server(self.client.send_end(stream_id), [EndReceived(stream_id)])

    @rule(data=st.data())
    def client_abandons(self, data: st.DataObject) -> None:
        ids = [i for i in self.open if self.client.state(i) is not State.DONE]
        if ids:
            stream_id = data.draw(st.sampled_from(ids))
            expected: list[Event] = (
                [EndReceived(stream_id)] if self.client.state(stream_id) is State.OPEN else []
            )
            self._to_server(self.client.abandon(stream_id), expected)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), payload=payloads, how=st.sampled_from(["data", "end", "response", "error"]))
    def server_sends(self, data: st.DataObject, payload: bytes, how: str) -> None:
        stream_id = data.draw(st.sampled_from(sorted(self.open)))
        before = self.client.state(stream_id)
        expected: Event
        if before is State.UNARY and how in ("data", "end"):
            return  # a server knows what it serves
        if how == "data":
            wire, expected = self.server.send_data(stream_id, payload), DataReceived(stream_id, payload)
        elif how == "end":
            wire, expected = self.server.send_end(stream_id), EndReceived(stream_id)
        elif how == "response":
            wire = self.server.send_response(stream_id, payload)
            expected = ResponseReceived(stream_id, Code.OK, "", payload)
        else:
            wire = self.server.send_error(stream_id, Code.ABORTED, "why")
            expected = ResponseReceived(stream_id, Code.ABORTED, "why", b"")
        if how != "data":
            self.open.discard(stream_id)
        self._to_client(wire, [] if before is State.DONE else [expected])

    def teardown(self) -> None:
        for connection in (self.client, self.server):
            assert set(connection._streams) <= self.open  # ended streams are forgotten
            connection.receive_eof()


TestConversation: Any = Conversation.TestCase


def request(stream_id: int, flags: int = 0, **fields: Any) -> bytes:
    return encode_frame(stream_id, 1, flags, Request(**fields).SerializeToString())


def failures(events: list[Event]) -> list[tuple[int, Code]]:
    assert all(isinstance(event, StreamFailed) for event in events)
    return [(event.stream_id, event.code) for event in events if isinstance(event, StreamFailed)]


def test_even_and_reused_stream_ids_are_invalid() -> None:
    server = ServerConnection()
    assert len(got(server, request(5) + request(7))) == 2
    server.send_response(5, b"")

    assert failures(got(server, request(2) + request(5) + request(7) + request(0))) == [
        (2, Code.INVALID_ARGUMENT),
        (5, Code.INVALID_ARGUMENT),
        (7, Code.INVALID_ARGUMENT),
        (0, Code.INVALID_ARGUMENT),
    ]
    assert server.state(7) is State.DONE  # the client has taken that for the answer to its call


def test_ids_that_were_jumped_over_stay_usable_once() -> None:
    server = ServerConnection()
    got(server, request(9))

    assert [type(event) for event in got(server, request(3) + request(1) + request(11))] == [
        RequestReceived
    ] * 3
    assert failures(got(server, request(3))) == [(3, Code.INVALID_ARGUMENT)]


def test_what_is_remembered_of_unused_ids_is_bounded() -> None:
    server = ServerConnection()
    got(server, request(0xFFFFFFFF))
    server_2 = ServerConnection()
    for stream_id in range(1, 20 * MAX_REORDERED, 6):
        got(server_2, request(stream_id))
        server_2.send_response(stream_id, b"")

    assert len(server._skipped) == MAX_REORDERED
    assert len(server_2._skipped) == MAX_REORDERED
    assert failures(got(server, request(1))) == [(1, Code.INVALID_ARGUMENT)]


def test_oversize_messages_fail_their_stream_only() -> None:
    server = ServerConnection()
    big = bytes(MAX_MESSAGE + 1)
    open_stream = request(1, flags=2)

    events = got(server, open_stream + encode_frame(3, 1, 0, big) + request(5) + encode_frame(1, 3, 0, big))

    assert [type(event) for event in events] == [RequestReceived, StreamFailed, RequestReceived, StreamFailed]
    assert failures([events[1], events[3]]) == [(3, Code.RESOURCE_EXHAUSTED), (1, Code.RESOURCE_EXHAUSTED)]
    client = client_with_streams()
    assert failures(got(client, encode_frame(1, 2, 0, big))) == [(1, Code.RESOURCE_EXHAUSTED)]
    assert [type(event) for event in got(client, encode_frame(3, 2, 0, b""))] == [ResponseReceived]


def test_our_own_oversize_messages_are_refused_and_change_nothing() -> None:
    client, server = client_with_streams(), ServerConnection()
    big = bytes(MAX_MESSAGE)  # with its envelope it is above the limit
    got(server, request(1, flags=2))
    for refused in (
        lambda: client.send_request("s", "m", big),
        lambda: client.send_data(5, big + b"x"),
        lambda: server.send_response(1, big),
        lambda: server.send_data(1, big + b"x"),
    ):
        with pytest.raises(MessageTooLarge):
            refused()

    assert client.send_request("s", "m", b"")[0] == 7
    assert client.state(5) is State.OPEN
    assert server.state(1) is State.OPEN


def test_data_on_a_closed_half_fails_the_call() -> None:
    server = ServerConnection()
    got(server, request(1) + request(3, flags=2) + encode_frame(3, 3, 5, b""))

    assert failures(got(server, encode_frame(1, 3, 0, b"x"))) == [(1, Code.INVALID_ARGUMENT)]
    assert failures(got(server, encode_frame(3, 3, 0, b"x"))) == [(3, Code.INVALID_ARGUMENT)]
    assert failures(got(server, encode_frame(99, 3, 0, b"x"))) == [(99, Code.INVALID_ARGUMENT)]
    assert failures(got(client_with_streams(), encode_frame(1, 3, 0, b"x"))) == [(1, Code.INTERNAL)]


def test_data_after_our_answer_is_dropped() -> None:
    server = ServerConnection()
    got(server, request(1, flags=2))
    server.send_error(1, Code.ABORTED, "")

    assert got(server, encode_frame(1, 3, 0, b"x") + encode_frame(1, 3, 5, b"")) == []


@pytest.mark.parametrize(
    ("flags", "data", "expected"),
    [
        (0, b"x", [DataReceived(5, b"x")]),
        (0, b"", [DataReceived(5, b"")]),  # an empty message
        (4, b"", []),
        (1, b"x", [DataReceived(5, b"x"), EndReceived(5)]),
        (1, b"", [DataReceived(5, b""), EndReceived(5)]),
        (5, b"", [EndReceived(5)]),
    ],
)
def test_what_the_flags_of_data_mean(flags: int, data: bytes, expected: list[Event]) -> None:
    assert got(client_with_streams(), encode_frame(5, 3, flags, data)) == expected


def test_broken_envelopes_fail_their_stream_only() -> None:
    server, client = ServerConnection(), client_with_streams()

    assert failures(got(server, encode_frame(1, 1, 0, b"\xff"))) == [(1, Code.INVALID_ARGUMENT)]
    assert failures(got(client, encode_frame(1, 2, 0, b"\xff"))) == [(1, Code.INTERNAL)]
    assert len(got(server, request(3))) == 1
    assert len(got(client, encode_frame(3, 2, 0, b""))) == 1


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (client_with_streams, request(1)),
        (client_with_streams, encode_frame(7, 2, 0, b"")),  # never opened
        (client_with_streams, encode_frame(2, 3, 0, b"")),
        (ServerConnection, encode_frame(1, 2, 0, b"")),
        (ServerConnection, request(1)[:-1]),  # ends in a frame
    ],
)
def test_what_only_a_stranger_sends_is_the_connections_end(make: Make, data: bytes) -> None:
    connection = make()
    with pytest.raises(RemoteProtocolError):
        got(connection, data), connection.receive_eof()


@pytest.mark.parametrize("make", [client_with_streams, ServerConnection])
def test_unknown_frame_types_are_ignored(make: Make) -> None:
    assert got(make(), encode_frame(1, 4, 0, b"x") + encode_frame(2, 0, 9, b"")) == []


def test_unknown_status_codes_and_missing_status() -> None:
    client = client_with_streams()
    frames = encode_frame(1, 2, 0, Response(status=Status(code=99, message="?")).SerializeToString())
    frames += encode_frame(3, 2, 0, Response(payload=b"x").SerializeToString())

    assert got(client, frames) == [
        ResponseReceived(1, Code.UNKNOWN, "?", b""),
        ResponseReceived(3, Code.OK, "", b"x"),
    ]


def test_status_texts_always_fit_and_are_always_utf8() -> None:
    server = ServerConnection(max_message=4096)
    got(server, request(1))
    client = ClientConnection(max_message=4096)
    client.send_request("s", "m", b"")

    (event,) = got(client, server.send_error(1, Code.ABORTED, "\udcff" + "\U0001f600" * 100_000))

    assert isinstance(event, ResponseReceived)
    assert event.message.startswith("?\U0001f600")


def test_stream_ids_run_out_with_an_error() -> None:
    client = ClientConnection()
    client._next_id = 0xFFFFFFFF
    assert client.send_request("s", "m", b"")[0] == 0xFFFFFFFF

    with pytest.raises(LocalProtocolError):
        client.send_request("s", "m", b"")


def test_the_bytes_of_a_unary_call() -> None:
    """As recorded from containerd 1.6 (Go): flags 0, an empty status on success."""
    stream_id, data = ClientConnection().send_request("s", "M", b"xy", timeout_nano=5, metadata={"k": "v"})
    server = ServerConnection()
    got(server, data)

    assert stream_id == 1
    assert (
        data
        == bytes.fromhex("00000014 00000001 01 00") + b"\n\x01s\x12\x01M\x1a\x02xy \x05*\x06\n\x01k\x12\x01v"
    )
    assert server.send_response(1, b"z") == bytes.fromhex("00000005 00000001 02 00 0a00 12017a")
