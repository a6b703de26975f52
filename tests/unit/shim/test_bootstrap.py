"""`start` finds shim_cgroup and socket_dir in what containerd writes to its stdin, and nothing else."""

from __future__ import annotations

import pytest
from google.protobuf.any_pb2 import Any
from hypothesis import given
from hypothesis import strategies as st

from proto import bootstrap_pb2, linux_runc_pb2, runc_options_pb2, runtimeoptions_pb2
from shim.bootstrap import cgroup_directory, decode


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


def test_cgroup_directory() -> None:
    """A path below the root, never above it."""
    assert cgroup_directory("/sys/fs/cgroup", "/a/b") == "/sys/fs/cgroup/a/b"
    for path in ("..", "/a/../../b", "/", ""):
        with pytest.raises(OSError, match="not a path below"):
            cgroup_directory("/sys/fs/cgroup", path)
