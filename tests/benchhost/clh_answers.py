"""What the real Cloud Hypervisor answers, to requests that need no guest: recorded once, compared ever after.

What: `record` starts one, asks it `SCRIPT`, and returns its answers; `python -m tests.benchhost.clh_answers`
prints them with the version, as they stand in tests/data/clh/answers.json, from which the fake answers.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

from tests.benchhost.clhs import clh

__all__ = ["RECORDED", "SCRIPT", "record"]

RECORDED = Path(__file__).parents[1] / "data" / "clh" / "answers.json"
_VM = {"payload": {"kernel": "/nope/vmlinux"}, "no_such_key": 1}
_KEPT = ("state", "version", "features")  # of an answer that has more
_DISK = {"id": "disk", "path": "/nope/disk", "image_type": "Raw"}

SCRIPT: tuple[tuple[str, str, str, str | None], ...] = (
    ("ping", "GET", "vmm.ping", None),
    ("info without a VM", "GET", "vm.info", None),
    ("boot without a VM", "PUT", "vm.boot", None),
    ("add a disk without a VM", "PUT", "vm.add-disk", json.dumps(_DISK)),
    ("an unknown path", "PUT", "vm.nope", None),
    ("an unsupported method", "PATCH", "vm.info", None),
    ("create without a body", "PUT", "vm.create", None),
    ("create with half a body", "PUT", "vm.create", '{"payload":'),
    ("a body where none belongs", "PUT", "vm.boot", "{}"),
    ("create nothing", "PUT", "vm.create", "{}"),
    ("create twice", "PUT", "vm.create", "{}"),
    ("boot nothing", "PUT", "vm.boot", None),
    ("info of nothing", "GET", "vm.info", None),
    ("delete", "PUT", "vm.delete", None),
    ("create with an unknown key", "PUT", "vm.create", json.dumps(_VM)),
    ("add a disk that is not there, before the boot", "PUT", "vm.add-disk", json.dumps(_DISK)),
    ("add it twice", "PUT", "vm.add-disk", json.dumps(_DISK)),
    ("remove what is not there", "PUT", "vm.remove-device", '{"id": "nope"}'),
    ("resize before the boot", "PUT", "vm.resize", '{"desired_vcpus": 1}'),
    ("pause before the boot", "PUT", "vm.pause", None),
    ("snapshot before the boot", "PUT", "vm.snapshot", '{"destination_url": "file:///nope"}'),
    ("boot what cannot", "PUT", "vm.boot", None),
    ("delete after a boot that failed", "PUT", "vm.delete", None),
    ("restore what is not there", "PUT", "vm.restore", '{"source_url": "file:///nope"}'),
    ("shut down", "PUT", "vmm.shutdown", None),
)


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _ask(path: str, method: str, call: str, body: str | None) -> tuple[int, Any]:
    connection = _Connection(path)
    headers = {} if body is None else {"Content-Type": "application/json"}
    connection.putrequest(method, f"/api/v1/{call}", skip_accept_encoding=True)
    for key, value in headers.items():
        connection.putheader(key, value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body.encode() if body is not None else None)
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    with contextlib.suppress(ValueError):
        return answer.status, json.loads(data)
    return answer.status, data.decode() or None


def record(folder: Path) -> dict[str, Any]:
    """Its answers by the names in `SCRIPT`, without what differs each time."""
    path = str(folder / "api.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        fd = listener.fileno()
        process = subprocess.Popen(
            [clh(), "--api-socket", f"fd={fd}"],
            pass_fds=[fd],
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
    found: dict[str, Any] = {}
    try:
        for name, method, call, body in SCRIPT:
            status, answer = _ask(path, method, call, body)
            if isinstance(answer, dict):
                answer = {
                    key: value for key, value in answer.items() if key in ("state", "version", "features")
                }
            found[name] = {"request": f"{method} {call}", "status": status, "answer": answer}
        found["exit"] = process.wait(60)
    finally:
        process.kill()
        process.communicate()
        os.unlink(path)
    return found


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        print("RECORDED " + json.dumps(record(Path(place))))
