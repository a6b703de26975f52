"""The bootstrap protocol: what containerd writes to the stdin of `start`, and the answer on its stdout.

What: finds what `start` and the daemon can act on (the cgroup to put the shim in, the configuration's
path, and, from 2.3 on, the place for sockets and the log level), and writes the answer in the form that
the asking containerd is known to read.
Why by hand: loading protobuf costs three times what `start` takes.
Invariants: bytes that are no protobuf, or of unknown types, are ignored, never an error: clients
send runc's options to every runtime. Nothing here reads more than the given bytes. The bare address is
the answer that every containerd takes; only one that has shown to be 2.3 or later by sending
BootstrapParams is answered with BootstrapResult and the task service's version 3: a 1.x refuses both.

Two messages are possible (facts: containerd 1.6-2.2, and 2.3+):
google.protobuf.Any {1 type_url, 2 value} and
containerd.runtime.bootstrap.v1.BootstrapParams {... 3 log_level, 8 repeated Extension{1 Any},
9 socket_dir}; only the second has fields above 2.
"""

import os

__all__ = ["Options", "answer", "decode", "join_cgroup"]

# Where each options type keeps its shim_cgroup.
_SHIM_CGROUP = {b"containerd.runc.v1.Options": 3, b"containerd.linux.runc.CreateOptions": 9}
# Where each options type keeps the path of the runtime's configuration.
_CONFIG_PATH = {b"runtimeoptions.v1.Options": 2, b"cri.runtimeoptions.v1.Options": 2}
_MAX_SOCKET_DIR = 42  # so that <dir>/<64 hex digits> stays a legal socket path


class Options:
    """What is used of the options; empty where not given.

    `bootstrap`: they came as BootstrapParams, so that BootstrapResult is understood.
    """

    __slots__ = ("bootstrap", "config_path", "debug", "shim_cgroup", "socket_dir")

    def __init__(self) -> None:
        self.bootstrap = False
        self.config_path = ""
        self.debug = False
        self.shim_cgroup = ""
        self.socket_dir = ""


def decode(data: bytes) -> Options:
    """What `data`, all of stdin, holds of it."""
    options = Options()
    fields = _fields(data)
    if not any(number > 2 for number, _, _ in fields):
        _take(options, fields)
        return options
    options.bootstrap = True
    for number, value, integer in fields:
        if number == 3:
            # Levels are Go's (slog): DEBUG -4, TRACE -8; a negative enum is a varint of 64 bits.
            options.debug = integer >= 1 << 63
        elif number == 9:
            directory = _text(value)
            if directory.startswith("/") and len(directory) <= _MAX_SOCKET_DIR:
                options.socket_dir = directory
        elif number == 8:
            for inner, extension, _ in _fields(value):
                if inner == 1:
                    _take(options, _fields(extension))
    return options


def answer(address: str, options: Options) -> bytes:
    """What `start` prints for a shim at `address`.

    BootstrapResult is {1 version, 2 address, 3 protocol}.
    """
    text = address.encode()
    if not options.bootstrap:
        return text
    return b"\x08\x03\x12" + _length(len(text)) + text + b"\x1a\x05ttrpc"


def join_cgroup(root: str, path: str, pid: int) -> None:
    """Move `pid` to the cgroup `path` below `root`, in every hierarchy that has it (v1 has many).

    The client makes the cgroup. Raises OSError if `path` points outside of `root` or does not exist.
    """
    clean = os.path.normpath("/" + path).lstrip("/")
    if ".." in path.split("/") or not clean:
        raise OSError(22, f"shim_cgroup {path!a} is not a path below the cgroup root")
    unified = os.path.exists(os.path.join(root, "cgroup.controllers"))
    hierarchies = [""] if unified else sorted(os.listdir(root))
    joined = False
    for hierarchy in hierarchies:
        directory = os.path.join(root, hierarchy, clean)
        # cpu and cpuacct may be links to one hierarchy, or a hierarchy may be none at all.
        if os.path.isdir(directory):
            with open(os.path.join(directory, "cgroup.procs"), "wb") as procs:
                procs.write(b"%d" % pid)
            joined = True
    if not joined:
        raise OSError(2, f"shim_cgroup {path!a} does not exist below {root}")


def _take(options: Options, any_fields: list[tuple[int, bytes, int]]) -> None:
    """What a google.protobuf.Any with these fields tells; the first one to tell something wins."""
    values = {number: value for number, value, _ in any_fields}
    name = values.get(1, b"").rpartition(b"/")[2]
    cgroup, path = _SHIM_CGROUP.get(name), _CONFIG_PATH.get(name)
    for number, value, _ in _fields(values.get(2, b"")):
        if number == cgroup:
            options.shim_cgroup = options.shim_cgroup or _text(value)
        elif number == path:
            options.config_path = options.config_path or _text(value)


def _length(size: int) -> bytes:
    """A varint below 2**14: no socket address is longer."""
    return bytes((size,)) if size < 0x80 else bytes((size & 0x7F | 0x80, size >> 7))


def _text(value: bytes) -> str:
    text = value.decode("utf-8", "replace")
    return "" if "\0" in text else text


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, next position); raises IndexError at the end, ValueError when longer than 64 bits."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("varint too long")


def _fields(data: bytes) -> list[tuple[int, bytes, int]]:
    """(number, bytes, 0) of each length-delimited field, (number, b"", value) of each varint.

    Fields of fixed length are (number, b"", 0). Empty if malformed.
    """
    found: list[tuple[int, bytes, int]] = []
    at = 0
    try:
        while at < len(data):
            key, at = _varint(data, at)
            number, wire = key >> 3, key & 7
            value, integer = b"", 0
            if wire == 0:
                integer, at = _varint(data, at)
            elif wire == 1:
                at += 8
            elif wire == 5:
                at += 4
            elif wire == 2:
                size, at = _varint(data, at)
                value = data[at : at + size]
                at += size
            else:
                return []
            if at > len(data) or number == 0:
                return []
            found.append((number, value, integer))
    except (IndexError, ValueError):
        return []
    return found
