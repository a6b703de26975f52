"""config.json, an exec and an update are read by one parser, into one spelling; errors have their place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devices.errors import CallerError
from shim.spec.documents import checked, load_spec, process_of, resources_of

DATA = Path(__file__).resolve().parents[3] / "data" / "specs"


@pytest.mark.parametrize("path", sorted(DATA.iterdir()), ids=lambda path: path.stem)
def test_what_containerd_writes_is_taken_as_it_is(path: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(path.read_bytes())
    document, strange = load_spec(str(tmp_path))

    assert document == json.loads(path.read_text())
    assert strange == []


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "No such file or directory"),
        (os.mkfifo, "it is no regular file"),
        (os.mkdir, "it is no regular file"),
        (lambda path: os.symlink("/dev/zero", path), "it is no regular file"),
        (lambda path: Path(path).write_text(" " * (4 << 20) + "{}"), "it has more than 4194304 bytes"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, make: Callable[[str], object], why: str) -> None:
    make(str(tmp_path / "config.json"))
    with pytest.raises(CallerError) as caught:
        load_spec(str(tmp_path))

    assert f"cannot read {tmp_path}/config.json: {why}; try: a bundle needs" in str(caught.value)
    assert caught.value.code == "INVALID_ARGUMENT"


def test_what_oci_does_not_have_is_told_with_its_place(tmp_path: Path) -> None:
    text = '{"process": {"fancy": {}}, "linux": {"resources": {"quota": {"a": "b"}}}}'
    (tmp_path / "config.json").write_text(text)

    assert load_spec(str(tmp_path)) == ({"process": {}, "linux": {"resources": {}}}, [
        "process.fancy",
        "linux.resources.quota",
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("read", "data", "why"),
    [
        (process_of, b"", "the exec's process cannot be read as an OCI document: Expecting value"),
        (process_of, b"[]", "the exec's process: process must be an object, not a list"),
        (process_of, b'{"user": {"uid": -1}}', "exec: the exec's process: process.user.uid must be an"),
        (process_of, b'{"env": ["a", 1]}', "process.env[1] must be a string, not 1"),
        (process_of, b'{"args": [], "Args": []}', "process.Args is there twice, the other one as args"),
        (process_of, b'{"args": ["a"], "args": ["b"]}', "args is there twice"),
        (resources_of, b"{", "the update's resources cannot be read as an OCI document"),
        (resources_of, b'{"memory": {"limit": 1e3}}', "linux.resources.memory.limit must be an integer from"),
        (resources_of, b'{"CPU": {"SHARES": -1}}', "linux.resources.CPU.SHARES must be an integer from 0"),
        (resources_of, b'{"unified": {"memory.max": 1}}', 'resources.unified["memory.max"] must be a string'),
    ],
)  # fmt: skip
def test_an_exec_and_an_update_are_read_likewise(read: Callable[[bytes], Any], data: bytes, why: str) -> None:
    with pytest.raises(CallerError) as caught:
        read(data)

    assert why in str(caught.value)
    assert caught.value.code == "INVALID_ARGUMENT"


def test_their_keys_are_taken_in_any_letters() -> None:
    assert process_of(b'{"Args": ["a"], "USER": {"UID": 7}, "x": 1}') == (
        {"args": ["a"], "user": {"uid": 7}},
        ["process.x"],
    )
    assert resources_of(b'{"Pids": {"LIMIT": 7}, "cpu": null}') == ({"pids": {"limit": 7}}, [])


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"hostname": "h" * 65}, "the sandbox: hostname has more than 64 bytes"),
        ({"annotations": {"a": "\0"}}, "the sandbox: annotations.a has a NUL in it"),
        ({"linux": {"namespaces": [{"type": "network", "path": "/x\0"}]}}, "namespaces[0].path has a NUL"),
        ({"linux": {"namespaces": [{"type": "x"}]}}, "linux.namespaces[0].type must be one of pid, network"),
        ({"annotations": {str(number): "" for number in range(16_385)}}, "annotations has 16385 entries"),
    ],
)
def test_a_spec_that_is_made_here_of_what_others_say_is_looked_at_too(spec: Any, why: str) -> None:
    with pytest.raises(CallerError) as caught:
        checked(spec, "the sandbox")

    assert why in str(caught.value)


def test_no_text_of_a_document_is_in_an_error() -> None:
    """An environment holds secrets."""
    for data in (b'{"env": "hunter2"}', b'{"env": {"A": "hunter2"}}', b'{"env": [["hunter2"]]}'):
        with pytest.raises(CallerError) as caught:
            process_of(data)
        assert "hunter2" not in str(caught.value)
