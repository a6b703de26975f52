"""A pod whose guest stands still is stopped as kubelet stops it: container by container, then the pod."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from testing import leaks
from testing.containerd import PAUSE, Containerd
from testing.cri import NAMESPACE, Cri
from testing.images import busybox_image, pause_image

pytestmark = pytest.mark.e2e

BUSYBOX = "docker.io/local/busybox:1"
SLEEP = ("sh", "-c", "echo ready; trap 'exit 7' TERM; sleep 100000 & wait")
LIMIT = 4.0  # seconds: kill_timeout of these shims
SLACK = 5.0  # more, for containerd, and a machine that is busy
AGENT = {"kill_timeout": LIMIT, "reconnect_timeout_ms": 60000}


@pytest.fixture
def cri(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cri]:
    """The CRI plugin of a containerd of this version; nothing is left of its pods afterwards."""
    archives = tmp_path_factory.mktemp("images")
    busybox_image(archives / "busybox.tar", BUSYBOX)
    pause_image(archives / "pause.tar", PAUSE)
    with Containerd(
        debug=True, version=request.param, namespace=NAMESPACE, cri=True, overrides={"agent.kata": AGENT}
    ) as daemon:
        for archive in sorted(archives.iterdir()):
            daemon.ctr("image", "import", str(archive))
        connection = Cri(daemon)
        for image in (BUSYBOX, PAUSE):
            connection.wait_for_image(image)

        def take() -> dict[str, set[str]]:
            sockets = [leaks.shim_socket(daemon.address, daemon.namespace, name) for name in daemon.ids]
            return leaks.snapshot(tag=daemon.tag, root=str(daemon.root), sockets=sockets, ignore=[daemon.pid])

        before = take()
        yield connection
        for pod in list(connection.pods):
            pod.remove()
        left = leaks.settle(before, take, timeout=15)
        connection.close()
        assert left == {}, daemon.log_tail(60)


@pytest.mark.parametrize(
    ("cri", "handler"), [("1.6", "kata"), ("2", "kata-shim")], indirect=["cri"], ids=["pause", "sandbox API"]
)
def test_a_pod_that_stands_still(cri: Cri, handler: str) -> None:
    """SIGTERM that nobody takes is followed by SIGKILL; a guest that is known is not waited for again."""
    pod = cri.run_pod(handler=handler, namespaces={"network": "POD"})
    first, *others = [pod.run(*SLEEP, image=BUSYBOX) for _ in range(3)]
    for container in (first, *others):
        pod.wait_output(container, "ready")
    tasks = cri.containerd.ctr("task", "ls").text.splitlines()
    vmm = next(int(line.split()[1]) for line in tasks if line.split()[0] == first)
    os.kill(vmm, signal.SIGSTOP)

    began = time.monotonic()
    pod.stop_container(first, grace=1)
    assert time.monotonic() - began < 2 + LIMIT + SLACK
    assert pod.status(first).exit_code == 137

    began = time.monotonic()
    pod.stop()
    assert time.monotonic() - began < 2 * len(others) + LIMIT + SLACK
    assert [pod.status(container).exit_code for container in others] == [137, 137]
    pod.remove()
