"""Promised: both tables are complete as specified, fit each other, and every call can end."""

from __future__ import annotations

import itertools

import pytest

from ttrpc import ClientConnection, LocalProtocolError, ServerConnection
from ttrpc._state import CLIENT, SERVER, Action, State, Table

A, S = Action, State

# The specification, written a second time as sentences: everything else is forbidden.
CLIENT_MAY = {
    (S.IDLE, A.SEND_UNARY_REQUEST, S.UNARY),
    (S.IDLE, A.SEND_REQUEST, S.HALF_CLOSED),
    (S.IDLE, A.SEND_OPEN_REQUEST, S.OPEN),
    (S.UNARY, A.RECEIVE_RESPONSE, S.DONE),
    (S.OPEN, A.SEND_DATA, S.OPEN),
    (S.OPEN, A.SEND_END, S.HALF_CLOSED),
    *((state, A.RECEIVE_DATA, state) for state in (S.OPEN, S.HALF_CLOSED, S.DONE)),
    *((state, A.RECEIVE_END, S.DONE) for state in (S.OPEN, S.HALF_CLOSED, S.DONE)),
    *((state, A.RECEIVE_RESPONSE, S.DONE) for state in (S.OPEN, S.HALF_CLOSED, S.DONE)),
    *((state, A.ABANDON, S.DONE) for state in (S.UNARY, S.OPEN, S.HALF_CLOSED, S.DONE)),
}
SERVER_MAY = {
    (S.IDLE, A.RECEIVE_REQUEST, S.HALF_CLOSED),
    (S.IDLE, A.RECEIVE_OPEN_REQUEST, S.OPEN),
    (S.OPEN, A.RECEIVE_DATA, S.OPEN),
    (S.OPEN, A.RECEIVE_END, S.HALF_CLOSED),
    *((state, A.SEND_DATA, state) for state in (S.OPEN, S.HALF_CLOSED)),
    *((state, A.SEND_END, S.DONE) for state in (S.OPEN, S.HALF_CLOSED)),
    *((state, A.SEND_RESPONSE, S.DONE) for state in (S.OPEN, S.HALF_CLOSED)),
    (S.DONE, A.RECEIVE_DATA, S.DONE),
    (S.DONE, A.RECEIVE_END, S.DONE),
}


@pytest.mark.parametrize(("table", "may"), [(CLIENT, CLIENT_MAY), (SERVER, SERVER_MAY)])
def test_the_table_is_the_specification(table: Table, may: set[tuple[State, Action, State]]) -> None:
    actual = {(state, action, after) for state, actions in table.items() for action, after in actions.items()}

    assert may == actual


@pytest.mark.parametrize("table", [CLIENT, SERVER])
def test_every_state_is_reached_and_leads_to_the_end(table: Table) -> None:
    def reachable(start: State) -> set[State]:
        seen, todo = set(), [start]
        while todo:
            state = todo.pop()
            if state not in seen:
                seen.add(state)
                todo += table[state].values()
        return seen

    assert set(table) == reachable(S.IDLE)
    assert all(S.DONE in reachable(state) for state in table)


def client_in(state: State) -> ClientConnection:
    """A client whose stream 1 is in this state."""
    client = ClientConnection()
    begin = {S.UNARY: A.SEND_UNARY_REQUEST, S.OPEN: A.SEND_OPEN_REQUEST}
    if state is not S.IDLE:
        client.send_request("s", "m", b"", action=begin.get(state, A.SEND_REQUEST))
    if state is S.DONE:
        client.abandon(1)
    return client


def server_in(state: State) -> ServerConnection:
    """A server whose stream 1 is in this state."""
    server = ServerConnection()
    if state is not S.IDLE:
        list(server.receive(request_bytes(state is S.OPEN)))
    if state is S.DONE:
        server.send_response(1, b"")
    return server


def request_bytes(is_open: bool) -> bytes:
    action = A.SEND_OPEN_REQUEST if is_open else A.SEND_REQUEST
    return ClientConnection().send_request("s", "m", b"", action=action)[1]


@pytest.mark.parametrize(
    ("state", "method"), list(itertools.product(CLIENT, ("send_data", "send_end", "abandon"))), ids=str
)
def test_a_client_refuses_what_its_table_lacks_and_nothing_else(state: State, method: str) -> None:
    client = client_in(state)
    action = {"send_data": A.SEND_DATA, "send_end": A.SEND_END, "abandon": A.ABANDON}[method]
    after = CLIENT[state].get(action)
    arguments = (1, b"x") if method == "send_data" else (1,)
    if after is None:
        with pytest.raises(LocalProtocolError):
            getattr(client, method)(*arguments)
        after = state
    else:
        getattr(client, method)(*arguments)

    assert after is client.state(1)


@pytest.mark.parametrize(
    ("state", "method"), list(itertools.product(SERVER, ("send_data", "send_end", "send_response"))), ids=str
)
def test_a_server_refuses_what_its_table_lacks_and_nothing_else(state: State, method: str) -> None:
    server = server_in(state)
    action = {"send_data": A.SEND_DATA, "send_end": A.SEND_END, "send_response": A.SEND_RESPONSE}[method]
    after = SERVER[state].get(action)
    arguments = (1,) if method == "send_end" else (1, b"x")
    if after is None:
        with pytest.raises(LocalProtocolError):
            getattr(server, method)(*arguments)
        after = state
    else:
        getattr(server, method)(*arguments)

    assert after is server.state(1)
