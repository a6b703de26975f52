"""Who waits for the bench host is told for whom; what it shares lies where the mount table says."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from devices import mounts
from tests.benchhost.machine import _mount_point, take_turn


def test_the_second_one_is_told_of_the_first(tmp_path: Path) -> None:
    path, told = str(tmp_path / "lock"), list[str]()
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        take_turn(first, told.append, path)
        assert told == [], "it waits for nobody"
        waited = threading.Event()

        def tell(text: str) -> None:
            told.append(text)
            waited.set()

        waiting = threading.Thread(target=take_turn, args=(second, tell, path))
        waiting.start()
        assert waited.wait(30)
        assert waiting.is_alive()
        first.close()
        waiting.join(30)
        assert not waiting.is_alive()
    (text,) = told
    assert text.startswith(f"bench host: waits for another one, of pid {os.getpid()} since ")
    assert "pytest" in text


def test_a_bind_mount_of_one_file_system_is_a_mount(tmp_path: Path) -> None:
    """Of which its device number tells nothing."""
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "below").mkdir(parents=True)
    target.mkdir()
    mounts.bind(str(source), str(target))
    try:
        assert _mount_point(target / "below") == str(target)
        assert _mount_point(source) != str(source)
    finally:
        mounts.unmount(str(target))
