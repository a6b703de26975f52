"""The errors of this package: who broke the protocol, how a call ended, that a connection is gone.

    ProtocolError             root of the two below; not raised itself
    +-- LocalProtocolError    this side asked for something that the protocol forbids
    +-- RemoteProtocolError   the peer sent bytes that mean nothing: drop the connection
    RpcError                  the status of one call; the connection lives
    ConnectionClosed          the connection ended under a call, or before it

Invariant: bytes from the peer never cause anything but `RemoteProtocolError`.
"""

from __future__ import annotations

from ._status import Code

__all__ = ["ConnectionClosed", "LocalProtocolError", "ProtocolError", "RemoteProtocolError", "RpcError"]


class ProtocolError(Exception):
    """Root of `LocalProtocolError` and `RemoteProtocolError`; not raised itself."""


class LocalProtocolError(ProtocolError):
    """This side tried what the state of the stream does not allow, or a message above the limit.

    Nothing was sent, and the connection is as it was.
    """


class RemoteProtocolError(ProtocolError):
    """The peer does not speak ttrpc. The connection cannot be used any more."""


class RpcError(Exception):
    """The status of a call that did not succeed.

    Clients raise it; handlers raise it to choose the status that their caller gets.
    `code` is one of google.rpc.Code, `message` a text for humans.
    """

    def __init__(self, code: Code | int, message: str = "") -> None:
        self.code = Code.of(code)
        self.message = message
        super().__init__(self.code, message)

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}" if self.message else self.code.name


class ConnectionClosed(ConnectionError):  # noqa: N818  (a state, like asyncio's CancelledError is not)
    """The connection is closed; whether the peer ran the call is not known.

    A handler that lets it through, because it made a call of its own, answers UNAVAILABLE.
    """

    code = "UNAVAILABLE"
