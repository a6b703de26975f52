"""A Cloud Hypervisor without a VM: a program that answers as the real one of 53.0 does.

What: `install` writes it; `Fake` is one that a test starts by its path, with wishes in a file beside it, and
the requests that it saw in another. Refusals are the real one's texts (tests/data/clh/answers.json); what it
does on success is what was seen of it: events over several lines, a removal that is answered before the
guest lets go, memory that says yes and stays, threads by the names of vCPUs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Fake", "install"]

_ANSWERS = Path(__file__).parents[3] / "data" / "clh" / "answers.json"

_PROGRAM = """#!PYTHON -IS
import ctypes, json, os, socket, sys, threading, time

words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
wishes = json.load(open("FOLDER/wishes.json"))
answers = json.load(open("ANSWERS"))
seen = open("FOLDER/seen", "a")
listener = socket.socket(fileno=int(words["--api-socket"][3:]))
events = int(words["--event-monitor"][3:])
vm = {"config": None, "state": "Created", "threads": 0, "memory": 0, "slot": 20}
taken, leaving = {}, set()
lock = threading.Lock()

def say(source, event, **properties):
    os.write(events, json.dumps({"timestamp": {}, "source": source, "event": event,
        "properties": properties or None}, indent=2).encode() + b"\\n\\n")

def vcpu(number):
    ctypes.CDLL(None).prctl(15, b"vcpu%d" % number)
    while number < vm["threads"]:
        time.sleep(0.005)

def cpus(count):
    first, vm["threads"] = vm["threads"], count
    for number in range(first, count):
        threading.Thread(target=vcpu, args=(number,), daemon=True).start()

def let_go(name):
    time.sleep(wishes.get("lets_go_after", 0.02))
    while wishes.get("waits") and not os.path.exists("FOLDER/go"):
        time.sleep(0.01)
    say("virtio-device", "reset", id="_virtio-pci-" + name)
    leaving.discard(name)
    taken.pop(name, None)
    say("vm", "device-removed", id=name, bdf="0000:00:14.0")

def refuse(name):
    answer = answers[name]
    return answer["status"], answer["answer"]

def cause(*chain):
    return 500, ["Error from API", *chain]

def add(body, fds, hot):
    name = body.get("id") or "_device"
    if name in taken:
        return refuse("add it twice")
    if "mac" in body and not body.get("vhost_user") and len(fds) * 2 != body.get("num_queues"):
        taken[name] = body  # a tap of its own, and yes: what a driver must not rely on
    if body.get("path") and body.get("image_type") != "Raw":
        return cause("the fake: a disk whose format was not said")
    taken[name] = body
    if not hot:
        return 204, None
    vm["slot"] += 1
    return 200, {"id": name, "bdf": wishes.get("bdf", "0000:00:%02x.0" % vm["slot"])}

def boot():
    config = vm["config"]
    if not config.get("payload", {}).get("kernel"):
        return refuse("boot nothing")
    if wishes.get("boot") == "dies":
        sys.stderr.write("Error: Cloud Hypervisor exited with the following chain of errors:\\n")
        sys.stderr.flush()
        os._exit(1)
    if wishes.get("boot") == "refused":
        return refuse("boot what cannot")
    vm["state"] = "Running"
    cpus(config["cpus"]["boot_vcpus"])
    vm["memory"] = config["memory"]["size"]
    say("vm", "booting")
    print(wishes.get("console", "the guest boots"), flush=True)
    say("vm", "booted")
    if wishes.get("guest"):
        threading.Timer(0.05, lambda: guest(wishes["guest"])).start()
    return 204, None

def guest(what):
    if what == "reset":
        say("vm", "rebooting")
        time.sleep(0.5)
        say("vm", "rebooted")
    else:
        if what == "fails":
            sys.stderr.write("ERROR:vmm/src/cpu.rs:1460 -- VCPU generated error: VcpuRun(Failed\\n")
            sys.stderr.flush()
        say("vm", "shutdown")
        say("vmm", "shutdown")
        os._exit(0)

def resize(body):
    if body.get("desired_vcpus"):
        if wishes.get("busy"):
            return 429, ["Error from API", "The VM could not be resized", "vCPU is pending removal"]
        if not wishes.get("lazy"):
            cpus(body["desired_vcpus"])
    if body.get("desired_ram"):
        virtio = vm["config"]["memory"].get("hotplug_method") == "VirtioMem"
        if body["desired_ram"] > vm["memory"] or (virtio and not wishes.get("lazy")):
            vm["memory"] = body["desired_ram"]
    return 204, None

def act(method, call, body, fds):
    running = vm["state"] in ("Running", "Paused")
    if (method, call) == ("GET", "vmm.ping"):
        return 200, {"version": "v53.0", "pid": os.getpid()}
    if call == "vmm.shutdown":
        return 200, None
    if vm["config"] is None and call not in ("vm.create", "vm.restore"):
        return refuse("info without a VM")
    if call == "vm.create":
        if vm["config"] is not None:
            return refuse("create twice")
        vm["config"] = body
        for key in ("disks", "net", "fs", "devices"):
            for each in body.get(key, ()):
                status, answer = add(each, (), False)
                if status >= 300:
                    return status, answer
        return 204, None
    if call == "vm.restore":
        with open(body["source_url"][7:] + "/config.json") as file:
            vm["config"] = json.load(file)
        vm["state"] = "Running"
        cpus(vm["config"]["cpus"]["boot_vcpus"])
        vm["memory"] = vm["config"]["memory"]["size"]
        return 204, None
    if call == "vm.boot":
        return boot()
    if call == "vm.info":
        return 200, {"config": vm["config"], "state": vm["state"], "memory_actual_size": vm["memory"]}
    if call == "vm.counters":
        return 200, {"disk": {"read_bytes": 7, "read_latency_min": (1 << 64) - 1}}
    if call.startswith("vm.add-"):
        if wishes.get("silent") == call:
            return None
        time.sleep(wishes.get("slow", 0))
        return add(body, fds, running)
    if call == "vm.remove-device":
        name = body["id"]
        if name not in taken or name in leaving:
            return refuse("remove what is not there")
        leaving.add(name)
        threading.Thread(target=let_go, args=(name,), daemon=True).start()
        return 204, None
    if call == "vm.resize":
        return resize(body)
    if call == "vm.resize-disk":
        return 204, None
    if call in ("vm.pause", "vm.resume"):
        if not running:
            return refuse("pause before the boot")
        vm["state"] = "Paused" if call == "vm.pause" else "Running"
        return 204, None
    if call == "vm.snapshot":
        if vm["state"] != "Paused":
            return cause("The VM could not be snapshotted", "VM is not paused")
        folder = body["destination_url"][7:]
        for name in ("config.json", "state.json", "memory-ranges"):
            with open(folder + "/" + name, "w") as file:
                json.dump(vm["config"], file)
        return 204, None
    return refuse("an unknown path")

def serve(peer):
    data, fds = b"", []
    while True:
        while b"\\r\\n\\r\\n" not in data:
            more, got, _, _ = socket.recv_fds(peer, 1 << 16, 8)
            fds += got
            if not more:
                return
            data += more
        head, _, data = data.partition(b"\\r\\n\\r\\n")
        lines = head.decode().split("\\r\\n")
        method, path, _ = lines[0].split(" ")
        lengths = [each.split(":")[1] for each in lines if each.lower().startswith("content-length:")]
        length = int(lengths[0]) if lengths else -1
        while len(data) < length:
            data += peer.recv(1 << 16)
        text, data = data[: max(0, length)], data[max(0, length) :]
        call = path.rpartition("/")[2]
        if length == 0:
            raise SystemExit("a length of nothing")
        seen.write(json.dumps([method, call, json.loads(text) if text else None, len(fds)]) + "\\n")
        seen.flush()
        with lock:
            outcome = act(method, call, json.loads(text) if text else None, fds)
        for fd in fds:
            os.close(fd)
        fds = []
        if outcome is None:
            continue
        status, answer = outcome
        body = b"" if answer is None else json.dumps(answer).encode()
        extra = b"Content-Type: application/json\\r\\n" if body else b""
        head = b"HTTP/1.1 %d \\r\\nServer: Cloud Hypervisor API\\r\\n" % status
        head += b"Connection: keep-alive\\r\\n" + extra
        if status != 204:
            head += b"Content-Length: %d\\r\\n" % len(body)
        peer.sendall(head + b"\\r\\n" + body)
        if call == "vmm.shutdown":
            os._exit(0)

say("vmm", "starting")
if "dies" in wishes:
    sys.exit(wishes["dies"])
while True:
    peer, _ = listener.accept()
    threading.Thread(target=serve, args=(peer,), daemon=True).start()
"""


@dataclass
class Fake:
    """`folder`: where it finds its wishes, and says what it saw."""

    folder: Path

    @property
    def path(self) -> str:
        """Of the program."""
        return str(self.folder / "cloud-hypervisor")

    def wish(self, **wishes: Any) -> None:
        """How it is to behave from its next start on."""
        (self.folder / "wishes.json").write_text(json.dumps(wishes))

    def go(self) -> None:
        """What a guest that waits is waiting for."""
        (self.folder / "go").write_text("")

    def seen(self) -> list[tuple[str, Any, int]]:
        """What it was asked: call, body, number of descriptors."""
        lines = (self.folder / "seen").read_text().splitlines() if (self.folder / "seen").exists() else []
        return [(call, body, fds) for _, call, body, fds in map(json.loads, lines)]

    def bodies(self, call: str) -> list[Any]:
        """What came with this call, each time."""
        return [body for name, body, _ in self.seen() if name == call]


def install(folder: Path) -> Fake:
    """Write the program."""
    fake = Fake(folder)
    text = _PROGRAM.replace("PYTHON", sys.executable).replace("FOLDER", str(folder))
    Path(fake.path).write_text(text.replace("ANSWERS", str(_ANSWERS)))
    Path(fake.path).chmod(0o755)
    fake.wish()
    return fake
