"""Our .proto files promise the wire of containerd and Kata: every number, label, type and name."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor, FileDescriptor

PROTO = Path(__file__).parents[3] / "proto"
WIRE: dict[str, Any] = json.loads((Path(__file__).parents[2] / "data" / "wire.json").read_text())

# Between our shim and our agent, and nobody else's: services of their own, whose absence can be told.
RECOVERY = {"Reattach": "kata_shim.ReattachRequest -> kata_shim.ReattachResponse"}
LOOPBACK = {
    "Listening": "kata_shim.ListeningRequest -> kata_shim.ListeningResponse",
    "Dial": "kata_shim.DialRequest -> kata_shim.DialResponse",
    "Resolve": "kata_shim.ResolveRequest -> kata_shim.ResolveResponse",
}
SERVICES: dict[str, dict[str, str]] = {
    **WIRE["kata"]["services"],
    **WIRE["containerd"]["services"],
    "kata_shim.Recovery": RECOVERY,
    "kata_shim.Loopback": LOOPBACK,
}
MESSAGES: dict[str, dict[str, str]] = {
    **WIRE["kata"]["messages"],
    **WIRE["containerd"]["messages"],
    **WIRE["cgroup_metrics"],
}
ENUMS: dict[str, dict[str, str]] = {**WIRE["kata"]["enums"], **WIRE["containerd"]["enums"]}
# Nested enums, which wire.json names but does not list (kata.md 4.3).
ENUMS["grpc.VolumeUsage.Unit"] = {"0": "UNKNOWN", "1": "BYTES", "2": "INODES"}
ENUMS["grpc.HealthCheckResponse.ServingStatus"] = {"0": "UNKNOWN", "1": "SERVING", "2": "NOT_SERVING"}
ENUMS["runtime.v1.NamespaceMode"] = {"0": "POD", "1": "CONTAINER", "2": "NODE", "3": "TARGET"}
# Modules with messages that wire.json does not have (containerd-shim.md 3.1 and 3.3).
BEYOND_WIRE = {"runc_options", "linux_runc", "cri", "transfer_streams", "recovery", "loopback"}
BEYOND: dict[str, dict[str, str]] = {
    "containerd.runc.v1.Options": {
        "3": "string shim_cgroup",
        "4": "uint32 io_uid",
        "5": "uint32 io_gid",
        "6": "string binary_name",
        "7": "string root",
        "9": "bool systemd_cgroup",
    },
    "containerd.runc.v1.ProcessDetails": {"1": "string exec_id"},
    "containerd.linux.runc.CreateOptions": {
        "9": "string shim_cgroup",
        "10": "uint32 io_uid",
        "11": "uint32 io_gid",
    },
    # containerd's core/transfer/streaming: a stream's bytes and windows.
    "containerd.types.transfer.Data": {"1": "bytes data"},
    "containerd.types.transfer.WindowUpdate": {"1": "int32 update"},
    "kata_shim.ReattachRequest": {
        "1": "string container_id",
        "2": "string exec_id",
        "3": "uint32 stdin_port",
        "4": "uint32 stdout_port",
        "5": "uint32 stderr_port",
    },
    "kata_shim.ReattachResponse": {"1": "bool alive"},
    "kata_shim.LoopbackPorts": {"1": "repeated uint32 v4", "2": "repeated uint32 v6"},
    "kata_shim.ListeningRequest": {"1": "kata_shim.LoopbackPorts known", "2": "uint32 wait_ms"},
    "kata_shim.ListeningResponse": {"1": "kata_shim.LoopbackPorts ports"},
    "kata_shim.DialRequest": {"1": "uint32 port", "2": "bool v6", "3": "uint32 stream"},
    "kata_shim.DialResponse": {},
    "kata_shim.ResolveRequest": {"1": "repeated string addresses", "2": "uint32 stream"},
    "kata_shim.ResolveResponse": {},
    # CRI's, and only what a sandbox reads of them.
    "runtime.v1.PodSandboxConfig": {
        "2": "string hostname",
        "4": "runtime.v1.DNSConfig dns_config",
        "7": "map<string,string> annotations",
        "8": "runtime.v1.LinuxPodSandboxConfig linux",
    },
    "runtime.v1.DNSConfig": {
        "1": "repeated string servers",
        "2": "repeated string searches",
        "3": "repeated string options",
    },
    "runtime.v1.LinuxPodSandboxConfig": {
        "1": "string cgroup_parent",
        "2": "runtime.v1.LinuxSandboxSecurityContext security_context",
        "3": "map<string,string> sysctls",
        "5": "runtime.v1.LinuxContainerResources resources",
    },
    "runtime.v1.LinuxSandboxSecurityContext": {"1": "runtime.v1.NamespaceOption namespace_options"},
    "runtime.v1.NamespaceOption": {"2": "runtime.v1.NamespaceMode pid"},
    "runtime.v1.LinuxContainerResources": {
        "1": "int64 cpu_period",
        "2": "int64 cpu_quota",
        "3": "int64 cpu_shares",
        "4": "int64 memory_limit_in_bytes",
    },
}

MODULES = sorted(path.stem for path in PROTO.glob("*.proto"))
FILES: dict[str, FileDescriptor] = {
    name: importlib.import_module(f"proto.{name}_pb2").DESCRIPTOR for name in MODULES
}
SCALARS = {
    FieldDescriptor.TYPE_DOUBLE: "double",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_UINT64: "uint64",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_BYTES: "bytes",
}


def type_name(field: FieldDescriptor) -> str:
    named = field.enum_type or field.message_type
    return named.full_name if named is not None else SCALARS[field.type]


def wire_text(field: FieldDescriptor) -> str:
    """The field as wire.json writes it: "repeated string options"."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields_by_number[1], field.message_type.fields_by_number[2]
        return f"map<{type_name(key)},{type_name(value)}> {field.name}"
    label = ""
    if field.is_repeated:
        label = "repeated "
    elif field.containing_oneof is not None and field.containing_oneof.name == f"_{field.name}":
        label = "optional "  # protoc gives an optional field of proto3 a oneof of its own
    return f"{label}{type_name(field)} {field.name}"


def ours_messages() -> dict[str, dict[str, str]]:
    return {
        message.full_name: {str(field.number): wire_text(field) for field in message.fields}
        for file in FILES.values()
        for message in file.message_types_by_name.values()
    }


def ours_enums() -> dict[str, dict[str, str]]:
    found: list[EnumDescriptor] = []
    for file in FILES.values():
        found += file.enum_types_by_name.values()
        for message in file.message_types_by_name.values():
            found += message.enum_types
    return {enum.full_name: {str(value.number): value.name for value in enum.values} for enum in found}


def ours_services() -> dict[str, dict[str, str]]:
    def side(name: str, streams: bool) -> str:
        return f"stream {name}" if streams else name

    return {
        service.full_name: {
            method.name: f"{side(method.input_type.full_name, method.client_streaming)} -> "
            f"{side(method.output_type.full_name, method.server_streaming)}"
            for method in service.methods
        }
        for file in FILES.values()
        for service in file.services_by_name.values()
    }


def test_the_same_services_exist_on_both_sides() -> None:
    assert sorted(ours_services()) == sorted(SERVICES)


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_service_has_exactly_the_methods_of_the_wire(name: str) -> None:
    assert ours_services()[name] == SERVICES[name]


def test_the_same_messages_exist_on_both_sides() -> None:
    assert sorted(ours_messages()) == sorted({**MESSAGES, **BEYOND})


@pytest.mark.parametrize("name", sorted({**MESSAGES, **BEYOND}))
def test_message_has_exactly_the_fields_of_the_wire(name: str) -> None:
    assert ours_messages()[name] == {**MESSAGES, **BEYOND}[name]


def test_enums_have_exactly_the_values_of_the_wire() -> None:
    assert ours_enums() == ENUMS


def test_only_these_modules_go_beyond_wire_json() -> None:
    beyond = {
        module
        for module, file in FILES.items()
        for message in file.message_types_by_name.values()
        if message.full_name not in MESSAGES
    }
    assert beyond == BEYOND_WIRE


def test_task_v3_is_task_v2_in_another_package() -> None:
    def renamed(text: str) -> str:
        return text.replace("containerd.task.v2", "containerd.task.v3")

    messages, services = ours_messages(), ours_services()
    v2 = {
        renamed(name): fields for name, fields in messages.items() if name.startswith("containerd.task.v2.")
    }
    assert v2 == {name: fields for name, fields in messages.items() if name.startswith("containerd.task.v3.")}
    methods = services["containerd.task.v2.Task"]
    assert {name: renamed(text) for name, text in methods.items()} == services["containerd.task.v3.Task"]


def test_errnoret_can_be_absent_in_a_oneof_with_its_own_name() -> None:
    field = FILES["oci"].message_types_by_name["LinuxSyscall"].fields_by_name["errnoret"]
    assert field.has_presence
    assert field.containing_oneof is not None
    assert field.containing_oneof.name == "ErrnoRet"


def test_everything_is_proto3_so_that_numbers_are_packed() -> None:
    percpu = FILES["agent"].message_types_by_name["CpuUsage"].fields_by_name["percpu_usage"]
    assert percpu.is_packed


def test_the_agent_imports_no_more_than_it_must() -> None:
    """The guest imports agent_pb2 under emulation, where each further file costs milliseconds."""
    assert {file.name for file in FILES["agent"].dependencies} == {
        "google/protobuf/empty.proto",
        "proto/csi.proto",
        "proto/oci.proto",
        "proto/types.proto",
    }
    assert not FILES["health"].dependencies
    assert not FILES["oci"].dependencies
