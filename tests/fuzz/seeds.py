"""Where fuzzing begins: valid input of each format, and what earlier runs found (tests/fuzz/corpora).

Why: a fuzzer that has to guess ten bytes of a header, or the keys of a file, sees little else.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

from proto import agent_pb2, cri_pb2
from shim.config.annotations import PREFIX, known_names
from shim.state import journalfile, recoveryfile
from shim.state.identity import Identity
from tests.unit.shim.saved import saved
from ttrpc._frames import (
    FLAG_REMOTE_CLOSED,
    FLAG_REMOTE_OPEN,
    TYPE_DATA,
    TYPE_REQUEST,
    TYPE_RESPONSE,
    encode_frame,
)
from ttrpc._wire_pb2 import Request, Response, Status

__all__ = ["CORPUS", "seeds", "words"]

CORPUS = Path(__file__).parent / "corpora"
_DATA = Path(__file__).parents[1] / "data"


def seeds(name: str) -> list[bytes]:
    """All known inputs of a target."""
    made = _SEEDS[name]()
    folder = CORPUS / name
    return made + [path.read_bytes() for path in sorted(folder.iterdir())] if folder.is_dir() else made


def words(name: str, known: list[bytes]) -> list[str]:
    """What stands in the known inputs of a target, for the fuzzer to put together; the names of options for
    those that read some."""
    found = {word for data in known for word in re.findall(rb'"[\w./-]{1,40}"|[A-Za-z_][\w.-]{2,40}', data)}
    texts = {word.decode().replace('"', '\\"') for word in found}
    if name == "pod-annotations":
        texts |= {f'\\"{name.removeprefix(PREFIX)}\\": \\"' for name in known_names()}
    return sorted(texts)[:2000]


def _requests() -> list[bytes]:
    request = Request(service="containerd.task.v2.Task", method="State", payload=b"\n\x01c", timeout_nano=5)
    request.metadata.add(key="k", value="v")
    body = request.SerializeToString()
    opened = encode_frame(3, TYPE_REQUEST, FLAG_REMOTE_OPEN, body)
    ended = encode_frame(3, TYPE_DATA, FLAG_REMOTE_CLOSED, b"some")
    return [
        b"\x05\x10\x20\x40" + frames for frames in (encode_frame(1, TYPE_REQUEST, 0, body), opened + ended)
    ]


def _responses() -> list[bytes]:
    good = Response(status=Status(), payload=b"\x08\x01").SerializeToString()
    bad = Response(status=Status(code=5, message="not found")).SerializeToString()
    frames = encode_frame(1, TYPE_RESPONSE, 0, good) + encode_frame(3, TYPE_RESPONSE, 0, bad)
    return [b"\x05\x10\x20\x40" + frames]


def _answers() -> list[bytes]:
    """The first byte chooses the call; see `targets.agent`."""
    stats = agent_pb2.StatsContainerResponse()
    stats.cgroup_stats.memory_stats.stats["anon"] = 5
    stats.cgroup_stats.memory_stats.usage.limit = 1 << 63
    stats.cgroup_stats.blkio_stats.io_service_bytes_recursive.add(major=8, op="Read", value=5)
    stats.network_stats.add(name="eth0", rx_bytes=7)
    listed = agent_pb2.GetDiagnosticDataResponse(data='[{"pid": 5, "exec": "e"}, {"pid": 6}]')
    memory = agent_pb2.Metrics(metrics='kata_guest_meminfo{item="MemAvailable"} 12345')
    messages = {2: agent_pb2.WaitProcessResponse(status=137), 5: stats, 6: listed, 8: memory}
    answers = [bytes([call]) + message.SerializeToString() for call, message in messages.items()]
    return [*answers, *(bytes([call, 0xFF, code]) + b"refused" for call, code in ((0, 4), (1, 5), (10, 4)))]


def _qmp() -> list[bytes]:
    version = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}
    lines = [
        {"QMP": {"version": version, "capabilities": ["oob"]}},
        {"return": {}, "id": 1},
        {"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP", "data": {}},
        {"return": {"status": "running", "running": True}, "id": 2},
        {"error": {"class": "GenericError", "desc": "no"}, "id": 3},
        {"return": {}, "id": 4},
    ]
    return [b"".join(json.dumps(line).encode() + b"\r\n" for line in lines)]


def _firecracker() -> list[bytes]:
    head = (
        b"HTTP/1.1 %s \r\nServer: Firecracker API\r\nConnection: keep-alive\r\nContent-Length: %d\r\n\r\n%s"
    )
    body, fault = b'{"id": "x", "state": "Running"}', b'{"fault_message": "no"}'
    return [
        head % (b"200", len(body), body) + head % (b"400", len(fault), fault),
        b"HTTP/1.1 204 \r\n\r\n" + head % (b"200", 2, b"{}"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    ]


def _text(*texts: str) -> Callable[[], list[bytes]]:
    return lambda: [text.encode() for text in texts]


def _configurations() -> list[bytes]:
    whole = '[hypervisor.qemu]\npath = "/bin/true"\nkernel = "/bin/true"\nimage = "/bin/true"\n'
    whole += "[agent.kata]\n[runtime]\n"
    return [path.read_bytes() for path in sorted((_DATA / "broken").glob("*.toml"))] + [whole.encode()]


def _journal() -> list[bytes]:
    lines: list[dict[str, object]] = [
        journalfile.header_of(Identity("/run/c.sock", "n", "s"), "/b"),
        {"op": "record", "n": 1, "kind": "mount", "facts": {"path": "/run/x"}},
        {"op": "record", "n": 2, "kind": "process", "facts": {"name": "qemu"}},
        {"op": "update", "n": 2, "facts": {"pid": 5, "start": 7}},
        {"op": "drop", "n": 1},
    ]
    old = [journalfile.encode({"journal": 1, "sandbox": "s"}), *map(journalfile.encode, lines[1:])]
    return [b"".join(map(journalfile.encode, lines)), b"".join(old)]


def _specs() -> list[bytes]:
    """What containerd writes, as far as an input has room, and two small ones."""
    found = [path.read_bytes() for path in sorted((_DATA / "specs").glob("*.json"))]
    kept = [json.dumps(json.loads(data), separators=(",", ":")).encode() for data in found]
    pod = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "s"}
    whole: dict[str, object] = {
        "process": {"args": ["a"], "cwd": "/", "user": {"uid": 0}, "rlimits": [{"type": "RLIMIT_NOFILE"}]},
        "mounts": [{"destination": "/v", "source": "/v", "options": ["rbind", "ro"]}],
        "linux": {
            "devices": [{"path": "/dev/x", "type": "b", "major": 8}],
            "resources": {"cpu": {"quota": 1}},
        },
        "hooks": {"prestart": [{"path": "/h", "timeout": 1}]},
    }
    small: list[dict[str, object]] = [{"annotations": pod}, {"Annotations": pod}, whole]
    return [*(json.dumps(each).encode() for each in small), *(data for data in kept if len(data) <= 8192)]


def _answers_of_qemu() -> list[bytes]:
    """The first byte chooses the question; see `vmms.qmp_answers`."""
    cpus = [{"type": "cpu", "props": {"socket-id": n}, "vcpus-count": 1} for n in range(4)]
    cpus[0]["qom-path"] = "/machine/unattached/device[0]"
    info = {"device": "cpu-1", "source": 1, "status": 0}
    plugged = [{"event": "ACPI_DEVICE_OST", "data": {"info": info | {"device": f"cpu-{n}"}}} for n in (1, 2)]
    memory = {"base-memory": 256 << 20, "plugged-memory": 0}
    dimm = {"type": "dimm", "data": {"id": "dimm0", "size": 128 << 20, "slot": 0}}
    dimm_taken = {
        "event": "ACPI_DEVICE_OST",
        "data": {"info": {"device": "dimm1", "source": 1, "status": 0}},
    }
    gone = {"event": "DEVICE_DELETED", "data": {"device": "dimm0"}}
    grown = {"event": "MEMORY_DEVICE_SIZE_CHANGE", "data": {"id": "virtio-mem0", "size": 768 << 20}}
    nodes = [{"node-name": "node-d", "image": {"virtual-size": 512}}]
    lists = {
        0: [cpus, plugged[0], {}, plugged[1], {}],
        1: [cpus, plugged[0], {}, plugged[1], {}, cpus, "!DeviceNotFound", cpus],
        2: [[dimm], memory, {}, dimm_taken, {}],
        3: [[dimm], memory | {"plugged-memory": 768 << 20}, [dimm], memory, gone, {}, {}],
        4: [nodes, {}],
        5: [*plugged, gone, grown],
        8: [memory, grown, {}, 768 << 20],
    }
    return [bytes([what]) + json.dumps(values).encode() for what, values in lists.items()]


def _pods() -> list[bytes]:
    config = cri_pb2.PodSandboxConfig(hostname="h")
    config.dns_config.servers.append("10.0.0.1")
    config.linux.sysctls["net.a"] = "1"
    config.linux.resources.memory_limit_in_bytes = 5
    config.linux.security_context.namespace_options.pid = cri_pb2.POD
    config.annotations["io.katacontainers.a"] = "b"
    return [config.SerializeToString(), b"\x12\x05/c.to"]


def _health() -> list[bytes]:
    return [b'{"since": 1764000000.5, "why": "it does not answer"}', b'{"since": 1e999, "why": 5}']


def _recovery() -> list[bytes]:
    whole = {"version": recoveryfile.VERSION, **dataclasses.asdict(saved(pid=1))}
    return [json.dumps(whole).encode(), b'{"version": 2}']


_PHASE = '{"phase": "boot", "start": 1.5, "end": 2.0, "id": "s"}\n'
_HEAD = '{"trace": 1, "sandbox": "s", "namespace": "n", "containerd": "/run/c.sock"}\n'
_CDI = (
    '{"cdiVersion": "0.6.0", "kind": "a.b/c", "devices": [{"name": "d", "containerEdits":'
    ' {"deviceNodes": [{"path": "/dev/vfio/1"}], "env": ["A=b"]}}], "containerEdits": {"hooks": []}}'
)


def _network() -> list[bytes]:
    card = {
        "name": "eth0",
        "guest_mac": "02:00:00:00:00:07",
        "device": {"type": "host-tap", "tap_name": "tap0", "queue_num": 1},
        "network_info": {
            "interface": {"ip_addresses": ["10.0.0.2/24", "fd00::2/64"], "mtu": 1400},
            "routes": [{"dest": "0.0.0.0/0", "gateway": "10.0.0.1"}],
            "neighbors": [{"ip_address": "10.0.0.1", "hardware_addr": "02:00:00:00:00:01"}],
        },
    }
    return [json.dumps({"netns": "/run/netns/x", "devices": [card]}).encode()]


_VOLUME = json.dumps(
    {
        "volume-type": "directvol",
        "device": "/dev/null",
        "fstype": "ext4",
        "metadata": {"fsGroup": "2000", "fsGroupChangePolicy": "OnRootMismatch"},
        "options": ["ro"],
    }
)

_SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "ttrpc-server": _requests,
    "ttrpc-client": _responses,
    "agent": _answers,
    "qmp": _qmp,
    "firecracker": _firecracker,
    "loopback-frames": lambda: [
        b"\0\0\0\x05hello\0\0\0\x02me\0\0\0\0\0\0\0\0",
        b"\0\0\0\x05hello\xff\xff\xff\xff",
    ],
    "name-questions": lambda: [
        b"\0\0\0\x0b\0\0\0\1\0\0hello\0\0\0\x08\0\0\0\2\1\1me",
        b"\0\0\0\x07\0\0\0\1\2\0x",
    ],
    "stdio-frames": lambda: [b"\0\0\0\x05hello\0\0\0\x02me\0\0\0\0", b"\0\1\0\0" + bytes(70_000)],
    "console": _text(
        "[    0.1] Linux\r\n\x1b[1;31mred\x1b[0m\nKernel panic - not syncing: x\n", "\x1b]0;title\x07\u202e"
    ),
    "bootstrap-params": lambda: [
        b"\n\x32type.googleapis.com/runtimeoptions.v1.Options\x12\x07\x12\x05/c.to".replace(b"\x32", b"\x2d"),
        b"\n\x01c\x12\x01n\x18\xfc\xff\xff\xff\xff\xff\xff\xff\xff\x01\x4a\x08/run/s/x",
    ],
    "command-line": _text(
        "-namespace\ndefault\n-id\nc1\n-address\n/run/c.sock\nstart", "-id=c\n--namespace=n\ndelete", "-v"
    ),
    "vsock-answer": _text("OK 1073741824\nrest", "NO\n", "OK\n"),
    "qmp-answers": _answers_of_qemu,
    "clh-events": _text(
        '{\n  "source": "vm",\n  "event": "device-removed",\n  "properties": {\n    "id": "disk"\n  }\n}\n\n',
        '{\n  "source": "vm",\n  "event": "booted",\n  "properties": null\n}\n\n',
    ),
    "dragonball": _text(
        '{"event": "hello", "protocol": 1}\n{"id": 1, "ok": null}\n{"event": "exit", "reason": "reset"}',
        '{"event": "hello", "protocol": 1}\n{"id": 1, "error": {"kind": "Block", "causes": ["a", "b"]}}',
    ),
    "firecracker-metrics": _text('{"utc_timestamp_ms": 5, "vsock": {"rx_bytes_count": 7, "x": 1.5}}'),
    "config-json": _specs,
    "spec-values": lambda: (
        [bytes(range(at, at + 9)) for at in (0, 7, 40)] + [b"\x05\x01\xff\x30\x02\xff\x10"]
    ),
    "exec-process": _text(
        '{"args": ["a"], "cwd": "/", "env": ["A=b"], "terminal": true, "user": {"uid": 5, "umask": 18}}',
        '{"capabilities": {"bounding": ["CAP_KILL"]}, "consoleSize": {"height": 5, "width": 7}}',
    ),
    "update-resources": _text(
        '{"cpu": {"quota": 50000, "period": 100000, "cpus": "0-1"}, "memory": {"limit": 1048576}}',
        '{"unified": {"cpu.max": "max 100000", "memory.max": "5"}, "blockIO": {"weight": 10}}',
    ),
    "sandbox-options": _pods,
    "json-strict": _text('{"a": [1, 2.5, null, "\\ud83d\\ude00"], "a\\u0000": {"b": true}}'),
    "json-foreign": _text('{"a": [1, -2.5e3, null, "\\u0041"]}', "[18446744073709551615]"),
    "journal": _journal,
    "health-file": _health,
    "recovery-file": _recovery,
    "trace-file": _text(_HEAD + _PHASE, _PHASE),
    "cdi-file": _text(_CDI),
    "configuration": _configurations,
    "pod-annotations": _text(
        '{"hypervisor.default_memory": "256", "hypervisor.kernel_params": "a=b"}',
        '{"hypervisor.path": "/bin/true", "agent.enable_tracing": "x", "hypervisor.default_vcpus": "1.5"}',
    ),
    "network-file": _network,
    "volume-file": _text(_VOLUME),
    "management-request": _text(
        "GET /direct-volume/stats?path=%2Fv HTTP/1.1\r\nHost: x\r\n\r\n",
        'POST /direct-volume/resize HTTP/1.1\r\nContent-Length: 33\r\n\r\n{"VolumePath": "/v", "Size": 123}',
    ),
}
