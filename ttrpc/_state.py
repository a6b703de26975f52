"""The states of one stream (one call), and what may happen in each of them: a table per role.

Rule: everything that depends on what happened on a stream before is decided by these two tables.
`Connection` asks them before it sends and after it receives; there are no other flags.

A call has two halves. The client's half is open until the client has sent its last message: a unary or
server-streaming request closes it at once. The server's half ends with its response, or with a data
frame that is marked as its last, and that ends the whole stream: ttrpc has no state in which a client
still sends to a server that has ended. What the client sent before it knew is dropped.

    IDLE -> OPEN -> HALF_CLOSED -> DONE       client- and bidirectional streaming
    IDLE -> HALF_CLOSED -> DONE               server streaming
    IDLE -> UNARY -> DONE                     unary, as the client sees it

On the wire a server cannot tell a unary request from a server-streaming one in all cases, so UNARY is a
state of the client only, which knows what it called.

A transition that a table does not have is an error of the side that caused it. If we caused it,
`LocalProtocolError` is raised; if the peer did, the call fails and the connection lives.
"""

from __future__ import annotations

from enum import Enum, auto

__all__ = ["CLIENT", "SERVER", "Action", "State", "Table"]


class State(Enum):
    """Where a stream is."""

    IDLE = auto()
    UNARY = auto()
    OPEN = auto()
    HALF_CLOSED = auto()
    DONE = auto()

    __hash__ = object.__hash__  # members are single; Enum's is ten times slower


class Action(Enum):
    """What can happen on a stream; SEND is this side, RECEIVE the peer."""

    SEND_UNARY_REQUEST = auto()
    SEND_REQUEST = auto()  # the client's only message: its half is closed
    SEND_OPEN_REQUEST = auto()  # messages follow
    SEND_DATA = auto()
    SEND_END = auto()  # this side's half ends without a response
    SEND_RESPONSE = auto()
    ABANDON = auto()  # nobody waits for the answer any more; nothing is sent
    RECEIVE_REQUEST = auto()
    RECEIVE_OPEN_REQUEST = auto()
    RECEIVE_DATA = auto()
    RECEIVE_END = auto()
    RECEIVE_RESPONSE = auto()

    __hash__ = object.__hash__


Table = dict[State, dict[Action, State]]

CLIENT: Table = {
    State.IDLE: {
        Action.SEND_UNARY_REQUEST: State.UNARY,
        Action.SEND_REQUEST: State.HALF_CLOSED,
        Action.SEND_OPEN_REQUEST: State.OPEN,
    },
    State.UNARY: {
        Action.RECEIVE_RESPONSE: State.DONE,
        Action.ABANDON: State.DONE,
    },
    State.OPEN: {
        Action.SEND_DATA: State.OPEN,
        Action.SEND_END: State.HALF_CLOSED,
        Action.RECEIVE_DATA: State.OPEN,
        Action.RECEIVE_END: State.DONE,
        Action.RECEIVE_RESPONSE: State.DONE,
        Action.ABANDON: State.DONE,
    },
    State.HALF_CLOSED: {
        Action.RECEIVE_DATA: State.HALF_CLOSED,
        Action.RECEIVE_END: State.DONE,
        Action.RECEIVE_RESPONSE: State.DONE,
        Action.ABANDON: State.DONE,
    },
    State.DONE: {  # answers that crossed our giving up: dropped
        Action.RECEIVE_DATA: State.DONE,
        Action.RECEIVE_END: State.DONE,
        Action.RECEIVE_RESPONSE: State.DONE,
        Action.ABANDON: State.DONE,
    },
}

SERVER: Table = {
    State.IDLE: {
        Action.RECEIVE_REQUEST: State.HALF_CLOSED,
        Action.RECEIVE_OPEN_REQUEST: State.OPEN,
    },
    State.OPEN: {
        Action.RECEIVE_DATA: State.OPEN,
        Action.RECEIVE_END: State.HALF_CLOSED,
        Action.SEND_DATA: State.OPEN,
        Action.SEND_END: State.DONE,
        Action.SEND_RESPONSE: State.DONE,
    },
    State.HALF_CLOSED: {
        Action.SEND_DATA: State.HALF_CLOSED,
        Action.SEND_END: State.DONE,
        Action.SEND_RESPONSE: State.DONE,
    },
    State.DONE: {  # messages that crossed our response: dropped
        Action.RECEIVE_DATA: State.DONE,
        Action.RECEIVE_END: State.DONE,
    },
}
