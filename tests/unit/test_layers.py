"""Nothing imports upwards: CONTRIBUTING.md's tables say who may import whom, and the code keeps to them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[2]
_ROW = re.compile(r"(?m)^\| `([\w/]+?)(?:/|\.py)` \|.*\| ([^|]+) \|$")
Table = dict[str, frozenset[str]]
"""Importer -> whom it may import, in the order of the table: "ctl", "shim.launch", ..."""


def tables() -> Table:
    """Both tables as one; a wing is named with its folder."""
    rows = _ROW.findall((ROOT / "CONTRIBUTING.md").read_text())
    found: Table = {}
    for place, allowed in rows:
        parent = f"{place.split('/')[0]}." if "/" in place else ""
        names = [] if allowed == "-" else allowed.split(", ")
        found[place.replace("/", ".")] = frozenset(f"{parent}{name}" for name in names)
    return found


TABLE = tables()
FOLDERS = [name for name in TABLE if "." not in name]
WINGS = [name for name in TABLE if name.startswith("shim.")]


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(*FOLDERS, cache_dir=None)


def place(module: str, depth: int) -> str:
    return ".".join(module.split(".")[:depth])


def upward(graph: grimp.ImportGraph, depth: int) -> list[str]:
    """A sentence for each import that the tables do not allow between places of `depth` names."""
    found = []
    for module in sorted(graph.modules):
        if place(module, depth) not in TABLE:
            continue  # `shim` itself, when wings are asked for
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            here, there = place(module, depth), place(imported, depth)
            siblings = depth == 1 or module.split(".")[0] == imported.split(".")[0]
            if siblings and here != there and there in TABLE and there not in TABLE[here]:
                lines = graph.get_import_details(importer=module, imported=imported)
                where = f"line {lines[0]['line_number']}" if lines else "an import"
                found.append(
                    f"{module} ({where}) imports {imported}, but CONTRIBUTING.md lets {here} import only"
                    f" {', '.join(sorted(TABLE[here])) or 'nothing'}: move the name down, or pass it in"
                )
    return found


def test_the_tables_are_found() -> None:
    assert set(FOLDERS) == {
        "ctl",
        "conformance",
        "shim",
        "hypervisors",
        "guest",
        "devices",
        "agent",
        "proto",
        "ttrpc",
        "testing",
    }
    assert len(WINGS) >= 12


def test_the_tables_name_only_rows_below() -> None:
    order = list(TABLE)

    assert [(a, b) for a in order for b in TABLE[a] if order.index(b) <= order.index(a)] == []


def test_every_arrow_of_the_tables_is_used(graph: grimp.ImportGraph) -> None:
    """What nobody needs is not allowed in advance."""
    used = {
        (place(module, depth), place(imported, depth))
        for depth in (1, 2)
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
    }

    assert [(a, b) for a in TABLE for b in TABLE[a] if (a, b) not in used] == []


@pytest.mark.parametrize("depth", [1, 2])
def test_nothing_imports_upwards(graph: grimp.ImportGraph, depth: int) -> None:
    assert upward(graph, depth) == []


@pytest.mark.parametrize(
    ("importer", "imported", "depth"),
    [
        ("shim.state.journal", "shim.runtime", 2),
        ("shim.tasks.container", "shim.sandbox.sandbox", 2),
        ("shim.protocols", "shim.stdio.stdio", 2),
        ("devices.child", "shim.state.journal", 1),
        ("agent.main", "devices.errors", 1),
    ],
)
def test_a_planted_import_is_told(importer: str, imported: str, depth: int) -> None:
    planted = grimp.build_graph(*FOLDERS, cache_dir=None)
    planted.add_import(importer=importer, imported=imported)

    (told,) = upward(planted, depth)
    assert told.startswith(f"{importer} (an import) imports {imported}, but CONTRIBUTING.md lets ")


def test_nothing_lies_beside_the_wings() -> None:
    places = {f"shim.{path.stem}" for path in (ROOT / "shim").iterdir() if path.name != "__pycache__"}

    assert places - {"shim.__init__"} == set(WINGS)


@pytest.mark.parametrize("wing", [wing for wing in WINGS if (ROOT / wing.replace(".", "/")).is_dir()])
def test_a_wing_says_what_enters_what_leaves_and_whom_it_may_import(wing: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / wing.replace(".", "/") / "__init__.py").read_text())) or ""
    fields = dict(re.findall(r"(?ms)^(Enters|Leaves|May import): (.+?)(?=\n[A-Z][\w ]+: |\Z)", text))
    names = {name for name in WINGS if re.search(rf"\b{name.removeprefix('shim.')}\b", fields["May import"])}

    assert set(fields) == {"Enters", "Leaves", "May import"}
    assert names == TABLE[wing]


def test_there_is_no_import_circle(graph: grimp.ImportGraph) -> None:
    """Not even inside of a folder, late imports included."""
    circles = []
    for module in sorted(graph.modules):
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            chain = graph.find_shortest_chain(importer=imported, imported=module)
            if chain and module < imported:
                circles.append(" -> ".join((module, *chain)))
    assert circles == []


def test_the_picture_names_wings_and_files_that_exist() -> None:
    (picture,) = re.findall(r"(?s)```mermaid\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text())
    boxes = dict(re.findall(r"<b>(\w+)(?:/|\.py)</b>(.*)", picture))

    assert {f"shim.{wing}" for wing in boxes} == set(WINGS) - {"shim.protocols"}
    named = [(wing, file) for wing, text in boxes.items() for file in re.findall(r"\w+\.py", text)]
    assert [pair for pair in named if not (ROOT / "shim" / pair[0] / pair[1]).exists()] == []
