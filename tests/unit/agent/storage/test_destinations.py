"""A volume whose place is a dangling link of the image is mounted where the link leads, inside the image."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.storage.destinations import make_destinations


def _prepare(root: Path, destination: str, source: Path) -> None:
    mount = {"type": "bind", "destination": destination, "source": str(source)}
    make_destinations(
        {"root": {"path": str(root)}, "mounts": [mount, {"type": "proc", "destination": "/proc"}]}
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "root"
    (made / "opt").mkdir(parents=True)
    return made


@pytest.mark.parametrize(
    ("link", "target", "destination", "made"),
    [
        ("opt/cur", "releases/7", "/opt/cur", "opt/releases/7"),
        ("opt/cur", "/srv/app", "/opt/cur", "srv/app"),
        ("opt/cur", "../../../../srv", "/opt/cur", "srv"),
        ("opt/cur", "releases/7", "/opt/cur/data/in", "opt/releases/7/data/in"),
        ("opt/cur", "./releases//7/", "opt/../opt/cur/", "opt/releases/7"),
    ],
)
def test_what_a_dangling_link_means_is_made(
    root: Path, tmp_path: Path, link: str, target: str, destination: str, made: str
) -> None:
    os.symlink(target, root / link)
    _prepare(root, destination, tmp_path)

    assert (root / made).is_dir()
    assert os.readlink(root / link) == target, "the image's link stays"
    assert sorted(os.listdir(tmp_path)) == ["root"], "nothing is made outside"


def test_a_files_place_is_a_file(root: Path, tmp_path: Path) -> None:
    os.symlink("next", root / "opt/conf")
    os.symlink("../etc/app/conf", root / "opt/next")
    (tmp_path / "source").write_text("x")
    _prepare(root, "/opt/conf", tmp_path / "source")

    assert (root / "etc/app/conf").is_file()
    assert (root / "etc/app/conf").stat().st_size == 0


def test_what_crun_does_itself_is_left_to_it(root: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    os.symlink("loop", root / "loop")
    os.symlink(str(tmp_path / "outside"), root / "absolute")
    for destination in ("/missing/below", "/opt", "/loop", "/opt/x"):
        _prepare(root, destination, tmp_path)
    assert sorted(os.listdir(root)) == ["absolute", "loop", "opt"]
    assert os.listdir(root / "opt") == []

    _prepare(root, "/absolute/x", tmp_path)
    assert os.listdir(tmp_path / "outside") == [], "a link's absolute target is below the container's root"
    assert (root / str(tmp_path / "outside/x").lstrip("/")).is_dir()
    _prepare(root / "nowhere", "/opt", tmp_path)
