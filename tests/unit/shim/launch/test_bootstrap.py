"""`start` finds what it can use in what containerd writes to its stdin, and answers as that one can read."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any
from hypothesis import given
from hypothesis import strategies as st

from proto import bootstrap_pb2, linux_runc_pb2, runc_options_pb2, runtimeoptions_pb2
from shim.launch.bootstrap import Options, answer, decode, join_cgroup


def _any(type_url: str, value: bytes) -> bytes:
    return Any(type_url=type_url, value=value).SerializeToString()


def test_recorded_any() -> None:
    """The bytes that containerd 1.6 sent for `--runtime-config-path /etc/kata/x.toml`."""
    data = b"\x0a\x19runtimeoptions.v1.Options\x12\x12\x12\x10/etc/kata/x.toml"
    message = Any.FromString(data)

    assert runtimeoptions_pb2.Options.FromString(message.value).config_path == "/etc/kata/x.toml"
    options = decode(data)
    assert (options.config_path, options.bootstrap) == ("/etc/kata/x.toml", False)


@pytest.mark.parametrize("prefix", ["", "types.googleapis.com/"])
def test_shim_cgroup_of_runc(prefix: str) -> None:
    """containerd's WithShimCgroup arrives as runc's options, whatever the runtime."""
    new = runc_options_pb2.Options(shim_cgroup="/pods/new").SerializeToString()
    old = linux_runc_pb2.CreateOptions(shim_cgroup="/pods/old").SerializeToString()

    assert decode(_any(prefix + "containerd.runc.v1.Options", new)).shim_cgroup == "/pods/new"
    assert decode(_any(prefix + "containerd.linux.runc.CreateOptions", old)).shim_cgroup == "/pods/old"


def test_bootstrap_params() -> None:
    """2.3 sends BootstrapParams with the options among its extensions, and a place for sockets."""
    params = bootstrap_pb2.BootstrapParams(instance_id="t1", namespace="default", socket_dir="/run/c/s")
    extension = params.extensions.add()
    extension.value.type_url = "containerd.runc.v1.Options"
    extension.value.value = runc_options_pb2.Options(shim_cgroup="/x").SerializeToString()
    extension = params.extensions.add()
    extension.value.type_url = "runtimeoptions.v1.Options"
    extension.value.value = runtimeoptions_pb2.Options(config_path="/k.toml").SerializeToString()

    options = decode(params.SerializeToString())

    assert (options.shim_cgroup, options.socket_dir, options.config_path) == ("/x", "/run/c/s", "/k.toml")
    assert (options.bootstrap, options.debug) == (True, False)


def test_recorded_params() -> None:
    """The bytes of a containerd 2.3.4 for a container without options (recorded; the paths are ours)."""
    data = (
        b"\x0a\x02t1\x12\x07default\x22\x0d2.3.4+unknown\x2a\x1b/run/containerd/containerd."
        b"\x32\x15/run/containerd/c.soc\x3a\x19/usr/local/bin/containerd\x4a\x11/run/containerd/s"
    )

    options = decode(data)

    assert (options.bootstrap, options.socket_dir) == (True, "/run/containerd/s")


@pytest.mark.parametrize(
    ("level", "debug"),
    [
        ("LOG_LEVEL_TRACE", True),
        ("LOG_LEVEL_DEBUG", True),
        ("LOG_LEVEL_INFO", False),
        ("LOG_LEVEL_ERROR", False),
    ],
)
def test_log_level(level: str, debug: bool) -> None:
    """The level that 2.3 asks for holds like the flag -debug."""
    params = bootstrap_pb2.BootstrapParams(
        containerd_version="2.3", log_level=bootstrap_pb2.LogLevel.Value(level)
    )

    assert decode(params.SerializeToString()).debug is debug


@pytest.mark.parametrize("directory", ["relative", "/" + "x" * 42])
def test_unusable_socket_dir(directory: str) -> None:
    """A socket_dir that would make an illegal path is ignored."""
    params = bootstrap_pb2.BootstrapParams(containerd_version="2.3", socket_dir=directory)

    assert decode(params.SerializeToString()).socket_dir == ""


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    """Bytes of any kind are decoded or ignored, never an error."""
    options = decode(data)

    assert "\0" not in options.shim_cgroup + options.socket_dir + options.config_path


@pytest.mark.parametrize("length", [64, 113, 120])
def test_answer(length: int) -> None:
    """The bare address for whoever may be a 1.x; version 3 of the task service for a 2.3 and later."""
    address = "unix://" + "/" * (length - 7)
    options = Options()
    assert answer(address, options) == address.encode()

    options.bootstrap = True
    result = bootstrap_pb2.BootstrapResult.FromString(answer(address, options))

    assert (result.version, result.address, result.protocol) == (3, address, "ttrpc")


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
