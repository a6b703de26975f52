"""ttrpc: gRPC's calls over a plain stream socket, without HTTP/2.

What: `Server` and `Client` for asyncio, by protobuf service descriptors; below them a core without input
and output (`ClientConnection`, `ServerConnection`: bytes in, events out), for other shells and for tests.
See README.md beside this file for usage, and for what differs from the protocol's text.
Invariant: importing the package is cheap; asyncio and protobuf are loaded with the first name that needs
them.
"""

from __future__ import annotations

from ._errors import ConnectionClosed, LocalProtocolError, ProtocolError, RemoteProtocolError, RpcError
from ._frames import MAX_MESSAGE
from ._names import snake_case
from ._status import Code

TYPE_CHECKING = False  # type checkers take it for True; `typing` itself would cost milliseconds
if TYPE_CHECKING:
    from ._client import Client, ClientStream, Stub
    from ._connection import ClientConnection, MessageTooLarge, Metadata, ServerConnection
    from ._server import CallContext, Server

__all__ = [
    "MAX_MESSAGE",
    "CallContext",
    "Client",
    "ClientConnection",
    "ClientStream",
    "Code",
    "ConnectionClosed",
    "LocalProtocolError",
    "MessageTooLarge",
    "Metadata",
    "ProtocolError",
    "RemoteProtocolError",
    "RpcError",
    "Server",
    "ServerConnection",
    "Stub",
    "snake_case",
]

_HOMES = {
    "CallContext": "_server",
    "Client": "_client",
    "ClientConnection": "_connection",
    "ClientStream": "_client",
    "MessageTooLarge": "_connection",
    "Metadata": "_connection",
    "Server": "_server",
    "ServerConnection": "_connection",
    "Stub": "_client",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value
