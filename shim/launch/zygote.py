"""kata-shim-zygote: a process that holds the daemon's modules and forks a ready daemon for each `start`.

What: `main` listens for shim/launch/client.c, and always has one child that waits for the next client. That
one becomes what the client's process is (`shim.launch.caller`), does what `start` does, and is the daemon.
Why: to import takes a hundred milliseconds and 18 MB in each shim; pages from before a fork are shared.
Nobody needs it: a client that gets no READY in a second runs the launcher.
Invariants:
- The zygote reads no byte of a client, and does not even accept it: its child does. So it never holds
  anything of a sandbox, and no frame can harm it. Its socket is 0600 in a directory that is root's alone, and
  the kernel is asked for the peer's user.
- A client's descriptors come with GO: in the queue of a zygote that stands still they would keep containerd's
  pipe open.
- A child does nothing that can be seen before it has read GO, so one that a client gave up is none.
- It serves the installation that it was started from: a child that finds a file of it changed refuses, and
  the zygote leaves. So it does when nobody asked for ten minutes.
- A child that waits ends with the zygote; one that has a client never does.
- It has one thread, and its children are no zombies, whether it runs, is stopped or is gone.

    client                      child (the future daemon)
    MAGIC argc size words       ->  arguments, then the environment
                                <-  READY pid      or  NO text: run the launcher
    GO and four descriptors     ->  working directory, stdin, stdout, stderr
                                <-  DONE exit code, what to print on stdout
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from shim.launch import caller
from shim.launch.settle import settle

__all__ = ["IDLE_LIMIT", "Installation", "main", "read_request", "serve"]

IDLE_LIMIT = 600.0
"""Seconds without a client after which the zygote ends."""
MAGIC = b"KZ1\n"
MAX_FRAME = 1 << 20  # bytes of arguments and environment, as in the client
MAX_ANSWER = 4096  # bytes
_FRAME_LIMIT = 1.0  # seconds for a whole request; the client waits no longer for READY
_GO_LIMIT = 2.0  # seconds from READY to GO
_HEAD = struct.Struct("=4sII")
_PEER = struct.Struct("=iII")
_MARK = struct.Struct("=QqQ")
_SYSTEMD_FD = 3
_TAKEN, _CHANGED, _IDLE = b"T", b"C", b"I"  # what the child tells; an end without a word counts as TAKEN

# What a daemon loads until its first container runs.
_MODULES = (
    "shim.launch.daemon",
    "shim.runtime",
    "hypervisors.qemu.plugin",
    "hypervisors.qemu.vmm",
    "hypervisors.qemu.adopt",
    "hypervisors.qemu.recipes",
    "devices.vfio",
    "devices.vsock_daemon",
    "proto.loopback_pb2",
    "shim.config.position",
    "shim.resources.network.watch",
    "shim.resources.network.relay",
    "shim.resources.network.loopback",
    "encodings.ascii",
)
Launch = Callable[..., int]


class Installation:
    """The files that this process has loaded, and `more`. `changed`: whether one is another by now.

    Names and marks lie in one object each: to look at four hundred objects in a child copies their pages.
    """

    def __init__(self, more: Sequence[str] = ()) -> None:
        named = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
        files = {name for name in named if isinstance(name, str) and name.startswith("/")}
        files |= {os.path.realpath(sys.executable), *more}
        names = sorted(files)
        self._names = "\0".join(names)
        self._marks = b"".join(map(_mark, names))

    def changed(self) -> str:
        """The first file that has changed, "" if none has."""
        at = 0
        for name in self._names.split("\0"):
            if not self._marks.startswith(_mark(name), at):
                return name
            at += _MARK.size
        return ""


def _mark(name: str) -> bytes:
    try:
        info = os.stat(name)
    except OSError:
        return bytes(_MARK.size)
    return _MARK.pack(info.st_ino, info.st_mtime_ns, info.st_size)


def main(
    place: str, program: str, launch: Launch, bind: Callable[[str], int], limit: float = IDLE_LIMIT
) -> int:
    """Be the zygote that listens at `place`, or on the socket that systemd passed; the exit code.

    `program` is the client that it serves; `launch` and `bind` are the launcher's `main` and `bind`. Ends
    at once, well, where another one listens.
    """
    os.umask(0o077)
    given = _from_systemd()
    if given is not None:
        _refuse_waiting(given)  # whoever woke us is faster alone than after our imports
    gc.disable()
    for name in _MODULES:
        importlib.import_module(name)
    os.chdir("/")
    if given is None:
        problem = _directory(os.path.dirname(place))
        if problem:
            sys.stderr.write(f"kata-shim-zygote: {problem}\n")
            return 1
        descriptor = bind(place)
        if descriptor < 0:
            return 0
        listener = socket.socket(fileno=descriptor)
    else:
        listener = given
    info = os.stat(place) if given is None else None
    try:
        caller.name_process("kata-shim-zygote", [b"kata-shim-zygote", os.fsencode(place)], None)
    except caller.Refused as why:  # as in each child
        sys.stderr.write(f"kata-shim-zygote: this kernel does not let a process change its name: {why}\n")
        return 1
    installation = Installation([program])
    from shim.launch.rehearsal import rehearse

    rehearse(f"{place}.r")
    settle()
    try:
        serve(listener, installation.changed, launch, limit)
    finally:
        listener.close()
        if info is not None:
            with contextlib.suppress(OSError):
                now = os.stat(place)
                if (now.st_ino, now.st_ctime_ns) == (info.st_ino, info.st_ctime_ns):
                    os.unlink(place)
    return 0


def serve(listener: socket.socket, changed: Callable[[], str], launch: Launch, limit: float) -> None:
    """Have a child that waits for a client of this user, until nobody came for `limit` seconds or the
    installation changed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel takes them, at any time
    listener.setblocking(True)
    while True:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        own = os.getpid()
        child = os.fork()
        if not child:
            os.close(reader)
            _child(listener, writer, own, changed, launch)
        os.close(writer)
        with _closing(reader):
            ready, _, _ = select.select([reader], [], [], limit)
            said = os.read(reader, 1) if ready else _IDLE
        if said in (_IDLE, _CHANGED):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)  # it has no client, or one that it has refused
            return


@contextlib.contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


def _child(
    listener: socket.socket, writer: int, zygote: int, changed: Callable[[], str], launch: Launch
) -> NoReturn:
    """Wait for a client, read what it wants, become it, and do it."""
    code = 1
    try:
        caller.end_with_parent(zygote)
        caller.rehearse()
        connection, _ = listener.accept()
        caller.end_with_parent(0)
        pid, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if uid != os.geteuid() or pid <= 0:
            _say(f"refused: a process of user {uid}")
            os._exit(0)
        if file := changed():
            _no(connection, f"{file} has changed")
            os.write(writer, _CHANGED)
            os._exit(0)
        os.write(writer, _TAKEN)
        os.close(writer)
        listener.close()
        words, environment = read_request(connection, _FRAME_LIMIT)
        parent = caller.adopt(pid, words, environment)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        connection.settimeout(_GO_LIMIT)
        connection.sendall(b"R" + struct.pack("=I", os.getpid()))
        said, fds, flags, _ = socket.recv_fds(connection, 1, 4)
        if said != b"G" or len(fds) != 4 or flags & socket.MSG_CTRUNC:
            os._exit(0)
        connection.settimeout(None)
        caller.take_descriptors(fds)
    except caller.Refused as why:
        _no(connection, str(why))
        os._exit(0)
    except OSError:  # the client is gone, or too slow
        os._exit(0)
    except BaseException as error:  # noqa: BLE001  (a forked child must never return)
        _say(f"{type(error).__name__}: {error}")
        os._exit(1)

    def answer(text: bytes) -> None:
        connection.sendall(struct.pack("=cBI", b"D", 0, len(text)) + text)
        connection.close()

    try:
        # Returns only where there is no daemon.
        code = launch([os.fsdecode(word) for word in words[1:]], forked=(parent, answer))
        connection.sendall(struct.pack("=cBI", b"D", code, 0))
    except BaseException:  # noqa: BLE001  (likewise)
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def read_request(connection: socket.socket, limit: float) -> tuple[list[bytes], dict[bytes, bytes]]:
    """(program and arguments, environment) of a client's frame, which must be there within `limit` seconds.
    Raises `caller.Refused` for one that is none, OSError where it does not come."""
    until = time.monotonic() + limit
    data = bytearray()
    size = _HEAD.size
    count = -1
    while len(data) < size:
        connection.settimeout(max(0.001, until - time.monotonic()))
        try:
            piece = connection.recv(size - len(data))  # which drops descriptors
        except TimeoutError:
            raise caller.Refused("half a frame") from None
        if not piece:
            raise caller.Refused("half a frame")
        data += piece
        if count < 0 and len(data) >= _HEAD.size:
            magic, count, length = _HEAD.unpack_from(data)
            if magic != MAGIC or length > MAX_FRAME or not 0 < count <= length:
                raise caller.Refused("no frame of this protocol")
            size += length
    words = bytes(data[_HEAD.size :]).split(b"\0")
    if words.pop() or len(words) < count:
        raise caller.Refused("a frame whose words do not add up")
    pairs = (word.partition(b"=") for word in words[count:])
    return words[:count], {name: value for name, equal, value in pairs if name and equal}


def _from_systemd() -> socket.socket | None:
    """The listening socket by sd_listen_fds(3), if there is one."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or count != "1":
        return None
    os.set_inheritable(_SYSTEMD_FD, False)
    return socket.socket(fileno=_SYSTEMD_FD)


def _refuse_waiting(listener: socket.socket) -> None:
    listener.setblocking(False)
    with contextlib.suppress(OSError):
        while True:
            listener.accept()[0].close()


def _directory(path: str) -> str:
    """Make the socket's directory; why it cannot be used, "" if it can: it must be ours alone."""
    try:
        os.makedirs(path, 0o700, exist_ok=True)
        info = os.lstat(path)
    except OSError as error:
        return f"cannot make {path}: {error.strerror}"
    if info.st_mode & 0o170000 != 0o040000 or info.st_uid != os.geteuid() or info.st_mode & 0o077:
        return f"{path} is not a directory of this user's alone; try: remove it"
    return ""


def _no(connection: socket.socket, why: str) -> None:
    _say(f"refused: {why}")
    with contextlib.suppress(OSError):
        connection.sendall(b"N" + why.encode("utf-8", "replace")[:MAX_ANSWER])


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"kata-shim-zygote: {text}\n".encode("utf-8", "replace"))
