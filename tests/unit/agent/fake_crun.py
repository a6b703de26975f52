#!/usr/bin/python3 -ISB
"""Stands in for crun in tests: no namespaces, but the same command line, files and processes.

`create` leaves a process that waits for a byte in <root>/<id>/exec.fifo and then becomes the program;
`exec --detach` leaves the program itself. A terminal is sent over the console socket.
"""

import fcntl
import json
import os
import socket
import sys
import termios
from typing import Any, NoReturn


def fail(log: str, message: str) -> NoReturn:
    with open(log, "w") as file:
        file.write(message + "\n")
    sys.exit(1)


def option(args: list[str], name: str) -> str:
    for at, word in enumerate(args):
        if word == name:
            return args[at + 1]
        if word.startswith(name + "="):
            return word.split("=", 1)[1]
    raise SystemExit(f"fake crun: no {name} in {args}")


def launch(args: list[str], log: str, process: dict[str, Any], fifo: str | None) -> None:
    program = process["args"][0]
    paths = [f"{folder}/{program}" for folder in ("", "/bin", "/usr/bin")]
    if not any(os.access(path, os.X_OK) for path in paths):
        fail(log, f"executable file `{program}` not found in $PATH: No such file or directory")
    slave = None
    if process["terminal"]:
        master, slave = os.openpty()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(option(args, "--console-socket"))
            socket.send_fds(connection, [b"tty"], [master])
        os.close(master)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if slave is not None:
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            for fd in range(3):
                os.dup2(slave, fd)
        if fifo:
            with open(fifo, "rb") as file:
                file.read(1)
        os.execvpe(program, process["args"], {"PATH": "/bin:/usr/bin"})
    with open(option(args, "--pid-file"), "w") as file:
        file.write(str(pid))


def main() -> None:
    args = sys.argv[1:]
    root, log = option(args, "--root"), option(args, "--log")
    with open(f"{os.path.dirname(root)}/calls", "a") as file:
        file.write(json.dumps(args) + "\n")
    verb = next(word for word in args if word in ("create", "start", "exec", "delete", "update"))
    state = f"{root}/{args[-1]}"
    if verb == "create":
        with open(f"{option(args, '--bundle')}/config.json") as file:
            process = json.load(file)["process"]
        os.makedirs(state)
        os.mkfifo(f"{state}/exec.fifo")
        launch(args, log, process, f"{state}/exec.fifo")
    elif verb == "exec":
        with open(option(args, "--process")) as file:
            launch(args, log, json.load(file), None)
    elif verb == "start":
        with open(f"{state}/exec.fifo", "wb") as file:
            file.write(b"0")
    elif verb == "delete":
        for folder, _, names in os.walk(state, topdown=False):
            for name in names:
                os.unlink(f"{folder}/{name}")
            os.rmdir(folder)


main()
