"""Boot the guest bare: QEMU, a vsock daemon, perhaps virtiofsd, and nothing of the shim.

What: `GuestVM` is an async context manager around one VM; `python -m guest.boot` boots one for people.
Why: tests of the agent need a guest without the shim, and the bench needs an independent peer to
measure the shim against. So this imports nothing from `shim` or `hypervisors`.
Invariants: on leaving the context every process is gone and the VM's directory is removed; nothing dials
the guest before it has called home (vhost-device-vsock 0.3.0 can deadlock on that, docs/guest.md).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import BinaryIO, Self

from devices.errors import GuestError, HostError, KataError

__all__ = ["AGENT_PORT", "HOME_PORT", "SHARE_TAG", "STDIO_PORT", "GuestVM", "main"]

AGENT_PORT = 1024
STDIO_PORT = 1027
HOME_PORT = 1028
SHARE_TAG = "kataShared"
KERNEL_COMMAND_LINE = (
    "console=ttyS0 quiet reboot=t panic=-1 cryptomgr.notests swiotlb=noforce no_timer_check "
    f"root=/dev/vda rootfstype=ext4 ro agent.home_vport={HOME_PORT} agent.passfd_listener_port={STDIO_PORT}"
)
_REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_SETUP_VSOCK = os.path.join(_REPOSITORY, "build", "vsock", "usr", "bin", "vhost-device-vsock")
_C_VIRTIOFSD = "/usr/lib/qemu/virtiofsd"  # Debian 12's, a part of QEMU; later ones are in Rust
_VIRTIOFSD = ("/usr/libexec/virtiofsd", _C_VIRTIOFSD)
_CONSOLE_LIMIT = 256 * 1024
_GUEST_CID = 3


def find_vsock_daemon() -> str:
    """vhost-device-vsock: $VHOST_DEVICE_VSOCK, on PATH, or where `make setup` puts it. Raises `HostError`."""
    found = os.environ.get("VHOST_DEVICE_VSOCK") or shutil.which("vhost-device-vsock") or _SETUP_VSOCK
    if not os.access(found, os.X_OK):
        raise HostError(
            f"there is no vhost-device-vsock (looked at PATH and {found})",
            phase="guest boot",
            hint="make setup, or set VHOST_DEVICE_VSOCK to its path",
        )
    return found


def find_virtiofsd() -> str:
    """virtiofsd, where Debian puts it. Raises `HostError`."""
    for path in _VIRTIOFSD:
        if os.access(path, os.X_OK):
            return path
    raise HostError(
        "there is no virtiofsd",
        phase="guest boot",
        hint="apt-get install virtiofsd (Debian 12: qemu-system-common)",
    )


class GuestVM:
    """One running guest.

    `guest_dir`: a result of guest.build. `share`: a directory of the host to offer by virtio-fs under
    the tag `SHARE_TAG`. `append`: more words for the kernel command line. `memory` in MiB. `interactive`:
    the guest's console is this process's terminal instead of `console_tail`. `extra`: further QEMU arguments.
    """

    def __init__(
        self,
        guest_dir: str | os.PathLike[str],
        share: str | os.PathLike[str] | None = None,
        append: str = "",
        *,
        memory: int = 256,
        cpus: int = 1,
        interactive: bool = False,
        extra: Sequence[str] = (),
    ) -> None:
        self.guest_dir = os.fspath(guest_dir)
        self.share = None if share is None else os.fspath(share)
        self.append = append
        self.memory = memory
        self.cpus = cpus
        self.interactive = interactive
        self.extra = list(extra)
        self.directory = ""
        self.qemu: asyncio.subprocess.Process | None = None
        self._stack = contextlib.AsyncExitStack()
        self._console = bytearray()
        self._reader: asyncio.Future[None] | None = None
        self._more = asyncio.Event()
        self._home = asyncio.Event()

    # ---- what the user needs -----------------------------------------------------------------

    @property
    def uds(self) -> str:
        """The unix socket for "CONNECT <port>"; `<uds>_<port>` receives the guest's own calls."""
        return f"{self.directory}/vm.uds"

    def argv(self) -> list[str]:
        """QEMU's command line (valid while the directory exists)."""
        directory, size = self.directory, f"{self.memory}M"
        command_line = f"{KERNEL_COMMAND_LINE} {self.append}".strip()
        argv = ["qemu-system-x86_64", "-M", "q35,memory-backend=mem0", "-accel", "tcg", "-cpu", "max"]
        argv += [
            "-m",
            size,
            "-smp",
            str(self.cpus),
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]
        argv += ["-object", f"memory-backend-memfd,id=mem0,size={size},share=on"]
        argv += ["-kernel", f"{self.guest_dir}/vmlinux", "-initrd", f"{self.guest_dir}/initrd.img"]
        argv += [
            "-append",
            command_line,
            "-serial",
            "stdio",
            "-qmp",
            f"unix:{directory}/qmp,server=on,wait=off",
        ]
        image = f"{self.guest_dir}/rootfs.img".replace(",", ",,")
        argv += [
            "-drive",
            f"if=none,id=root,file={image},format=raw,readonly=on",
            "-device",
            "virtio-blk-pci,drive=root",
        ]
        argv += ["-chardev", f"socket,id=vsock,path={directory}/vsock"]
        argv += ["-device", "vhost-user-vsock-pci,chardev=vsock"]
        if self.share is not None:
            argv += ["-chardev", f"socket,id=fs,path={directory}/fs"]
            argv += ["-device", f"vhost-user-fs-pci,chardev=fs,tag={SHARE_TAG},queue-size=1024"]
        return argv + self.extra

    async def wait_home(self, timeout: float = 60.0) -> None:
        """Return when the guest has called home. Raises `GuestError` if it dies or is too slow."""
        assert self.qemu is not None
        home = asyncio.ensure_future(self._home.wait())
        gone = asyncio.ensure_future(self.qemu.wait())
        try:
            await asyncio.wait({home, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            home.cancel()
            gone.cancel()
        if not self._home.is_set():
            end = (
                f"QEMU ended with {self.qemu.returncode}"
                if self.qemu.returncode is not None
                else f"{timeout:.0f} s passed"
            )
            raise GuestError(
                f"the guest did not call home: {end}",
                phase="guest boot",
                details={"console": self.console_tail()},
            )

    async def connect(self, port: int, timeout: float = 10.0) -> tuple[socket.socket, int]:
        """A connected non-blocking socket to the guest's port, and the port that the guest sees as ours.

        Raises `GuestError` if nobody listens there.
        """
        await self.wait_home()
        loop = asyncio.get_running_loop()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        answer = b""
        try:
            async with asyncio.timeout(timeout):
                await loop.sock_connect(connection, self.uds)
                await loop.sock_sendall(connection, b"CONNECT %d\n" % port)
                # Byte by byte: what follows the line belongs to the caller.
                while not answer.endswith(b"\n") and len(answer) < 32:
                    byte = await loop.sock_recv(connection, 1)
                    if not byte:
                        break
                    answer += byte
        except (OSError, TimeoutError) as error:
            connection.close()
            raise GuestError(f"cannot connect to guest port {port}: {error!r}", phase="guest boot") from error
        words = answer.split()
        if len(words) != 2 or words[0] != b"OK":
            connection.close()
            raise GuestError(f"nobody listens on guest port {port} ({answer!r})", phase="guest boot")
        return connection, int(words[1])

    def console_tail(self, lines: int = 20) -> str:
        """The last lines that the guest (and QEMU's stderr) wrote."""
        return "\n".join(self._console.decode("utf-8", "replace").replace("\r", "").splitlines()[-lines:])

    def write_console(self, text: str) -> None:
        """Type on the guest's console: for a guest that was booted with `init=/bin/sh`."""
        assert self.qemu is not None
        assert self.qemu.stdin is not None
        self.qemu.stdin.write(text.encode())

    async def wait_console(self, text: str, timeout: float = 60.0) -> None:
        """Return when the console shows the text. Raises `GuestError` if the guest ends or is too slow."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while text.encode() not in self._console and not self._ended():
                    self._more.clear()
                    await self._more.wait()
        if text.encode() not in self._console:
            raise GuestError(
                f"the console does not show {text!r}",
                phase="guest boot",
                details={"console": self.console_tail()},
            )

    def _ended(self) -> bool:
        return self._reader is None or self._reader.done()

    async def wait_end(self) -> int:
        """Return QEMU's exit code when it has ended and `console_tail` is complete."""
        assert self.qemu is not None
        code = await self.qemu.wait()
        if self._reader is not None:
            await asyncio.shield(self._reader)
        return code

    # ---- life --------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        for name in ("vmlinux", "initrd.img", "rootfs.img"):
            if not os.path.exists(f"{self.guest_dir}/{name}"):
                raise HostError(
                    f"{self.guest_dir} has no {name}", phase="guest boot", hint="python -m guest.build"
                )
        self.directory = tempfile.mkdtemp(prefix="guest-")
        stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        home = await asyncio.start_unix_server(self._called_home, f"{self.uds}_{HOME_PORT}")
        stack.callback(home.close)
        await self._vsock_daemon(stack)
        if self.share is not None:
            await self._share_daemon(stack, self.share)
        if self.interactive:
            self.qemu = await asyncio.create_subprocess_exec(*self.argv())
            stack.push_async_callback(_end, self.qemu)
            return
        self.qemu = await asyncio.create_subprocess_exec(
            *self.argv(),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        self._reader = asyncio.ensure_future(self._read_console(self.qemu))
        stack.push_async_callback(_finish, self._reader)
        stack.push_async_callback(_end, self.qemu)

    def _log(self, stack: contextlib.AsyncExitStack, name: str) -> BinaryIO:
        """A file for a daemon's output, which goes with the directory."""
        return stack.enter_context(open(f"{self.directory}/{name}.log", "w+b"))

    async def _vsock_daemon(self, stack: contextlib.AsyncExitStack) -> None:
        """Start vhost-device-vsock and wait until it listens, which takes it 7 ms. Raises `HostError`."""
        path = f"{self.directory}/vsock"
        log = self._log(stack, "vsock")
        process = await asyncio.create_subprocess_exec(
            find_vsock_daemon(),
            "--vm",
            f"guest-cid={_GUEST_CID},socket={path},uds-path={self.uds},tx-buffer-size=28672",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        stack.push_async_callback(_end, process)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                while not _listens(path) and process.returncode is None:  # noqa: ASYNC110  (nothing announces it)
                    await asyncio.sleep(0.002)
        if not _listens(path):
            log.seek(0)
            words = log.read()[-500:].decode("utf-8", "replace")
            raise HostError(f"vhost-device-vsock did not open its socket: {words}", phase="guest boot")

    async def _share_daemon(self, stack: contextlib.AsyncExitStack, directory: str) -> None:
        """Start virtiofsd on a socket that listens already, so that nobody needs to wait for it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(f"{self.directory}/fs")
            listener.listen(1)
            argv = [find_virtiofsd(), f"--fd={listener.fileno()}"]
            if argv[0] == _C_VIRTIOFSD:
                argv += ["-o", f"source={directory}", "-o", "cache=auto", "-o", "sandbox=chroot", "-f"]
            else:
                argv += [f"--shared-dir={directory}", "--cache=auto", "--sandbox=chroot", "--log-level=warn"]
            log = self._log(stack, "fs")
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
            )
        stack.push_async_callback(_end, process)

    async def _called_home(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._home.set()
        writer.close()

    async def _read_console(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while chunk := await process.stdout.read(65536):
            self._console += chunk
            del self._console[:-_CONSOLE_LIMIT]
            self._more.set()
        self._more.set()


def _listens(path: str) -> bool:
    """True if a unix socket listens at the path, without using up a connection to it."""
    with open("/proc/net/unix", encoding="utf-8") as table:
        return any(line.endswith(f" {path}\n") and line.split()[3] == "00010000" for line in table)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill and reap; nothing in these processes is worth an orderly end."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    await process.wait()


async def _finish(task: asyncio.Future[None]) -> None:
    """The console's reader ends by itself when QEMU is gone."""
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _show(options: argparse.Namespace) -> int:
    append = "init=/bin/sh" if options.shell else options.append
    loop = asyncio.get_running_loop()
    begin = loop.time()
    async with GuestVM(
        options.guest,
        options.share,
        append,
        memory=options.memory,
        cpus=options.cpus,
        interactive=options.console,
    ) as vm:
        assert vm.qemu is not None
        print(" ".join(shlex.quote(word) for word in vm.argv()), file=sys.stderr)
        if not options.shell:
            await vm.wait_home()
            took = loop.time() - begin
            print(f"guest.boot: ready after {took:.2f} s; CONNECT {AGENT_PORT} on {vm.uds}", file=sys.stderr)
        return await vm.qemu.wait()


def main(arguments: Iterable[str] | None = None) -> int:
    """The command line; returns QEMU's exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m guest.boot", description="Boot the guest bare, until it ends."
    )
    parser.add_argument(
        "--guest", default="build/guest", help="a result of guest.build (default: %(default)s)"
    )
    parser.add_argument("--share", help=f"a directory for the guest to mount as virtiofs {SHARE_TAG}")
    parser.add_argument("--append", default="", help="more words for the kernel command line")
    parser.add_argument("--memory", type=int, default=256, help="MiB (default: %(default)s)")
    parser.add_argument("--cpus", type=int, default=1, help="vCPUs (default: %(default)s)")
    parser.add_argument("--console", action="store_true", help="the guest's console on this terminal")
    parser.add_argument("--shell", action="store_true", help="a shell on the console instead of the agent")
    options = parser.parse_args(None if arguments is None else list(arguments))
    options.console = options.console or options.shell
    try:
        return asyncio.run(_show(options))
    except KeyboardInterrupt:
        return 130
    except KataError as error:
        print(f"guest.boot: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
