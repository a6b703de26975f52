"""A bundle tells its sandbox, and the socket's path is the one that containerd's own shims use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shim.state import bundle

CONTAINERD = "/run/containerd/containerd.sock"


def _bundle(directory: Path, annotations: dict[str, str] | None) -> str:
    spec = {"ociVersion": "1.0.2", "process": {"args": ["true"]}}
    if annotations is not None:
        spec["annotations"] = annotations
    (directory / "config.json").write_text(json.dumps(spec))
    return str(directory)


def test_socket_path_is_the_convention() -> None:
    """The value was printed by Debian's containerd-shim-runc-v2 1.6.20 for these three strings."""
    path = bundle.socket_path(CONTAINERD, "k8s.io", "pod-1", "/run/containerd/s")

    assert path == ("/run/containerd/s/a23234c4f856d7ccc0475011c69adc83a839986fe6144b033293650fb6ed5eaa")
    assert bundle.address_of(path) == "unix://" + path


def test_socket_paths_of_long_ids_differ() -> None:
    """Ids that share a hundred characters have sockets of their own, of legal length."""
    paths = {bundle.socket_path(CONTAINERD, "n", "x" * 100 + end) for end in ("a", "b")}

    assert len(paths) == 2
    assert max(map(len, paths)) <= 106


@pytest.mark.parametrize(
    ("annotations", "sandbox_id", "is_member"),
    [
        (None, "c1", False),
        ({}, "c1", False),
        (
            {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "c1"},
            "c1",
            False,
        ),
        (
            {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p1"},
            "p1",
            True,
        ),
        (
            {"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "p2"},
            "p2",
            True,
        ),
        ({"io.kubernetes.docker.type": "container", "io.kubernetes.sandbox.id": "p3"}, "p3", True),
        ({"io.containerd.runc.v2.group": "g"}, "c1", False),
    ],
)
def test_groups(tmp_path: Path, annotations: dict[str, str] | None, sandbox_id: str, is_member: bool) -> None:
    """The three producers of pods are understood; without their keys a container stands alone."""
    group = bundle.find_group(_bundle(tmp_path, annotations), "c1")

    assert (group.sandbox_id, group.is_member) == (sandbox_id, is_member)


def test_key_elsewhere_is_no_annotation(tmp_path: Path) -> None:
    """A key in the arguments of the process does not move a container into another's pod."""
    spec = {"process": {"args": ["io.kubernetes.cri.sandbox-id", "victim"]}}
    (tmp_path / "config.json").write_text(json.dumps(spec))

    assert bundle.find_group(str(tmp_path), "c1").sandbox_id == "c1"


def test_without_config(tmp_path: Path) -> None:
    """A bundle without config.json is refused with the file's name and what to try."""
    with pytest.raises(bundle.BundleError, match=r"start: .*config.json does not exist; try:"):
        bundle.find_group(str(tmp_path), "c1")


def test_sandbox_controller_has_no_config(tmp_path: Path) -> None:
    """containerd's sandbox controller starts shims in bundles without a spec."""
    directory = tmp_path / "io.containerd.sandbox.controller.v1.shim" / "ns" / "s1"
    directory.mkdir(parents=True)

    assert bundle.find_group(str(directory), "s1").sandbox_id == "s1"


def test_1_7_keeps_sandboxes_among_containers(tmp_path: Path) -> None:
    """At `start` containerd has written what it will: no spec means a sandbox. At `delete` it may be lost."""
    directory = tmp_path / "io.containerd.runtime.v2.task" / "ns" / "s1"
    directory.mkdir(parents=True)

    assert bundle.find_group(str(directory), "s1", bare=True).sandbox_id == "s1"
    with pytest.raises(bundle.BundleError):
        bundle.find_group(str(directory), "s1")
    with pytest.raises(bundle.BundleError):
        bundle.find_group(str(tmp_path), "s1", bare=True)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"io.kubernetes.cri.sandbox-id": ',
        b"[" * 100_000 + b"io.kubernetes.cri.sandbox-id",
    ],
)
def test_broken_config(tmp_path: Path, text: bytes) -> None:
    """What is not a JSON object is refused, not guessed."""
    (tmp_path / "config.json").write_bytes(text)

    with pytest.raises(bundle.BundleError, match=r"config\.json is not"):
        bundle.find_group(str(tmp_path), "c1")


@pytest.mark.parametrize("annotations", [[], "x", None, {"io.kubernetes.cri.sandbox-id": 7}])
def test_odd_annotations(tmp_path: Path, annotations: object) -> None:
    """Annotations of another type than a map of strings count as none."""
    spec = {"annotations": annotations, "x": "io.kubernetes.cri.sandbox-id"}
    (tmp_path / "config.json").write_text(json.dumps(spec))

    assert bundle.find_group(str(tmp_path), "c1").sandbox_id == "c1"


def test_write_atomically(tmp_path: Path) -> None:
    """The file is private, replaced as a whole, and leaves no temporary file."""
    bundle.write_atomically(str(tmp_path), "address", "unix:///a")
    bundle.write_atomically(str(tmp_path), "address", "unix:///b")

    assert [path.name for path in tmp_path.iterdir()] == ["address"]
    assert (tmp_path / "address").read_text() == "unix:///b"
    assert (tmp_path / "address").stat().st_mode & 0o777 == 0o600
