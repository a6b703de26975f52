"""Sandboxes with the same id, of two namespaces or two containerds, live and end without each other."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proto import task_v2_pb2
from shim.state.journalfile import encode, header_of, load
from shim.state.procfs import start_time
from tests.unit.shim.shims import Bundle, Shims, shims_fixture
from ttrpc import RpcError

OTHERS: list[dict[str, Any]] = [{"namespace": "b"}, {"address": "/run/second/containerd.sock"}]


@pytest.fixture
def shims() -> Iterator[Shims]:
    yield from shims_fixture()


async def _create(bundle: Bundle) -> int:
    request = task_v2_pb2.CreateTaskRequest(id=bundle.id, bundle=str(bundle.path), stdin="helper")
    response = await bundle.call("create", request)
    assert isinstance(response, task_v2_pb2.CreateTaskResponse)
    return response.pid


async def _lives(bundle: Bundle) -> None:
    await bundle.call("state", task_v2_pb2.StateRequest(id=bundle.id))


def _deleted(shims: Shims, bundle: Bundle, told: str = "") -> None:
    result = shims.delete(bundle)
    assert (result.returncode, told in result.stderr.decode()) == (0, True), result.stderr
    assert bool(result.stderr) == bool(told)
    assert task_v2_pb2.DeleteResponse.FromString(result.stdout).exit_status == 137


@pytest.mark.parametrize("other", OTHERS)
async def test_both_run(shims: Shims, other: dict[str, Any]) -> None:
    """Each has its own state, share and VM; whoever ends first, by whatever way, the other one goes on."""
    first, second = shims.bundle("twin"), shims.bundle("twin", **other)
    for bundle in (first, second):
        assert shims.start(bundle).returncode == 0
    helpers = [await _create(bundle) for bundle in (first, second)]
    assert len({shims.state_dir(bundle) for bundle in (first, second)}) == 2
    assert all(shims.state_dir(bundle).is_dir() for bundle in (first, second))

    os.kill(first.pid, signal.SIGKILL)
    assert shims.wait_gone(first.pid)
    _deleted(shims, first)
    _deleted(shims, first)
    assert helpers[0] not in shims.processes()
    assert helpers[1] in shims.processes()
    await _lives(second)

    assert shims.start(first).returncode == 0
    await _create(first)
    await second.call("delete", task_v2_pb2.DeleteRequest(id="twin"))
    await second.call("shutdown", task_v2_pb2.ShutdownRequest(id="twin"))
    _deleted(shims, second)
    await _lives(first)
    _deleted(shims, first)
    assert shims.leftovers() == []


@pytest.mark.parametrize("other", OTHERS)
async def test_katas_link_is_the_first_ones(shims: Shims, other: dict[str, Any]) -> None:
    """Kata's tools look below /run/kata/ID: a link there is made when it is free, and taken away by its owner
    only; the second one has none, also when the first is gone."""
    first, second = shims.bundle("twin"), shims.bundle("twin", **other)
    for bundle in (first, second):
        shims.start(bundle)
        await bundle.serving()
    link = shims.link(first)
    assert link.resolve() == shims.state_dir(first)
    assert not Path(os.readlink(link)).is_absolute()

    _deleted(shims, second)
    assert link.resolve() == shims.state_dir(first)
    shims.start(second)
    await second.serving()
    _deleted(shims, first)
    assert not link.is_symlink()
    await second.serving()

    link.symlink_to("../kata-shim/" + "0" * 32)  # of one whose state somebody removed
    shims.start(first)
    await first.serving()
    assert link.resolve() == shims.state_dir(first)
    _deleted(shims, first)
    _deleted(shims, second)
    assert shims.leftovers() == []


@pytest.mark.parametrize("flags", [("other", ""), ("", "/any"), ("other", "/any")])
async def test_delete_by_hand_is_refused(shims: Shims, flags: tuple[str, str]) -> None:
    """With another namespace or address, wherever it is called: nothing is killed, and the owner is named."""
    bundle = shims.bundle("twin")
    shims.start(bundle)
    helper = await _create(bundle)
    namespace, address = flags[0] or bundle.namespace, flags[1] or bundle.address
    argv = [str(shims.program), "-namespace", namespace, "-address", address, "-id", "twin"]
    for where in ("/", str(bundle.path)):
        for more in ([], ["-bundle", str(bundle.path)]):
            result = subprocess.run(
                [*argv, *more, "delete"],
                cwd=where,
                env=shims.env,
                capture_output=True,
                timeout=10,
                check=False,
            )
            assert (result.returncode, result.stdout) == (1, b"")
            assert f"{bundle.namespace}/twin of the containerd at {bundle.address}".encode() in result.stderr
            assert b"refused" in result.stderr

    assert helper in shims.processes()
    await _lives(bundle)
    _deleted(shims, bundle)


async def test_delete_after_a_failed_start(shims: Shims) -> None:
    """containerd removes a bundle for which no shim ever ran: it may, and the other one is only told of."""
    first, second = shims.bundle("twin"), shims.bundle("twin", namespace="b")
    shims.start(first)
    await _create(first)
    (second.path / "config.json").write_text("nonsense")
    assert shims.start(second).returncode == 1

    _deleted(shims, second, told=f"left alone: {first.namespace}/twin of the containerd at {first.address}")

    await _lives(first)
    _deleted(shims, first)


async def test_another_ones_journal_is_left_alone(shims: Shims, sleeper: subprocess.Popen[bytes]) -> None:
    """Whatever brought it to our place: neither `delete` nor a start acts on it, and both say whose it is."""
    bundle, other = shims.bundle("twin"), shims.bundle("twin", namespace="b")
    directory = shims.state_dir(bundle)
    directory.mkdir(parents=True)
    text = encode(header_of(shims.identity(other))) + encode(_process(sleeper))
    (directory / "journal").write_bytes(text)

    result = shims.delete(bundle)
    assert result.returncode == 1
    assert f"is that of b/twin of the containerd at {other.address}".encode() in result.stderr
    assert shims.start(bundle).returncode == 0
    with pytest.raises(RpcError, match="is that of b/twin"):
        await _create(bundle)
    await bundle.call("shutdown", task_v2_pb2.ShutdownRequest(id="twin"))
    assert shims.wait_gone(bundle.pid)

    assert sleeper.poll() is None
    assert (directory / "journal").read_bytes() == text
    shutil.rmtree(directory)


async def test_a_member_is_its_own_pods(shims: Shims) -> None:
    """Two pods with one id, in two namespaces, and a member of each with one id: a member's delete finds its
    own pod, also by a bundle that is half made."""
    key = "io.kubernetes.cri."
    pods, members = [], []
    for namespace in ("a", "b"):
        pod = {key + "container-type": "sandbox", key + "sandbox-id": "p"}
        member = {key + "container-type": "container", key + "sandbox-id": "p"}
        pods.append(shims.bundle("p", pod, namespace=namespace))
        members.append(shims.bundle("c", member, namespace=namespace))
        shims.start(pods[-1])
        assert shims.start(members[-1]).stdout.decode() == pods[-1].read("address")
        await _create(pods[-1])
        (shims.share_dir(pods[-1]) / "rw/passthrough/c/rootfs").mkdir(parents=True)
    os.kill(pods[0].pid, signal.SIGKILL)
    assert shims.wait_gone(pods[0].pid)
    (members[0].path / "config.json").unlink()
    (members[0].path / "address").unlink()

    _deleted(shims, members[0])
    assert not (shims.share_dir(pods[0]) / "rw/passthrough/c").exists()
    _deleted(shims, members[1])
    assert (shims.share_dir(pods[1]) / "rw/passthrough/c").exists()
    await _lives(pods[1])
    for pod_bundle in pods:
        _deleted(shims, pod_bundle)
    assert shims.leftovers() == []


# --- the layout of older shims: /run/kata/ID, and a journal (version 1) that names no owner


def _old(shims: Shims, bundle: Bundle, socket: str, *records: dict[str, object]) -> Path:
    directory = shims.root / "run/kata" / bundle.id
    directory.mkdir(parents=True)
    (shims.root / "run/kata-containers/shared/sandboxes" / bundle.id / "rw").mkdir(parents=True)
    changes: list[dict[str, object]] = [
        {"journal": 1, "sandbox": bundle.id},
        {"op": "record", "n": 1, "kind": "socket", "facts": {"path": socket}},
        {"op": "drop", "n": 1},  # it was on its way out
        *records,
    ]
    (directory / "journal").write_bytes(b"".join(map(encode, changes)))
    return directory


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def _process(process: subprocess.Popen[bytes]) -> dict[str, object]:
    facts = {"name": "qemu", "pid": process.pid, "start": start_time(process.pid)}
    return {"op": "record", "n": 2, "kind": "process", "facts": facts}


def test_old_state_is_cleaned_by_its_owner(shims: Shims, sleeper: subprocess.Popen[bytes]) -> None:
    """The socket that it recorded has our digest: what an older shim left is undone."""
    bundle = shims.bundle("twin")
    _old(shims, bundle, f"/run/containerd/s/{shims.identity(bundle).digest}", _process(sleeper))

    _deleted(shims, bundle)

    assert sleeper.wait(5) == -9
    assert shims.leftovers() == []


def test_old_state_of_somebody_else_is_left_alone(shims: Shims, sleeper: subprocess.Popen[bytes]) -> None:
    """Another digest: neither `delete` nor a daemon that starts touches it, and its place stays its own."""
    bundle, owner = shims.bundle("twin"), shims.bundle("twin", namespace="b")
    digest = shims.identity(owner).digest
    directory = _old(shims, bundle, f"/run/containerd/s/{digest}", _process(sleeper))

    _deleted(shims, bundle, told=f"left alone: twin in {directory}")
    assert sleeper.poll() is None
    assert len(load(str(directory)).records) == 1

    assert shims.start(bundle).returncode == 0
    _deleted(shims, bundle)
    assert directory.is_dir()
    assert not directory.is_symlink()
    _deleted(shims, owner)
    assert sleeper.wait(5) == -9
    assert shims.leftovers() == []


async def test_a_start_cleans_old_state_of_its_own(shims: Shims, sleeper: subprocess.Popen[bytes]) -> None:
    """As for a killed shim of today that no `delete` came for."""
    bundle = shims.bundle("twin")
    directory = _old(shims, bundle, f"/run/containerd/s/{shims.identity(bundle).digest}", _process(sleeper))
    shims.start(bundle)
    await _create(bundle)

    assert sleeper.wait(5) == -9
    assert directory.is_symlink()
    assert "remains of an earlier shim" in shims.log(bundle)
    _deleted(shims, bundle)
    assert shims.leftovers() == []
