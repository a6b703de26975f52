"""The table of hypervisors is made from the plugins, and the one in the documentation is the same."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from ctl import hypervisors
from ctl.hypervisors import MEANING, markdown, run, table
from hypervisors.base import Capabilities
from hypervisors.registry import get_plugin

DOCUMENT = Path(__file__).parents[3] / "docs" / "hypervisors.md"
BUILT_IN = ("firecracker", "qemu")


def test_every_capability_has_a_meaning() -> None:
    assert set(MEANING) == {field.name for field in fields(Capabilities)}


def test_the_documented_table_is_the_code() -> None:
    rows = table({name: get_plugin(name) for name in BUILT_IN})
    assert markdown(rows) in DOCUMENT.read_text(), "run: kata-ctl hypervisors --markdown"


def test_the_command_lists_all_and_tells_what_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert set(BUILT_IN) <= set(head.split())
    assert len(rows) == len(MEANING)
    monkeypatch.setattr(hypervisors, "broken_plugins", lambda: {"acme": "ImportError: no acme"})
    assert run(as_json=True) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["broken"] == {"acme": "ImportError: no acme"}
    assert told["hypervisors"]["qemu"]["fs_sharing"] is True
    assert run() == 1
    assert "acme: installed, but cannot be loaded: ImportError: no acme" in capsys.readouterr().out
