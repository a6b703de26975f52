"""The pod's own container runs the guest's pause: nothing of its image is used, all else is as asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.pause import ROOT, is_own, own_config
from guest.build import _BARE_FLAGS

_SOURCE = Path(__file__).parents[3] / "guest" / "pause.c"
_CONFIG = {
    "ociVersion": "1.0.2",
    "hostname": "pod",
    "process": {
        "terminal": False,
        "user": {"uid": 65535, "gid": 65535},
        "args": ["/bin/evil", "--now"],
        "env": ["LD_PRELOAD=/evil.so"],
        "cwd": "/nowhere",
        "noNewPrivileges": False,
        "capabilities": {"bounding": ["CAP_SYS_ADMIN"]},
        "oomScoreAdj": -998,
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1, "soft": 1}],
    },
    "root": {"path": "/image", "readonly": False},
    "mounts": [{"destination": "/etc/hosts", "source": "/evil", "options": ["rbind"]}],
    "hooks": {"startContainer": [{"path": "/evil"}]},
    "linux": {
        "namespaces": [{"type": "pid"}, {"type": "uts"}],
        "sysctl": {"kernel.shm_rmid_forced": "1"},
        "resources": {"memory": {"limit": 1}},
        "cgroupsPath": "/pod/own",
        "devices": [{"path": "/dev/evil"}],
        "maskedPaths": ["/sys/firmware"],
    },
}


def test_nothing_of_the_image_is_left() -> None:
    before = json.dumps(_CONFIG)
    made = own_config(json.loads(before))

    assert made["root"] == {"path": ROOT, "readonly": True}
    assert made["process"]["args"] == ["/pause"]
    assert "evil" not in json.dumps(made)
    assert "/image" not in json.dumps(made)
    assert made["process"]["capabilities"] == {}
    assert made["process"]["noNewPrivileges"]
    assert json.dumps(_CONFIG) == before


def test_what_the_pod_is_stays() -> None:
    made = own_config(json.loads(json.dumps(_CONFIG)))

    assert made["hostname"] == "pod"
    assert made["process"]["user"] == {"uid": 65535, "gid": 65535}
    assert made["process"]["oomScoreAdj"] == -998
    kept = ("namespaces", "sysctl", "resources", "cgroupsPath")
    assert made["linux"] == {key: _CONFIG["linux"][key] for key in kept}  # type: ignore[index]


def test_a_pod_in_the_guests_own_uts_namespace_sets_no_name() -> None:
    """Such a pod has the guest's name, which it was given when it was made; crun would refuse."""
    config = json.loads(json.dumps(_CONFIG))
    config["linux"]["namespaces"] = [{"type": "pid"}]

    assert "hostname" not in own_config(config)


@pytest.mark.parametrize(
    ("annotations", "own"),
    [
        ({}, False),
        ({"io.katacontainers.pkg.oci.container_type": "pod_sandbox"}, True),
        ({"io.katacontainers.pkg.oci.container_type": "pod_container"}, False),
        ({"io.kubernetes.cri.container-type": "sandbox"}, False),
    ],
)
def test_which_container_it_is(annotations: dict[str, str], own: bool) -> None:
    assert is_own(annotations) is own


@pytest.fixture
def pause(tmp_path: Path) -> Path:
    """The program, built as for the guest."""
    made = tmp_path / "pause"
    subprocess.run(["gcc", *_BARE_FLAGS, "-o", str(made), str(_SOURCE)], check=True, timeout=60)
    assert made.stat().st_size < 4096
    return made


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines)


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_told(pause: Path, number: signal.Signals) -> None:
    process = subprocess.Popen([pause])
    _until(lambda: int(_status(process.pid)["SigBlk"], 16) != 0)
    process.send_signal(signal.SIGUSR1)  # means nothing to it
    process.send_signal(number)

    assert process.wait(30) == 0


def test_it_reaps_what_becomes_its_child(pause: Path) -> None:
    """Its child here is one that it got with its program, as a pod's PID 1 gets those of the dead."""
    forked = "import os, sys\nif os.fork(): os.execv(sys.argv[1], sys.argv[1:])\nelse: sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", forked, str(pause)], stdin=subprocess.PIPE)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    _until(lambda: os.readlink(f"/proc/{process.pid}/exe") == str(pause))
    (child,) = children.read_text().split()
    assert process.stdin is not None
    process.stdin.close()
    _until(lambda: not os.path.exists(f"/proc/{child}"))
    left = children.read_text()
    process.terminate()

    assert left == ""
    assert process.wait(30) == 0
