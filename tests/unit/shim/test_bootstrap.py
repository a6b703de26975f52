"""`start` finds shim_cgroup and socket_dir in what containerd writes to its stdin, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any
from hypothesis import given
from hypothesis import strategies as st

from proto import bootstrap_pb2, linux_runc_pb2, runc_options_pb2, runtimeoptions_pb2
from shim.bootstrap import decode, join_cgroup


def _any(type_url: str, value: bytes) -> bytes:
    return Any(type_url=type_url, value=value).SerializeToString()


def test_recorded_any() -> None:
    """The bytes that containerd 1.6 sent for `--runtime-config-path /etc/kata/x.toml`."""
    data = b"\x0a\x19runtimeoptions.v1.Options\x12\x12\x12\x10/etc/kata/x.toml"
    message = Any.FromString(data)

    assert runtimeoptions_pb2.Options.FromString(message.value).config_path == "/etc/kata/x.toml"
    assert decode(data) == ("", "")


@pytest.mark.parametrize("prefix", ["", "types.googleapis.com/"])
def test_shim_cgroup_of_runc(prefix: str) -> None:
    """containerd's WithShimCgroup arrives as runc's options, whatever the runtime."""
    new = runc_options_pb2.Options(shim_cgroup="/pods/new").SerializeToString()
    old = linux_runc_pb2.CreateOptions(shim_cgroup="/pods/old").SerializeToString()

    assert decode(_any(prefix + "containerd.runc.v1.Options", new))[0] == "/pods/new"
    assert decode(_any(prefix + "containerd.linux.runc.CreateOptions", old))[0] == "/pods/old"


def test_bootstrap_params() -> None:
    """2.3 sends BootstrapParams with the options among its extensions, and a place for sockets."""
    params = bootstrap_pb2.BootstrapParams(instance_id="t1", namespace="default", socket_dir="/run/c/s")
    extension = params.extensions.add()
    extension.value.type_url = "containerd.runc.v1.Options"
    extension.value.value = runc_options_pb2.Options(shim_cgroup="/x").SerializeToString()

    assert decode(params.SerializeToString()) == ("/x", "/run/c/s")


@pytest.mark.parametrize("directory", ["relative", "/" + "x" * 42])
def test_unusable_socket_dir(directory: str) -> None:
    """A socket_dir that would make an illegal path is ignored."""
    params = bootstrap_pb2.BootstrapParams(containerd_version="2.3", socket_dir=directory)

    assert decode(params.SerializeToString()) == ("", "")


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    """Bytes of any kind are decoded or ignored, never an error."""
    cgroup, socket_dir = decode(data)

    assert "\0" not in cgroup + socket_dir


def test_join_unified(tmp_path: Path) -> None:
    """With cgroup v2 there is one place."""
    (tmp_path / "cgroup.controllers").write_text("")
    (tmp_path / "pods" / "x").mkdir(parents=True)

    join_cgroup(str(tmp_path), "/pods/x", 42)

    assert (tmp_path / "pods" / "x" / "cgroup.procs").read_text() == "42"


def test_join_v1(tmp_path: Path) -> None:
    """With cgroup v1 there is one place in each hierarchy that has the cgroup."""
    for hierarchy in ("cpu/x", "memory/x", "pids"):
        (tmp_path / hierarchy).mkdir(parents=True)

    join_cgroup(str(tmp_path), "/x", 42)

    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("cgroup.procs"))] == [
        "cpu/x/cgroup.procs",
        "memory/x/cgroup.procs",
    ]


@pytest.mark.parametrize("path", ["..", "/a/../../b", "/", "", "/missing"])
def test_join_refuses(tmp_path: Path, path: str) -> None:
    """A cgroup above the root, or none at all, is an error."""
    with pytest.raises(OSError, match="shim_cgroup"):
        join_cgroup(str(tmp_path), path, 42)
