"""A sandbox is known by containerd's address, its namespace and its id: those that have the same id elsewhere
live and end without it."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from testing import leaks
from testing.api import Api, Task
from testing.containerd import KATA, Containerd
from testing.guest import PROJECT
from testing.images import busybox_image

from .conftest import BUSYBOX, CONTAINERD

pytestmark = pytest.mark.kata_only

OTHER = "other"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("twins") / "busybox.tar"
    busybox_image(path, BUSYBOX)
    return path


class Twin:
    """A container of that name, in one namespace of one containerd; it says who it is."""

    def __init__(self, containerd: Containerd, namespace: str, name: str, word: str) -> None:
        self.containerd, self.namespace, self.name, self.word = containerd, namespace, name, word
        script = f"echo {word} >/word; exec sleep 100000"
        self.ctr("run", "--detach", "--runtime", KATA, BUSYBOX, name, "sh", "-c", script)

    def ctr(self, *words: str, check: bool = True) -> str:
        return self.containerd.ctr("--namespace", self.namespace, *words, timeout=120, check=check).text

    def lives(self) -> bool:
        return (
            self.ctr("task", "exec", "--exec-id", os.urandom(4).hex(), self.name, "cat", "/word") == self.word
        )

    def remove(self) -> None:
        for words in (
            ("task", "kill", "-s", "SIGKILL", self.name),
            ("task", "rm", "-f", self.name),
            ("container", "rm", self.name),
        ):
            self.ctr(*words, check=False)

    @property
    def state_dir(self) -> Path:
        return self.containerd.state_dir(self.name, self.namespace)

    @property
    def shim(self) -> int:
        wanted = ("-namespace", self.namespace)
        (pid,) = (
            process.pid
            for process in self.containerd.processes()
            if self.name in process.argv and wanted in itertools.pairwise(process.argv)
        )
        return pid


def _kata_ctl(*words: str) -> subprocess.CompletedProcess[str]:
    command = [str(PROJECT / ".venv/bin/kata-ctl"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _listed(name: str) -> list[dict[str, Any]]:
    return [each for each in json.loads(_kata_ctl("list", "--json").stdout) if each["id"] == name]


def _left(*twins: Twin) -> list[str]:
    paths = [path for twin in twins for path in (twin.state_dir, Path("/run/kata", twin.name))]
    paths += [twin.containerd.share_dir(twin.name, twin.namespace) for twin in twins]
    for twin in twins:
        socket = leaks.shim_socket(twin.containerd.address, twin.namespace, twin.name)
        paths.append(Path(socket))
    return [str(path) for path in paths if os.path.lexists(path)]


@pytest.fixture(params=["namespace", "containerd"])
def twins(
    request: pytest.FixtureRequest, containerd: Containerd, archive: Path, no_leaks: Callable[[], None]
) -> Iterator[tuple[Twin, Twin]]:
    """Two running containers with one id."""
    name = containerd.new_id("twin")
    if request.param == "namespace":
        containerd.ctr("--namespace", OTHER, "image", "import", str(archive))
        first = Twin(containerd, "default", name, "first")
        second = Twin(containerd, OTHER, name, "second")
        yield first, second
        for twin in (first, second):
            twin.remove()
        assert _left(first, second) == []
        return
    with Containerd(version=CONTAINERD) as another:
        another.ids.append(name)
        another.ctr("image", "import", str(archive))
        first = Twin(containerd, "default", name, "first")
        second = Twin(another, "default", name, "second")
        yield first, second
        for twin in (first, second):
            twin.remove()
        assert _left(first, second) == []


def test_twins_live_and_end_without_each_other(twins: tuple[Twin, Twin]) -> None:
    """Both run; the end of one, by kill -9 of its shim, by containerd's hand, is nothing to the other."""
    first, second = twins
    assert first.lives()
    assert second.lives()
    assert Path("/run/kata", first.name).resolve() == first.state_dir
    listed = _listed(first.name)
    assert sorted((each["namespace"], each["containerd"], each["state"]) for each in listed) == sorted(
        (twin.namespace, twin.containerd.address, "running") for twin in twins
    )
    refused = _kata_ctl("trace", first.name)
    assert refused.returncode == 1
    assert f"{second.namespace}/{first.name}" in refused.stderr
    traced = _kata_ctl("trace", f"{second.namespace}/{first.name}", "--address", second.containerd.address)
    assert traced.returncode == 0, traced.stderr
    assert "vmm.boot" in traced.stdout

    os.kill(second.shim, signal.SIGKILL)
    second.remove()
    assert first.lives()
    assert Path("/run/kata", first.name).resolve() == first.state_dir

    again = Twin(second.containerd, second.namespace, second.name, "third")
    assert again.lives()
    first.remove()
    assert again.lives()
    again.remove()


def test_delete_by_hand_with_another_identity_is_refused(
    containerd: Containerd, no_leaks: Callable[[], None]
) -> None:
    """It kills nothing, and says whose the id is."""
    twin = Twin(containerd, "default", containerd.new_id("hand"), "alive")
    program = str(containerd.root / "bin/containerd-shim-kata-v2")
    bundle = containerd.state / "io.containerd.runtime.v2.task/default" / twin.name
    for namespace, address in (("other", "/any"), ("other", containerd.address), ("default", "/any")):
        for where in ("/", str(bundle)):
            done = subprocess.run(
                [program, "-namespace", namespace, "-address", address, "-id", twin.name, "delete"],
                cwd=where,
                env=containerd.environment,
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
            assert (done.returncode, done.stdout) == (1, "")
            assert f"default/{twin.name} of the containerd at {containerd.address}" in done.stderr
    assert twin.lives()
    twin.remove()


def test_containers_made_at_once_have_a_readable_journal(
    containerd: Containerd, api: Api, tmp_path: Path, no_leaks: Callable[[], None]
) -> None:
    """Two at a time in one pod, one with volumes beside one with OCI hooks: what they acquire, in threads and
    on the loop, is recorded, so after kill -9 of the shim all of it is undone."""
    key = "io.kubernetes.cri-o."
    volumes = [tmp_path / f"v{number}" for number in range(20)]
    for volume in volumes:
        volume.mkdir()

    def make(pod: str, **more: list[dict[str, Any]]) -> str:
        name = containerd.new_id("pair")
        containerd.ctr("container", "create", "--runtime", KATA, BUSYBOX, name)

        def change(spec: dict[str, Any]) -> None:
            kind = "container" if pod else "sandbox"
            spec["annotations"] = {key + "SandboxID": pod or name, key + "ContainerType": kind}
            spec["process"]["args"] = ["sleep", "100000"]
            spec["mounts"] += more.get("mounts", [])
            spec["hooks"] = {"createRuntime": more.get("hooks", [])}

        api.patch_spec(name, change)
        return name

    def create(name: str) -> Task:
        return api.task(name, stdin=False)

    mounts = [
        {"destination": f"/{volume.name}", "type": "bind", "source": str(volume), "options": ["rbind"]}
        for volume in volumes
    ]
    names = [make("")]
    create(names[0]).start()
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            pair = [make(names[0], mounts=mounts), make(names[0], hooks=[{"path": "/bin/true"}] * 20)]
            names += pair
            for task in pool.map(create, pair):
                task.start()
            (listed,) = _listed(names[0])
            assert listed["state"] == "running", "the journal can be read"
    shim = containerd.state / "io.containerd.runtime.v2.task/default" / names[0] / "shim.pid"
    os.kill(int(shim.read_text()), signal.SIGKILL)
    for name in reversed(names):
        containerd.remove(name)
    assert _listed(names[0]) == []
