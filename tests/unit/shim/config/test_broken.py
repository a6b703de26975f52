"""A stranger can act on every error: each broken file of tests/data/broken gives the text beside it exactly.

`@DIR@` stands for the test's directory, `@FILE@` for the file, `@KNOWN@` for the hypervisors there are.
After a change KATA_GOLDEN=write writes the texts anew; read the difference.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ctl.main import main
from hypervisors.registry import load_plugins

CASES = sorted((Path(__file__).parents[3] / "data" / "broken").glob("*.toml"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_the_error(case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("qemu", "vmlinux", "rootfs.img", "plain"):
        (tmp_path / name).touch(mode=0o644 if name == "plain" else 0o755)
    file = tmp_path / "configuration.toml"
    file.write_text(case.read_text().replace("@DIR@", str(tmp_path)))
    code = main(["config", "check", str(file)])
    output = capsys.readouterr()
    assert (code, output.out) == (1, "")
    text = output.err.replace(str(file), "@FILE@").replace(str(tmp_path), "@DIR@")
    text = text.replace("known: " + ", ".join(sorted(load_plugins())), "known: @KNOWN@")
    golden = case.with_suffix(".txt")
    if os.environ.get("KATA_GOLDEN") == "write":
        golden.write_text(text)
    assert text == golden.read_text()


def test_there_are_more_than_ten_and_each_says_where() -> None:
    texts = [case.with_suffix(".txt").read_text() for case in CASES]
    assert len(texts) >= 10
    assert all("@FILE@" in text for text in texts)
    assert not any("hunter2" in text for text in texts)
