"""A bundle tells its sandbox, and the socket's path is the one that containerd's own shims use."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from devices.errors import CallerError
from shim.spec.documents import load_spec
from shim.spec.pod_role import container_type
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
        ({"io.kubernetes.cri.container-type": "sandbox"}, "c1", False),
        ({"io.kubernetes.cri.container-type": "container"}, "c1", False),
        ({"io.kubernetes.cri.sandbox-id": "p1"}, "c1", False),
        (
            {
                "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p1",
                "io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "p1",
            },
            "p1",
            True,
        ),
    ],
)  # fmt: skip
def test_groups(tmp_path: Path, annotations: dict[str, str] | None, sandbox_id: str, is_member: bool) -> None:
    """The three producers of pods are understood; without their keys a container stands alone."""
    group = bundle.find_group(_bundle(tmp_path, annotations), "c1")

    assert (group.sandbox_id, group.is_member) == (sandbox_id, is_member)


@pytest.mark.parametrize(
    "annotations",
    [
        {
            "io.kubernetes.cri-o.ContainerType": "sandbox",
            "io.kubernetes.cri-o.SandboxID": "c1",
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "somebody-elses",
        },
        {
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "p1",
            "io.kubernetes.docker.type": "container",
            "io.kubernetes.sandbox.id": "p2",
        },
        {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.docker.type": "container"},
        {"io.kubernetes.cri.container-type": "pod", "io.kubernetes.cri.sandbox-id": "c1"},
    ],
)
def test_what_is_no_type_or_contradicts_itself_is_refused(
    tmp_path: Path, annotations: dict[str, str]
) -> None:
    """Whoever may annotate a pod of CRI-O would get into another one by containerd's keys. The daemon says
    the same as `start`."""
    with pytest.raises(bundle.BundleError, match="try: "):
        bundle.find_group(_bundle(tmp_path, annotations), "c1")
    with pytest.raises(CallerError) as caught:
        container_type({"annotations": annotations})

    assert caught.value.code == "INVALID_ARGUMENT"


KINDS = [None, "sandbox", "podsandbox", "pod_sandbox", "container"]


@pytest.mark.parametrize("docker", KINDS)
@pytest.mark.parametrize("crio", KINDS)
@pytest.mark.parametrize("cri", KINDS)
def test_start_and_the_daemon_say_the_same(
    tmp_path: Path, cri: str | None, crio: str | None, docker: str | None
) -> None:
    """Whatever types the annotations name, in whatever combination."""
    types = {
        "io.kubernetes.cri.container-type": cri,
        "io.kubernetes.cri-o.ContainerType": crio,
        "io.kubernetes.docker.type": docker,
    }
    ids = ("io.kubernetes.cri.sandbox-id", "io.kubernetes.cri-o.SandboxID", "io.kubernetes.sandbox.id")
    annotations = {key: kind for key, kind in types.items() if kind} | dict.fromkeys(ids, "p")
    path = _bundle(tmp_path, annotations)
    try:
        group = bundle.find_group(path, "c1")
    except bundle.BundleError:
        with pytest.raises(CallerError):
            container_type({"annotations": annotations})
        return
    kind = container_type({"annotations": annotations})

    assert group.is_member == (kind == bundle.MEMBER)
    assert group.sandbox_id == ("c1" if kind == bundle.SINGLE else "p")


MEMBER = '{"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p1"}'
ESCAPED = MEMBER.replace("-type", "\\u002dtype").replace("cri.s", "cri\\u002Es")


@pytest.mark.parametrize(
    "text",
    [
        f'{{"Annotations": {MEMBER}}}',
        f'{{"ANNOTATIONS": {MEMBER}}}',
        f'{{"annotation\u017f": {MEMBER}}}',
        f'{{"annotations": {ESCAPED}}}',
        f'{{"annot\\u0061tions": {ESCAPED}}}',
        f'{{"process": {{"env": ["A=\\u0026"]}}, "annotations": {MEMBER}}}',
    ],
)
def test_however_the_keys_are_written_start_reads_them_as_the_daemon_does(tmp_path: Path, text: str) -> None:
    """In other letters, or with characters written as numbers: else `start` would give a pod's member a
    shim of its own."""
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    group = bundle.find_group(str(tmp_path), "c1")

    assert (group.sandbox_id, group.is_member) == ("p1", True)
    assert container_type(load_spec(str(tmp_path))[0]) == bundle.MEMBER


@pytest.mark.parametrize(
    "text",
    [
        f'{{"annotations": {{}}, "Annotations": {MEMBER}}}',
        f'{{"annotations": {MEMBER}, "annotations": {{}}}}',
        f'{{"annotations": {MEMBER[:-1]}, "io.kubernetes.cri.container-type": "sandbox"}}}}',
    ],
)
def test_annotations_that_are_there_twice_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(bundle.BundleError, match="twice"):
        bundle.find_group(str(tmp_path), "c1")
    with pytest.raises(CallerError, match="twice"):
        load_spec(str(tmp_path))


def test_what_go_escapes_costs_no_parser() -> None:
    """Its encoder writes <, > and & as numbers, in every second environment."""
    assert not bundle._hides_letters(b'{"a": "\\u0026\\u003c\\u003E\\u2028\\u001b\\u00e9"}')
    assert bundle._hides_letters(b'"\\u0026\\u002d"')


@pytest.mark.timeout(30)
def test_a_config_that_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(bundle.BundleError, match="is no regular file"):
        bundle.find_group(str(tmp_path), "c1")


def test_key_elsewhere_is_no_annotation(tmp_path: Path) -> None:
    """A key in the arguments of the process does not move a container into another's pod."""
    spec = {"process": {"args": ["io.kubernetes.cri.container-type", "container"]}}
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
        b'{"io.kubernetes.cri.container-type": ',
        b"[" * 100_000 + b"io.kubernetes.cri.container-type",
    ],
)
def test_broken_config(tmp_path: Path, text: bytes) -> None:
    """What is not a JSON object is refused, not guessed."""
    (tmp_path / "config.json").write_bytes(text)

    with pytest.raises(bundle.BundleError, match=r"config\.json is not"):
        bundle.find_group(str(tmp_path), "c1")


@pytest.mark.parametrize("annotations", [[], "x", None, {"io.kubernetes.cri.container-type": 7}])
def test_odd_annotations(tmp_path: Path, annotations: object) -> None:
    """Annotations of another type than a map of strings count as none."""
    spec = {"annotations": annotations, "x": "io.kubernetes.cri.container-type"}
    (tmp_path / "config.json").write_text(json.dumps(spec))

    assert bundle.find_group(str(tmp_path), "c1").sandbox_id == "c1"


def test_write_atomically(tmp_path: Path) -> None:
    """The file is private, replaced as a whole, and leaves no temporary file."""
    bundle.write_atomically(str(tmp_path), "address", "unix:///a")
    bundle.write_atomically(str(tmp_path), "address", "unix:///b")

    assert [path.name for path in tmp_path.iterdir()] == ["address"]
    assert (tmp_path / "address").read_text() == "unix:///b"
    assert (tmp_path / "address").stat().st_mode & 0o777 == 0o600
