"""The guest's first program: listen, call home, then load and serve the rest.

What: `main()` binds the vsock ports and tells the host so before anything heavy is imported; host and
guest work at the same time from then on (the backlog holds the host's connection).
Why so early: under emulation every import costs ten times its usual time.
Invariants: as PID 1 the agent never returns (the kernel would panic): it powers the VM off instead,
also on an error of its own. Before the call home only built-in modules are used.
"""

from __future__ import annotations

import _socket
import os
import sys

from agent import log
from agent.cmdline import AGENT_PORT, Params, parse
from agent.deadlines import set_hotplug

__all__ = ["listen", "main"]

_BACKLOG = 128
_HOST_CID = 2


def listen(port: int) -> int:
    """A listening AF_VSOCK socket's descriptor."""
    listener = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
    listener.bind((_socket.VMADDR_CID_ANY, port))
    listener.listen(_BACKLOG)
    return listener.detach()


def call_home(port: int) -> None:
    """Tell the host that the agent's ports are open; see the kernel parameter agent.home_vport."""
    caller = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM)
    try:
        caller.connect((_HOST_CID, port))
    except OSError as error:
        log.error(f"calling home at port {port}: {error}")
    finally:
        caller.close()


def _read_params() -> Params:
    try:
        fd = os.open("/proc/cmdline", os.O_RDONLY)
    except OSError:
        return Params()
    try:
        return parse(os.read(fd, 65536).decode(errors="replace"))
    finally:
        os.close(fd)


def _power_off() -> None:
    """End the VM. QEMU's -no-reboot turns the restart into its exit."""
    try:
        os.sync()
        fd = os.open("/proc/sysrq-trigger", os.O_WRONLY)
        os.write(fd, b"b")
    finally:
        os._exit(1)


def _serve(params: Params) -> None:
    if params.port:
        from agent.serve import serve_port

        serve_port(params.port)
        return
    agent_fd = listen(AGENT_PORT)
    stream_fd = listen(params.stream_port) if params.stream_port else -1
    if params.home_port:
        call_home(params.home_port)
    from agent.serve import serve

    serve(agent_fd, stream_fd)


def main() -> None:
    """Entry of /sbin/init in our guest image."""
    params = _read_params()
    log.set_debug(params.debug)
    set_hotplug(params.hotplug_timeout)
    try:
        _serve(params)
    except BaseException as error:
        log.error(f"the agent failed: {type(error).__name__}: {error}")
        if os.getpid() != 1:
            raise
        sys.excepthook(type(error), error, error.__traceback__)
    if os.getpid() == 1:
        _power_off()
