"""A process that speaks protocol 1 of docs/dragonball.md, without a library or a VM behind it.

What: `install` writes it; `Fake` is one that a test starts by its path, with wishes in a file beside it, and
the actions that it saw in another. Its refusals have the words of the library of Kata 4.1.0.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Fake", "install"]

_PROGRAM = """#!PYTHON -IS
import ctypes, json, os, signal, socket, sys, threading, time

words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
wishes = json.load(open("FOLDER/wishes.json"))
seen = open("FOLDER/seen", "a")
listener = socket.socket(fileno=int(words["--api"][3:]))
vm = {"state": "Uninitialized", "machine": None, "source": None, "disks": set(), "tried": 0}
client = []

def say(**content):
    for peer in client[-1:]:
        try:
            peer.sendall(json.dumps(content).encode() + b"\\n")
        except OSError:
            pass

def end(reason, code=0):
    say(event="exit", code=code, reason=reason)
    os._exit(code)

def vcpu(number):
    ctypes.CDLL(None).prctl(15, b"db_vcpu%d" % number)
    while True:
        time.sleep(0.01)

def refuse(kind, *causes):
    raise PermissionError({"kind": kind, "causes": list(causes)})

def needs_upcall():
    vm["tried"] += 1
    if vm["tried"] > wishes.get("upcall_after", 10 ** 9):
        return
    refuse("UpcallServerNotReady", "Upcall not ready, can't hotplug device.")

def start():
    if wishes.get("start") == "dies":
        sys.stderr.write("dragonball: a word before the end\\n")
        sys.stderr.flush()
        os._exit(101)
    if wishes.get("start") == "hangs":
        time.sleep(600)
    if wishes.get("start") == "panics":
        say(event="panic", message="thread 'vmm' panicked: it cannot be")
        os._exit(101)
    if vm["source"] is None:
        refuse("StartMicroVm", "failed to boot the VM: missing kernel config", "missing kernel config")
    if wishes.get("start") == "refused":
        refuse("StartMicroVm", "failed to boot the VM", "invalid ELF magic number")
    vm["state"] = "Running"
    for number in range(vm["machine"]["vcpu_count"]):
        threading.Thread(target=vcpu, args=(number,), daemon=True).start()
    print(wishes.get("console", "the guest boots"), flush=True)
    if wishes.get("guest"):
        threading.Timer(0.1, end, [wishes["guest"], wishes.get("code", 0)]).start()

def act(name, body):
    running = vm["state"] in ("Running", "Paused")
    if name == "GetInstanceInfo":
        return {"state": vm["state"], "pid": os.getpid(), "tids": [], "upcall": False}
    if name == "ShutdownMicroVm":
        if wishes.get("deaf"):
            time.sleep(600)
        return None
    if name in ("SetVmConfiguration", "ConfigureBootSource"):
        if running:
            refuse("MachineConfig", "the update operation is not allowed after boot")
        if name == "SetVmConfiguration" and body["mem_size_mib"] % 2:
            refuse("MachineConfig", "failed to set configuration for the VM")
        vm["machine" if name == "SetVmConfiguration" else "source"] = body
        return None
    if name in ("StartMicroVm", "StartMicroVmFromSnapshot"):
        if name != "StartMicroVm" and not os.path.exists(body["mem_path"]):
            refuse("StartMicroVm", "failed to boot the VM", "No such file or directory")
        return start()
    if name in ("PauseMicroVm", "ResumeMicroVm"):
        vm["state"] = "Paused" if name == "PauseMicroVm" else "Running"
        return None
    if name == "SaveMicrovm":
        for path in body.values():
            open(path, "w").write("saved")
        return None
    if name == "ManipulateFsBackendFs":
        if wishes.get("mount") == "refused":
            refuse("FsDevice", "virtio-fs device error: attach a backend fs failed: fs tag not found")
        return None
    if name.startswith("Insert"):
        if running:
            needs_upcall()
            time.sleep(wishes.get("slow", 0))
        if name == "InsertBlockDevice":
            vm["disks"].add(body["drive_id"])
        return {"result": 0} if running else None
    if name in ("PrepareRemoveBlockDevice", "RemoveBlockDevice"):
        if body not in vm["disks"]:
            refuse("Block", "virtio-blk device error: invalid block device id")
        if name == "RemoveBlockDevice":
            vm["disks"].discard(body)
        return {"result": 0} if name != "RemoveBlockDevice" else None
    refuse("UnknownAction", "there is no action %r" % name)

def serve(peer):
    client.append(peer)
    say(event="hello", protocol=wishes.get("protocol", 1), dragonball="0.1.0", pid=os.getpid())
    if "says" in wishes:
        peer.sendall(wishes["says"].encode())
    for line in peer.makefile("rb"):
        asked = json.loads(line)
        action = asked["action"]
        name, body = (action, None) if isinstance(action, str) else next(iter(action.items()))
        seen.write(json.dumps([name, body]) + "\\n")
        seen.flush()
        try:
            answer = {"ok": act(name, body)}
        except PermissionError as error:
            answer = {"error": error.args[0]}
        if wishes.get("silent") != name:
            say(id=asked["id"], **answer)
        if name == "ShutdownMicroVm":
            end("shutdown")

signal.signal(signal.SIGTERM, lambda *_: end("signal"))
if "dies" in wishes:
    sys.exit(wishes["dies"])
while True:
    peer, _ = listener.accept()
    serve(peer)
"""


@dataclass
class Fake:
    """`folder`: where it finds its wishes, and says what it saw."""

    folder: Path

    @property
    def path(self) -> str:
        """Of the program."""
        return str(self.folder / "dragonball-process")

    def wish(self, **wishes: Any) -> None:
        """How it is to behave from its next start on."""
        (self.folder / "wishes.json").write_text(json.dumps(wishes))

    def seen(self) -> list[tuple[str, Any]]:
        """What it was asked: actions and their fields."""
        lines = (self.folder / "seen").read_text().splitlines() if (self.folder / "seen").exists() else []
        return [(name, body) for name, body in map(json.loads, lines)]

    def names(self) -> list[str]:
        """The actions alone."""
        return [name for name, _ in self.seen()]

    def bodies(self, action: str) -> list[Any]:
        """What came with this action, each time."""
        return [body for name, body in self.seen() if name == action]


def install(folder: Path) -> Fake:
    """Write the program."""
    fake = Fake(folder)
    Path(fake.path).write_text(_PROGRAM.replace("PYTHON", sys.executable).replace("FOLDER", str(folder)))
    Path(fake.path).chmod(0o755)
    fake.wish()
    return fake
