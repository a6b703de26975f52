"""A state directory has one owner at a time, and is never removed from under the next one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shim.state.statedir import Owned, StateDir, holder, is_owned


def test_made_private_and_locked(tmp_path: Path) -> None:
    """0700; a second owner is told, until the first gives it back."""
    path = str(tmp_path / "run/1")
    home = StateDir.make(path, 0)
    assert os.stat(path).st_mode & 0o777 == 0o700
    assert is_owned(path)
    assert holder(path) == os.getpid()
    for call in (StateDir.make, StateDir.find):
        with pytest.raises(Owned):
            call(path, 0.05)

    home.close()
    home.close()
    assert not is_owned(path)
    assert holder(path) == 0
    found = StateDir.find(path, 0)
    assert found is not None
    found.remove()
    assert not os.path.exists(path)
    assert StateDir.find(path, 0) is None
    assert not is_owned(path)


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    """However that ends; and a child of the owner does not keep it."""
    path = str(tmp_path / "1")
    script = (
        "import sys, subprocess; sys.path[:0] = [sys.argv[1]]\n"
        "from shim.state.statedir import StateDir\n"
        "home = StateDir.make(sys.argv[2], 0)\n"
        "child = subprocess.Popen(['sleep', '100'], start_new_session=True)\n"
        "print(child.pid, flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", script, str(Path(__file__).parents[4]), path]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        child = int(owner.stdout.readline())
        assert holder(path) == owner.pid
        owner.kill()
        owner.wait()
        found = StateDir.find(path, 5)
        assert found is not None
        found.close()
        os.kill(child, 9)


def test_what_was_removed_meanwhile_is_not_taken_for_the_next(tmp_path: Path) -> None:
    """Whoever waited for the lock makes a directory of his own, which the first one's end leaves alone."""
    path = str(tmp_path / "1")
    first = StateDir.make(path, 0)
    (tmp_path / "1/journal").touch()
    made: list[StateDir] = []
    thread = threading.Thread(target=lambda: made.append(StateDir.make(path, 10)))
    thread.start()
    first.remove()
    thread.join(10)

    (second,) = made
    assert os.listdir(path) == []
    assert holder(path) == os.getpid()
    first.remove()  # again: it is not there any more
    assert os.path.isdir(path)
    second.remove()
    assert not os.path.exists(path)


def test_one_of_many_has_it(tmp_path: Path) -> None:
    """Whatever meets at the same path."""
    path = str(tmp_path / "1")
    inside: list[int] = []
    worst: list[int] = []

    def work() -> None:
        for _ in range(20):
            home = StateDir.make(path, 30)
            inside.append(1)
            worst.append(len(inside))
            assert os.path.isdir(path)
            inside.pop()
            home.remove()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert worst == [1] * 120
    assert not os.path.exists(path)


def test_emptied_but_for_what_is_kept(tmp_path: Path) -> None:
    """With the lock in hand, for the next journal."""
    home = StateDir.make(str(tmp_path / "1"), 0)
    for name in ("journal", "trace.jsonl"):
        (tmp_path / "1" / name).touch()
    (tmp_path / "1/pod/x").mkdir(parents=True)
    home.empty(frozenset({"journal"}))
    assert os.listdir(home.path) == ["journal"]
    home.empty()
    assert os.listdir(home.path) == []
    home.close()


def test_a_link_is_no_state_directory(tmp_path: Path) -> None:
    """Nobody is led elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "1").symlink_to("elsewhere")
    with pytest.raises(OSError, match=r"Not a directory|symbolic"):
        StateDir.make(str(tmp_path / "1"), 0)
    assert not is_owned(str(tmp_path / "1"))
