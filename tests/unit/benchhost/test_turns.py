"""Who waits for the bench host is told for whom."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from tests.benchhost.machine import take_turn


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
