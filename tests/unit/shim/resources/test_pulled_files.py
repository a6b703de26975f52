"""In a VM on another machine the guest is told its image as Kata tells it; volumes are copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from devices.errors import BugError, CallerError
from proto import agent_pb2
from shim.protocols import RootfsMount
from shim.resources.pulled_files import PulledFiles
from shim.spec.guest_image import PulledImage, pulled_image
from shim.spec.guest_spec import Volume

CRI = "io.kubernetes.cri"


class Agent:
    """Keeps what is copied to it."""

    def __init__(self) -> None:
        self.copied: list[str] = []

    async def copy_file(self, request: agent_pb2.CopyFileRequest) -> None:
        self.copied.append(request.path)


async def test_what_the_guest_is_told(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    volume = Volume(0, str(tmp_path / "hosts"), "/etc/hosts", True, True, "c1-hosts")
    agent = Agent()
    files = PulledFiles(lambda: agent)
    image = PulledImage("docker.io/library/nginx:1", {f"{CRI}.image-name": "docker.io/library/nginx:1"})
    nothing = RootfsMount("overlay", "overlay", "", ["lowerdir=/not/looked/at"])
    (storage,) = await files.add("c1", [nothing], "/no/such/rootfs", [volume], image=image)
    assert storage.driver == "image_guest_pull"
    assert (storage.source, storage.fstype) == ("docker.io/library/nginx:1", "overlay")
    assert storage.mount_point == files.rootfs("c1") == "/run/kata-containers/c1/rootfs"
    key, _, told = storage.driver_options[0].partition("=")
    assert (key, json.loads(told)) == ("image_guest_pull", {"metadata": dict(image.annotations)})
    assert agent.copied == [volume.guest_path]
    assert (files.sandbox_storages(), files.plugged("c1"), await files.tear_down()) == ([], False, [])
    with pytest.raises(BugError):
        await files.add("c2", [], "", [])


@pytest.mark.parametrize(
    ("annotations", "name"),
    [
        ({f"{CRI}.image-name": "a:1"}, "a:1"),
        ({"io.kubernetes.cri-o.ImageName": "b:1"}, "b:1"),
        ({f"{CRI}.container-type": "container", f"{CRI}.sandbox-id": "p", f"{CRI}.image-name": "c:1"}, "c:1"),
        ({f"{CRI}.container-type": "sandbox", f"{CRI}.sandbox-id": "p"}, "pause"),
        ({"io.kubernetes.cri-o.ContainerType": "sandbox", "io.kubernetes.cri-o.SandboxID": "p"}, "pause"),
    ],
)
def test_the_image_that_the_annotations_name(annotations: dict[str, Any], name: str) -> None:
    assert pulled_image({"annotations": annotations}) == PulledImage(name, annotations)


@pytest.mark.parametrize("annotations", [None, {}, {f"{CRI}.image-name": ""}])
def test_a_container_without_an_image_is_refused(annotations: Any) -> None:
    with pytest.raises(CallerError, match="no annotation of the container names one") as caught:
        pulled_image({"annotations": annotations})
    assert f"--annotation {CRI}.image-name=IMAGE" in caught.value.hint
