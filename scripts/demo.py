"""`make demo`: containers in virtual machines, under a containerd of its own.

What: starts a private containerd, imports a local image and runs containers with
`--runtime io.containerd.kata.v2` as anybody would with `ctr`; shows each command, what it printed, and
where the time of a start went.
Invariants: a system containerd is never touched; whatever happens, Ctrl-C included, everything that the
demo started is ended and removed. The exit code is 0 only if each container did what it should.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from testing.containerd import KATA, Containerd, Result
from testing.guest import PROJECT, guest_files
from testing.images import busybox_image

IMAGE = "local/busybox:1"
BOLD, DIM, RED, PLAIN = ("\033[1m", "\033[2m", "\033[31m", "\033[0m") if sys.stdout.isatty() else ("",) * 4


def say(text: str = "") -> None:
    """One line, at once."""
    print(text, flush=True)


def show(containerd: Containerd, result: Result) -> None:
    """The command as a person would type it, its output, exit code and time."""
    words = [
        word
        for word in result.argv
        if word not in {"--address", containerd.address, "--namespace", "default"}
    ]
    words[0] = os.path.basename(words[0])
    say(f"{BOLD}$ {shlex.join(words)}{PLAIN}")
    for line in (result.text + "\n" + result.error).splitlines():
        if line:
            say(f"  {line}")
    say(f"{DIM}  exit {result.code}, {result.seconds:.1f} s{PLAIN}")


def trace(*names: str) -> None:
    """The phases of the first of these starts that was recorded, by kata-ctl."""
    for name in names:
        done = subprocess.run(
            [str(PROJECT / ".venv/bin/kata-ctl"), "trace", name],
            check=False,
            capture_output=True,
            text=True,
            timeout=30,
        )
        if done.returncode == 0:
            break
    say()
    say(f"Where the time went ({BOLD}kata-ctl trace {name}{PLAIN}):")
    say(done.stdout.rstrip() if done.returncode == 0 else f"  {done.stderr.strip()[-500:]}")


def demonstrate(containerd: Containerd) -> list[str]:
    """Run the containers; answers what went wrong."""
    wrong = []

    def expect(what: str, fine: bool) -> None:
        if not fine:
            wrong.append(what)
            say(f"{RED}  this is wrong: {what}{PLAIN}")

    def run(*command: str, hint: str, stdin: bytes | None = None) -> tuple[str, Result]:
        name = containerd.new_id(hint)
        result = containerd.run(
            IMAGE, *command, runtime=KATA, name=name, stdin=stdin, check=False, timeout=120
        )
        show(containerd, result)
        return name, result

    first, result = run("uname", "-r", hint="kernel")
    host = os.uname().release
    say()
    say(f"  host's kernel:  {BOLD}{host}{PLAIN}")
    say(f"  guest's kernel: {BOLD}{result.text}{PLAIN}")
    say()
    expect(
        "the container must see another kernel than the host's",
        result.code == 0 and result.text not in {"", host},
    )

    second, result = run("sh", "-c", "echo bye; exit 42", hint="exit")
    expect("the exit code must be 42", (result.code, result.text) == (42, "bye"))

    text = "".join(f"line {number}\n" for number in range(1, 100001)).encode()
    say(f"{DIM}  (the next one gets {len(text)} bytes through a pipe){PLAIN}")
    _, result = run("sh", "-c", "wc -l -c", hint="pipe", stdin=text)
    expect("all bytes must arrive", result.text.split() == ["100000", str(len(text))])

    name = containerd.new_id("detached")
    detached = ("run", "-d", "--runtime", KATA, IMAGE, name, "sleep", "1000")
    show(containerd, containerd.ctr(*detached, check=False, timeout=120))
    execute = ("task", "exec", "--exec-id", "x", name, "ps", "-o", "pid,args")
    result = containerd.ctr(*execute, check=False, timeout=120)
    show(containerd, result)
    expect("an exec must see the container's processes, and only them", len(result.text.splitlines()) == 3)
    containerd.remove(name)

    trace(first, second)
    return wrong


def main() -> int:
    """Run the demo; answers the exit code."""
    missing = [str(path) for path in guest_files().values() if not path.exists()]
    if os.geteuid() != 0 or missing:
        say(
            "demo: "
            + ("run it as root" if os.geteuid() else f"not built: {', '.join(missing)}; try: make setup")
        )
        return 1

    def interrupted(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    containerd = Containerd()
    begin = time.monotonic()
    try:
        containerd.start()
        archive = Path(containerd.root, "busybox.tar")
        busybox_image(archive, IMAGE)
        containerd.ctr("image", "import", str(archive))
        say(f"A containerd of its own is up ({containerd.root}), with the image {IMAGE}.")
        say()
        wrong = demonstrate(containerd)
        if wrong:
            say(f"\n{RED}containerd's and the shim's log:{PLAIN}\n{containerd.log_tail(40)}")
        return 1 if wrong else 0
    except KeyboardInterrupt:
        say("\ninterrupted; cleaning up")
        return 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        containerd.stop()
        say(f"\nEverything is cleaned up; {time.monotonic() - begin:.0f} s in all.")


if __name__ == "__main__":
    sys.exit(main())
