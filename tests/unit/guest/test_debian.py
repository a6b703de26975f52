"""Versions and dependencies are read from apt's words; an unknown package, or a missing tool, is named."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from devices.errors import HostError
from guest import debian
from guest.contents import PACKAGES, is_wanted
from guest.debian import Apt
from guest.tools import run_tool

POLICY = """\
libc6:
  Installed: 2.36-9
  Candidate: 2.36-10
  Version table:
     2.36-10 500
crun:
  Installed: (none)
  Candidate: 1:1.8.1-1+deb12u1
  Version table:
gone:
  Installed: (none)
  Candidate: (none)
  Version table:
"""


# What `apt-cache depends --important` says, of Debian 12 and of sid (cut to what is read here).
DEPENDS = """\
python3-minimal
  PreDepends: python3.14-minimal
python3.14-minimal
  PreDepends: libc6
  Depends: libpython3.14-minimal
  Depends: libexpat1
  Depends: zlib1g
libpython3.14-minimal
  Depends: libssl3t64
e2fsprogs
  PreDepends: libext2fs2t64
  PreDepends: libss2
  Depends: logsave
crun
 |Depends: libjson-c5
  Depends: libjson-other
  Depends: libsystemd0
  Depends: <libvirtual>
    libnever
linux-image-cloud-amd64
  Depends: linux-base-cloud-amd64
  Depends: linux-image-7.2.13+deb14-cloud-amd64
linux-image-7.2.13+deb14-cloud-amd64
  PreDepends: linux-base
  Depends: kmod
 |Depends: initramfs-tools
  Depends: <linux-initramfs-tool>
    dracut
  Depends: linux-base-7.2.13+deb14-cloud-amd64
  Depends: linux-binary-7.2.13+deb14-cloud-amd64
  Depends: linux-modules-7.2.13+deb14-cloud-amd64
"""


@pytest.fixture
def apt(monkeypatch: pytest.MonkeyPatch) -> Apt:
    """An apt that says POLICY and, of the packages that it is asked about, DEPENDS."""

    def tool(argv: Sequence[str], **_: object) -> str:
        if "policy" in argv:
            return POLICY
        blocks, names = DEPENDS.splitlines(keepends=True), argv[argv.index("--important") + 1 :]
        said, on = "", False
        for line in blocks:
            on = line.strip() in names if not line.startswith(" ") else on
            said += line if on else ""
        return said + "".join(f"{name}\n" for name in names if f"\n{name}\n" not in f"\n{said}")

    monkeypatch.setattr(debian, "run_tool", tool)
    return Apt()


def test_candidates(apt: Apt) -> None:
    """The candidate counts, not what this machine has installed."""
    assert apt.candidates(["crun", "libc6"]) == {"crun": "1:1.8.1-1+deb12u1", "libc6": "2.36-10"}


def test_unknown_packages_are_named(apt: Apt) -> None:
    """Known by name only, or not at all: both are unknown."""
    with pytest.raises(HostError, match=r"packages gone, other; try: .*apt-get update"):
        apt.candidates(["libc6", "gone", "other"])


def test_what_a_package_depends_on(apt: Apt) -> None:
    """Of alternatives the first; virtual packages and who provides them are left out."""
    assert apt.depends(["crun"]) == {"crun": ["libjson-c5", "libsystemd0"]}


def test_the_closure_follows_what_is_wanted(apt: Apt) -> None:
    """Python by its minor version, libraries by whatever name; not what the image leaves out."""
    assert apt.closure(["python3-minimal", "crun", "e2fsprogs"], is_wanted) == [
        "crun",
        "e2fsprogs",
        "libc6",
        "libexpat1",
        "libext2fs2t64",
        "libjson-c5",
        "libpython3.14-minimal",
        "python3-minimal",
        "python3.14-minimal",
        "zlib1g",
    ]
    assert not {name for name in PACKAGES if "3.1" in name}, "no minor version is written down"


def test_debian_14s_kernels_are_split(apt: Apt) -> None:
    """The image package is empty there; what it depends on by its own release has the files."""
    release, packages = debian.kernel_packages(apt, "linux-image-cloud-amd64")

    assert release == "7.2.13+deb14-cloud-amd64"
    assert packages == [f"linux-{part}-{release}" for part in ("image", "base", "binary", "modules")]


def test_another_release_has_lists_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are fetched once a day; without a network the old ones serve, and none at all is an error."""
    calls: list[list[str]] = []
    online = True

    def tool(argv: list[str], **_: object) -> str:
        calls.append(argv)
        if argv[-1] == "update" and not online:
            raise HostError("no network")
        return "http://mirror.example/debian/ http://mirror.example/debian-security/"

    monkeypatch.setattr(debian, "run_tool", tool)
    apt = Apt("trixie", str(tmp_path))
    apt.refresh()
    apt.refresh()
    assert [argv[-1] for argv in calls].count("update") == 1
    sources = (tmp_path / "trixie/sources.list").read_text()
    assert "http://mirror.example/debian/ trixie main" in sources
    assert "http://mirror.example/debian-security/ trixie-security main" in sources
    assert apt.state(), "what the answers depend on is known"

    day_ago = time.time() - 2 * 86400
    os.utime(tmp_path / "trixie/ready", (day_ago, day_ago))
    online = False
    apt.refresh()
    with pytest.raises(HostError, match="no network"):
        Apt("sid", str(tmp_path)).refresh()


@pytest.mark.parametrize(
    ("text", "suite"),
    [
        ('ID=debian\nVERSION_ID="12"\nVERSION_CODENAME=bookworm\n', "bookworm"),
        ("ID=debian\nVERSION_CODENAME=forky\n", "forky"),
        ("ID=ubuntu\nVERSION_CODENAME=noble\n", ""),
    ],
)
def test_the_hosts_own_suite(text: str, suite: str, tmp_path: Path) -> None:
    """Only Debian's own apt is asked for a guest's packages without saying so."""
    (tmp_path / "os-release").write_text(text)

    assert debian.host_suite(str(tmp_path / "os-release")) == suite


def test_both_layouts_unpack_to_one(tmp_path: Path) -> None:
    """A package with /lib and one with /usr/lib end in one directory, behind links as on any Debian."""
    for name, where in (("old", "lib/old"), ("new", "usr/lib/new")):
        tree = tmp_path / name
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN/control").write_text(
            f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: n <n@example.org>\nDescription: d\n"
        )
        (tree / where).mkdir(parents=True)
        (tree / where / "file").write_text(name)
        subprocess.run(
            ["dpkg-deb", "-b", tree, tmp_path / debian.deb_name(name, "1")], check=True, capture_output=True
        )

    debian.unpack({"old": "1", "new": "1"}, str(tmp_path), str(tmp_path / "root"))

    assert sorted(path.name for path in (tmp_path / "root/usr/lib").iterdir()) == ["new", "old"]
    assert (tmp_path / "root/lib").is_symlink()


def test_epochs_do_not_enter_file_names() -> None:
    """As apt itself does it."""
    assert debian.deb_name("crun", "1:1.8") == "crun_1%3a1.8.deb"


def test_a_missing_tool() -> None:
    """The hint says what to install."""
    with pytest.raises(HostError, match="no program no-such-tool; try: apt-get install no-such-tool"):
        run_tool(["no-such-tool"])


def test_a_failing_tool() -> None:
    """Its last words are shown."""
    with pytest.raises(HostError, match="sh failed: third"):
        run_tool(["sh", "-c", "echo first; echo third >&2; exit 3"])
