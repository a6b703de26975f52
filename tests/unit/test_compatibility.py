"""docs/compatibility.md has a row for each RPC, event and OCI field, which names a test (test_docs.py)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor import Descriptor

from proto import events_pb2, oci_pb2, sandbox_v1_pb2, task_v2_pb2, task_v3_pb2

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "compatibility.md").read_text()
WORDS = {"same", "guest", "stricter", "clearer", "partly", "ignored", "refused", "more"}
NAMED = r"`(tests/[\w/]+\.py)(?:::(\w+))?`"
#: Messages whose fields have rows of their own; of the others the field that holds them has one.
EXPANDED = {
    "Spec", "Process", "User", "Root", "Hooks", "Linux", "LinuxResources", "LinuxMemory", "LinuxCPU"
}  # fmt: skip
#: Names of the runtime-spec that differ from the protobuf's in more than the case.
RENAMED = {"version": "ociversion"}


def rows(title: str) -> list[list[str]]:
    """The cells of the table under the heading `title`."""
    section = TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(title: str) -> list[str]:
    return [row[0] for row in rows(title)]


def oci_fields(message: Descriptor = oci_pb2.Spec.DESCRIPTOR, prefix: str = "") -> Iterator[str]:
    """The protobuf's fields as paths into config.json, in lower case."""
    for field in message.fields:
        name = prefix + RENAMED.get(field.name.lower(), field.name.lower())
        if field.message_type is not None and field.message_type.name in EXPANDED:
            yield from oci_fields(field.message_type, f"{name}.")
        else:
            yield name


def test_each_rpc_has_one_row() -> None:
    for module in (task_v2_pb2, task_v3_pb2):
        task = module.DESCRIPTOR.services_by_name["Task"]
        assert sorted(names("Task service")) == sorted(task.methods_by_name)
    sandbox = sandbox_v1_pb2.DESCRIPTOR.services_by_name["Sandbox"]
    assert sorted(names("Sandbox service")) == sorted(sandbox.methods_by_name)


def test_each_topic_has_one_row() -> None:
    def topic(message: str) -> str:
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", message.removeprefix("Task"))
        return f"/tasks/{words.lower()}"

    messages = set(events_pb2.DESCRIPTOR.message_types_by_name) - {"TaskIO"}  # a part of TaskCreate
    assert sorted(names("Events")) == sorted(map(topic, messages))


def test_each_field_of_the_spec_has_one_row() -> None:
    fields = [name.lower() for name in names("OCI runtime spec")]
    assert len(fields) == len(set(fields))
    assert set(oci_fields()) - set(fields) == set()


def test_each_row_names_a_test_and_says_what_differs_in_one_word() -> None:
    wrong = []
    for title in re.findall(r"(?m)^## (.+)$", TEXT):
        for name, tests, differs, why in rows(title):
            if not re.search(NAMED, tests):
                wrong.append(f"{name}: no test")
            if differs not in WORDS:
                wrong.append(f"{name}: {differs!r} is not one of {sorted(WORDS)}")
            if differs != "same" and not why:
                wrong.append(f"{name}: why does it differ?")
    assert wrong == []


def test_each_word_is_explained() -> None:
    assert {word for word in WORDS if f"**{word}**" not in TEXT} == set()
