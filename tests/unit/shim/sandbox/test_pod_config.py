"""What a sandbox without a pause container is made of, and what its containers get from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from devices.errors import CallerError
from proto import cri_pb2
from shim.api.pod_info import _links
from shim.sandbox.pod_config import (
    PodDefaults,
    complete,
    files_of,
    parse_options,
    sandbox_spec,
    write_files,
)


def _any(config: cri_pb2.PodSandboxConfig) -> AnyMessage:
    return AnyMessage(type_url="runtime.v1.PodSandboxConfig", value=config.SerializeToString())


@pytest.mark.parametrize("field", ["servers", "searches", "options"])
@pytest.mark.parametrize("value", ["10.0.0.1\nnameserver 6.6.6.6", "a\0b", "a\rb"])
def test_a_line_of_resolv_conf_stays_one(field: str, value: str) -> None:
    config = cri_pb2.PodSandboxConfig()
    getattr(config.dns_config, field).append(value)
    with pytest.raises(CallerError):
        parse_options(_any(config))


def test_too_many_name_servers() -> None:
    config = cri_pb2.PodSandboxConfig()
    config.dns_config.servers.extend(["10.0.0.1"] * 65)
    with pytest.raises(CallerError):
        parse_options(_any(config))


def test_a_hostname_is_one_word_and_sysctls_have_their_number() -> None:
    with pytest.raises(CallerError, match="hostname"):
        parse_options(_any(cri_pb2.PodSandboxConfig(hostname="a\nb")))
    for sysctls in ({str(number): "1" for number in range(1025)}, {"net.a": "1\0"}):
        config = cri_pb2.PodSandboxConfig()
        config.linux.sysctls.update(sysctls)
        with pytest.raises(CallerError, match="at most 1024"):
            parse_options(_any(config))


def test_the_pods_files(tmp_path: Path) -> None:
    config = cri_pb2.PodSandboxConfig(hostname="web")
    config.dns_config.servers.extend(["10.0.0.1", "10.0.0.2"])
    config.dns_config.searches.extend(["a.local", "local"])
    config.dns_config.options.append("ndots:5")
    old = os.umask(0o077)
    try:
        write_files(str(tmp_path / "pod"), config)
    finally:
        os.umask(old)
    files = files_of(str(tmp_path / "pod"))
    assert set(files) == {"/etc/hostname", "/etc/hosts", "/etc/resolv.conf"}
    assert Path(files["/etc/hostname"]).read_text() == "web\n"
    assert "localhost" in Path(files["/etc/hosts"]).read_text()
    assert Path(files["/etc/resolv.conf"]).read_text() == (
        "nameserver 10.0.0.1\nnameserver 10.0.0.2\nsearch a.local local\noptions ndots:5\n"
    )
    assert {os.stat(path).st_mode & 0o777 for path in files.values()} == {0o644}, (
        "for any user in a container"
    )


def test_without_name_servers_it_has_the_hosts(tmp_path: Path) -> None:
    write_files(str(tmp_path), cri_pb2.PodSandboxConfig())
    files = files_of(str(tmp_path))
    assert Path(files["/etc/resolv.conf"]).read_text() == Path("/etc/resolv.conf").read_text()
    assert Path(files["/etc/hostname"]).read_text() == os.uname().nodename + "\n"


def test_a_container_gets_what_nobody_made(tmp_path: Path) -> None:
    """Files that are there stay; 1.7 makes directories of those that are not."""
    there, directory = tmp_path / "hosts", tmp_path / "resolv.conf"
    there.write_text("mine")
    directory.mkdir()
    resolv = {"destination": "/etc/resolv.conf", "type": "bind", "source": str(directory), "options": ["rw"]}
    spec = {
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/etc/hosts", "type": "bind", "source": str(there), "options": ["rw"]},
            resolv,
        ]
    }
    files = {"/etc/hosts": "/ours/hosts", "/etc/resolv.conf": "/ours/resolv", "/etc/hostname": "/ours/name"}
    mounts = complete(spec, PodDefaults(files, {}))["mounts"]
    assert mounts[:2] == spec["mounts"][:2]
    assert [(m["destination"], m["source"], m["options"]) for m in mounts[2:]] == [
        ("/etc/resolv.conf", "/ours/resolv", ["rbind", "ro"]),
        ("/etc/hostname", "/ours/name", ["rbind", "ro"]),
    ]
    assert resolv["source"] == str(directory), "the spec itself is not changed"


def test_a_containers_own_sysctls_win() -> None:
    spec = {"linux": {"sysctl": {"a": "own"}}}
    completed = complete(spec, PodDefaults({}, {"a": "pod", "b": "pod"}))
    assert completed["linux"]["sysctl"] == {"a": "own", "b": "pod"}
    assert spec == {"linux": {"sysctl": {"a": "own"}}}


def test_a_sandboxs_spec_keeps_what_its_bundle_says() -> None:
    base = {
        "annotations": {"x": "1", "io.kubernetes.cri.container-type": "container"},
        "linux": {"namespaces": [{"type": "network", "path": "/old"}, {"type": "ipc"}]},
        "mounts": [{"destination": "/dev/shm", "type": "bind", "source": "/shm"}],
    }
    spec = sandbox_spec(
        base,
        cri_pb2.PodSandboxConfig(),
        sandbox_id="p",
        netns="/new",
        annotations={},
        files={"/etc/hosts": "/h"},
    )
    assert spec["annotations"]["x"] == "1"
    assert spec["annotations"]["io.kubernetes.cri.container-type"] == "sandbox"
    assert spec["linux"]["namespaces"] == [{"type": "ipc"}, {"type": "network", "path": "/new"}]
    assert [mount["destination"] for mount in spec["mounts"]] == ["/dev/shm", "/etc/hosts"]
    kept = sandbox_spec(base, cri_pb2.PodSandboxConfig(), sandbox_id="p", netns="", annotations={}, files={})
    assert kept["linux"] == base["linux"]


@pytest.mark.parametrize(
    ("parent", "path"),
    [
        ("/kubepods/burstable/pod1", "/kubepods/burstable/pod1/p"),
        ("/kubepods.slice/kubepods-pod1.slice", "kubepods-pod1.slice:cri-containerd:p"),
    ],
)
def test_a_sandboxs_cgroup_is_below_its_pods(parent: str, path: str) -> None:
    """Named as the CRI plugin names a pause container's; a bundle that names one keeps it."""
    config = cri_pb2.PodSandboxConfig(linux=cri_pb2.LinuxPodSandboxConfig(cgroup_parent=parent))
    rest: dict[str, Any] = {"sandbox_id": "p", "netns": "", "annotations": {}, "files": {}}
    assert sandbox_spec({}, config, **rest)["linux"]["cgroupsPath"] == path
    kept = sandbox_spec({"linux": {"cgroupsPath": "/own"}}, config, **rest)
    assert kept["linux"]["cgroupsPath"] == "/own"
    assert "cgroupsPath" not in sandbox_spec({}, cri_pb2.PodSandboxConfig(), **rest).get("linux", {})


def test_links_of_a_namespace(tmp_path: Path) -> None:
    dev = tmp_path / "dev"
    dev.write_text(
        "Inter-|   Receive                        |  Transmit\n"
        " face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop\n"
        "    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n"
        "  eth0: 100 2 3 4 0 0 0 0 200 5 6 7 0 0 0 0\n"
    )
    assert _links(str(dev)) == [
        {
            "name": "eth0", "rx_bytes": 100, "rx_packets": 2, "rx_errors": 3, "rx_dropped": 4,
            "tx_bytes": 200, "tx_packets": 5, "tx_errors": 6, "tx_dropped": 7,
        }
    ]  # fmt: skip
    assert _links(str(tmp_path / "gone")) == []
