"""A runtime-spec document reaches the agent's Spec whole, or is refused with the place that is wrong."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings

from devices.errors import CallerError
from shim.spec.documents import checked
from shim.spec.oci import Rest, process_from_json, resources_from_json, spec_from_json
from tests.unit.shim.spec.oci_documents import documents

SPEC = {
    "ociVersion": "1.0.2",
    "process": {
        "terminal": True,
        "consoleSize": {"height": 24, "width": 80},
        "user": {"uid": 1000, "gid": 100, "additionalGids": [5, 6]},
        "args": ["sh", "-c", "true"],
        "env": ["A=b"],
        "cwd": "/tmp",
        "capabilities": {"bounding": ["CAP_KILL"], "ambient": ["CAP_CHOWN"]},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 2048, "soft": 1024}],
        "noNewPrivileges": True,
        "oomScoreAdj": -5,
    },
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "h",
    "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]}],
    "annotations": {"k": "v"},
    "linux": {
        "uidMappings": [{"hostID": 1, "containerID": 2, "size": 3}],
        "sysctl": {"net.ipv4.ip_forward": "1"},
        "resources": {
            "memory": {"limit": 1 << 33, "swap": 5},
            "cpu": {"shares": 2, "quota": -1},
            "pids": {"limit": 10},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 9}],
        },
        "cgroupsPath": "/x",
        "namespaces": [{"type": "pid"}, {"type": "ipc", "path": "/proc/1/ns/ipc"}],
        "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 2, "fileMode": 438, "uid": 0}],
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [
                {
                    "names": ["read"],
                    "action": "SCMP_ACT_ALLOW",
                    "errnoRet": 1,
                    "args": [{"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_EQ"}],
                }
            ],
        },
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
    },
}


def test_every_field_arrives() -> None:
    spec, rest = spec_from_json(SPEC)

    assert rest == Rest()
    assert spec.Version == "1.0.2"
    assert spec.Process.User.UID == 1000
    assert list(spec.Process.User.AdditionalGids) == [5, 6]
    assert spec.Process.ConsoleSize.Width == 80
    assert (spec.Process.Rlimits[0].Hard, spec.Process.Rlimits[0].Soft) == (2048, 1024)
    assert spec.Process.OOMScoreAdj == -5
    assert list(spec.Process.Capabilities.Ambient) == ["CAP_CHOWN"]
    assert spec.Root.Readonly
    assert spec.Mounts[0].destination == "/proc"
    assert dict(spec.Linux.Sysctl) == {"net.ipv4.ip_forward": "1"}
    assert spec.Linux.Resources.Memory.Limit == 1 << 33
    assert spec.Linux.Resources.CPU.Quota == -1
    assert spec.Linux.Resources.HugepageLimits[0].Pagesize == "2MB"
    assert spec.Linux.UIDMappings[0].ContainerID == 2
    assert spec.Linux.Namespaces[1].Path == "/proc/1/ns/ipc"
    assert spec.Linux.Seccomp.Syscalls[0].Args[0].ValueTwo == 2
    assert spec.Linux.Seccomp.Syscalls[0].errnoret == 1
    assert spec.Linux.Devices[0].FileMode == 438
    assert list(spec.Linux.MaskedPaths) == ["/proc/kcore"]


def test_fields_without_effect_are_listed_with_the_reason() -> None:
    spec, rest = spec_from_json(
        {
            "process": {"apparmorProfile": "p", "selinuxLabel": ""},
            "linux": {"resources": {"network": {"classID": 1}}},
        }
    )

    assert spec.Process.ApparmorProfile == ""
    assert [line.partition(" (")[0] for line in rest.dropped] == [
        "process.apparmorProfile",
        "linux.resources.network",
    ]


def test_capabilities_that_are_none_are_listed() -> None:
    spec, rest = spec_from_json(
        {"process": {"capabilities": {"bounding": ["CAP_KILL", "CAP_FLY"], "ambient": []}}}
    )

    assert list(spec.Process.Capabilities.Bounding) == ["CAP_KILL"]
    assert rest.dropped == ["process.capabilities.bounding CAP_FLY (no such capability)"]


def test_fields_beyond_the_agents_protocol_keep_their_shape() -> None:
    document: dict[str, Any] = {
        "process": {"user": {"uid": 7, "umask": 0}},
        "linux": {"resources": {"unified": {"memory.high": "9"}, "cpu": {"idle": 1, "shares": 5}}},
    }
    spec, rest = spec_from_json(document)

    assert rest.dropped == []
    assert rest.beyond == {
        "process": {"user": {"umask": 0}},
        "linux": {"resources": {"unified": {"memory.high": "9"}, "cpu": {"idle": 1}}},
    }
    assert (spec.Process.User.UID, spec.Linux.Resources.CPU.Shares) == (7, 5)
    assert document["process"]["user"] == {"uid": 7, "umask": 0}, "the caller's document is not changed"


def test_a_propagation_that_is_none_is_named() -> None:
    with pytest.raises(CallerError, match=r"linux\.rootfsPropagation cannot be 'fancy'") as caught:
        spec_from_json({"linux": {"rootfsPropagation": "fancy"}})

    assert caught.value.code == "INVALID_ARGUMENT"


def test_process_and_resources_alone() -> None:
    process, rest = process_from_json({"args": ["ls"], "user": {"umask": 18}, "apparmorProfile": "p"})
    assert list(process.Args) == ["ls"]
    assert rest.beyond == {"process": {"user": {"umask": 18}}}
    assert rest.dropped[0].startswith("process.apparmorProfile (")

    resources, rest = resources_from_json({"pids": {"limit": 7}, "unified": {"a": "b"}})
    assert resources.Pids.Limit == 7
    assert rest.beyond == {"linux": {"resources": {"unified": {"a": "b"}}}}


@pytest.mark.parametrize(
    ("call", "document", "place"),
    [
        (spec_from_json, {"mounts": [{}, {"uidMappings": [{"size": 1}]}]}, "mounts[1].uidMappings"),
        (process_from_json, {"scheduler": {"policy": "SCHED_FIFO"}}, "process.scheduler"),
        (resources_from_json, {"rdma": {"mlx5_1": {}}}, "linux.resources.rdma"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_place(
    call: Callable[[dict[str, object]], object], document: dict[str, object], place: str
) -> None:
    with pytest.raises(CallerError) as caught:
        call(document)

    assert place in str(caught.value)
    assert caught.value.code == "UNIMPLEMENTED"


@given(documents())
@settings(max_examples=300)
def test_any_document_that_was_read_converts_or_is_refused_by_its_place(document: dict[str, Any]) -> None:
    """Whatever `shim.spec.documents` lets through fits the messages."""
    spec = checked(document, "config.json")
    try:
        message, _ = spec_from_json(spec)
    except CallerError as error:
        assert error.code in ("UNIMPLEMENTED", "INVALID_ARGUMENT")
        assert str(error).startswith("bundle: config.json: ")
    else:
        message.SerializeToString()


def test_the_reference_runtimes_own_example_converts() -> None:
    """`runc spec` writes the canonical document; only what has no field may be left."""
    try:
        subprocess.run(["runc", "--version"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("runc is not installed (make setup installs it)")
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["runc", "spec", "--bundle", folder], check=True)
        document = json.loads((Path(folder) / "config.json").read_text())
    spec, rest = spec_from_json(checked(document, "config.json"))

    assert rest == Rest()
    assert len(spec.Mounts) == len(document["mounts"])
