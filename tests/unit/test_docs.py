"""What the pages name exists: links' targets, files, tests, make targets, commands of kata-ctl."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctl.main import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
CODE = re.compile(r"(?ms)^```.*?^```$|`[^`\n]+`")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code(page: Path) -> Iterator[str]:
    """The lines of code, in blocks and between backquotes."""
    for found in CODE.findall(page.read_text()):
        yield from found.strip("`").splitlines()


def anchors(page: Path) -> set[str]:
    """Its headings as links name them: lower case, blanks as dashes, no punctuation."""
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```$", "", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if link.startswith("https://"):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@each_page
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    missing = []
    names = re.findall(r"`(\w+/[\w/.-]+\.\w+(?:::\w+)*)(?:\[[^`]*\])?`", page.read_text())
    for name in names:
        file, _, test = name.partition("::")
        path = ROOT / file
        ours = (ROOT / file.split("/")[0]).is_dir() and not file.startswith("build/")
        if ours and not (path.exists() and (not test or f"def {test.split('::')[-1]}(" in path.read_text())):
            missing.append(name)
    assert missing == []
    assert len(names) > 100 or page != ROOT / "SPECIFICATION.md", "the pattern still finds them"


@each_page
def test_make_targets_that_are_named_exist(page: Path) -> None:
    targets = set(re.findall(r"(?m)^([a-z0-9.-]+):", (ROOT / "Makefile").read_text()))
    named: list[str] = []
    for line in code(page):
        if words := re.match(r"(?:[#$] )?make ([a-z][^#;]*)", re.sub(r"\w+=('.*?'|\S*)", "", line)):
            named += words[1].split()
    assert set(named) - targets == set()
    assert named or page != ROOT / "README.md", "the pattern still finds them"


@each_page
def test_commands_of_kata_ctl_that_are_named_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in code(page):
        for words in re.findall(r"(?:^|[ /])kata-ctl ((?:(?:config|direct-volume) )?[a-z]+)", line):
            with pytest.raises(SystemExit) as ended:
                main([*words.split(), "--help"])
            assert ended.value.code == 0, f"{line}: {capsys.readouterr().err}"
