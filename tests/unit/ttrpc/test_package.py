"""Promised: importing ttrpc is cheap, its names are all there, RPC names map to handler names, and the
checked-in envelopes are those of the .proto file.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import ttrpc

ROOT = Path(ttrpc.__file__).parent.parent


@pytest.mark.parametrize("name", ttrpc.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(ttrpc, name) is not None


def test_other_names_do_not() -> None:
    with pytest.raises(AttributeError):
        _ = ttrpc.nothing


def modules_after(code: str) -> set[str]:
    program = f"{code}\nimport sys; print(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", program], cwd=ROOT, text=True).split())


def test_importing_the_package_loads_neither_asyncio_nor_protobuf() -> None:
    assert not modules_after("import ttrpc") & {"asyncio", "google.protobuf.message", "typing", "dataclasses"}


def test_a_server_does_not_load_the_client() -> None:
    loaded = modules_after("from ttrpc import Server")

    assert "ttrpc._server" in loaded
    assert "ttrpc._client" not in loaded


@pytest.mark.parametrize(
    ("rpc", "handler"),
    [
        ("State", "state"),
        ("CloseIO", "close_io"),
        ("ResizePty", "resize_pty"),
        ("GetOOMEvent", "get_oom_event"),
        ("SetIPTables", "set_ip_tables"),
        ("OnlineCPUMem", "online_cpu_mem"),
        ("AddARPNeighbors", "add_arp_neighbors"),
        ("Get2Things", "get2_things"),
        ("already_snake", "already_snake"),
        ("Mixed_Case", "mixed_case"),
        ("IO", "io"),
    ],
)
def test_names_of_handlers(rpc: str, handler: str) -> None:
    assert ttrpc.snake_case(rpc) == handler


def test_the_envelopes_are_built_from_their_proto_file(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc")
    plugin = Path(sysconfig.get_path("scripts")) / "protoc-gen-mypy"
    arguments = ["protoc", f"-I{ROOT}", f"--python_out={tmp_path}", f"--plugin={plugin}"]

    assert protoc.main([*arguments, f"--mypy_out=quiet:{tmp_path}", "ttrpc/_wire.proto"]) == 0
    for name in ("_wire_pb2.py", "_wire_pb2.pyi"):
        assert (ROOT / "ttrpc" / name).read_text() == (tmp_path / "ttrpc" / name).read_text()
