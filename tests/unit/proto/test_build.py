"""`python -m proto.build` promises the same bytes each time, and that the checked-in files are those."""

from __future__ import annotations

from pathlib import Path

import pytest

from proto import build

pytest.importorskip("grpc_tools", reason="a development tool; CI has it")


def test_checked_in_files_are_what_a_fresh_build_gives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build.main(["--check"]) == 0, capsys.readouterr().err
    fresh = build.compile_to(tmp_path)
    assert fresh == build.checked_in()
    assert any(name == "agent_pb2.pyi" for name in fresh)


def test_every_import_between_modules_is_through_the_package() -> None:
    for name, content in build.checked_in().items():
        for line in content.decode().splitlines():
            if "_pb2 as" in line and line.startswith(("import", "from")):
                assert line.startswith(("from proto import ", "from google.protobuf import ")), (name, line)


def test_differences_name_what_is_missing_changed_and_left_over() -> None:
    fresh = {"a_pb2.py": b"1", "b_pb2.py": b"2"}
    present = {"b_pb2.py": b"3", "c_pb2.py": b"4"}
    assert build.differences(fresh, present) == [
        "a_pb2.py is missing",
        "b_pb2.py is not what its .proto file gives",
        "c_pb2.py belongs to no .proto file",
    ]
    assert build.differences(fresh, fresh) == []


def test_check_changes_nothing_and_fails_on_a_stale_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "proto"
    package.mkdir()
    (package / "x.proto").write_text('syntax = "proto3"; package x; message M { string a = 1; }\n')
    (package / "old_pb2.py").write_text("# stale\n")
    compiled = build.compile_to

    def compile_here(out: Path) -> dict[str, bytes]:
        return compiled(out, package)

    def present_here() -> dict[str, bytes]:
        return {"old_pb2.py": (package / "old_pb2.py").read_bytes()}

    monkeypatch.setattr(build, "PACKAGE", package)
    monkeypatch.setattr(build, "compile_to", compile_here)
    monkeypatch.setattr(build, "checked_in", present_here)
    assert build.main(["--check"]) == 1
    assert "x_pb2.py is missing" in capsys.readouterr().err
    assert not (package / "x_pb2.py").exists()
    assert build.main([]) == 0
    assert (package / "x_pb2.py").exists()
    assert not (package / "old_pb2.py").exists()


def test_a_file_that_does_not_compile_is_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "proto"
    package.mkdir()
    (package / "bad.proto").write_text('syntax = "proto3"; message {\n')
    compiled = build.compile_to

    def compile_here(out: Path) -> dict[str, bytes]:
        return compiled(out, package)

    monkeypatch.setattr(build, "compile_to", compile_here)
    assert build.main([]) == 2
    assert "bad.proto" in capfd.readouterr().err
