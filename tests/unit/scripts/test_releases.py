"""The one table of releases: each host finds its column, and set-up reads the same."""

from __future__ import annotations

import subprocess

import pytest

from scripts.releases import RELEASES, TABLE, host_release, read, rows
from testing.guest import PROJECT


@pytest.mark.parametrize(
    ("os_release", "release"),
    [
        ('ID=debian\nVERSION_ID="12"\nVERSION_CODENAME=bookworm\n', "debian-12"),
        ('ID=debian\nVERSION_ID="13"\n', "debian-13"),
        ('PRETTY_NAME="Debian GNU/Linux forky/sid"\nID=debian\nVERSION_CODENAME=forky\n', "debian-14"),
        ('ID=ubuntu\nVERSION_ID="24.04"\nID_LIKE=debian\n', "ubuntu-24.04"),
    ],
)
def test_a_host_finds_its_column(os_release: str, release: str) -> None:
    """Testing and sid say no version: they are what comes next."""
    assert host_release(os_release) == release


def test_an_unknown_host_is_told_the_known() -> None:
    with pytest.raises(LookupError, match="fedora-41 is no release of debian-12, debian-13"):
        host_release("ID=fedora\nVERSION_ID=41\n")


def test_each_row_has_all_releases() -> None:
    """A value for each of them, and no row twice."""
    table = rows(TABLE.read_text())

    assert [row for row in table if len(row) != len(RELEASES) + 1] == []
    assert len({row[0] for row in table}) == len(table)


def test_virtiofsd_is_a_package_of_its_own_since_debian_13() -> None:
    assert [read(f"debian-{number}")["virtiofsd"] for number in (12, 13, 14)] == ["-", *["virtiofsd"] * 2]


@pytest.mark.parametrize("release", RELEASES)
def test_set_up_reads_the_same(release: str) -> None:
    """The shell's reader of the table, cut out of setup.sh, and Python's agree."""
    script = (PROJECT / "scripts/setup.sh").read_text()
    start = script.index("column() {")
    function = script[start : script.index("\n}\n", start) + 3]
    program = f"TABLE={TABLE}; RELEASE={release}\n{function}\ncolumn package; column guest; column nothing"
    said = subprocess.run(["bash", "-c", program], check=True, capture_output=True, text=True).stdout.split()
    values = read(release)
    packages = [row[0] for row in rows(TABLE.read_text())[3:]]

    assert said == [*(values[name] for name in packages if values[name] != "-"), values["guest"]]


def test_set_up_reads_pipes_to_their_end() -> None:
    """Under pipefail `grep -m1` or `head` fails what writes on: apt of sid did."""
    script = (PROJECT / "scripts/setup.sh").read_text()
    code = [line for line in script.splitlines() if not line.lstrip().startswith("#")]

    assert "pipefail" in script
    assert [line for line in code if "| head" in line or "grep -m" in line or "grep -q" in line] == []
