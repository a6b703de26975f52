"""Log lines are JSON, bounded, free of secrets, and never make the daemon wait."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from shim.state import logs


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[int]:
    """containerd's end of the log FIFO."""
    os.mkfifo(tmp_path / "log")
    fd = os.open(tmp_path / "log", os.O_RDWR | os.O_NONBLOCK)
    handlers, level, raising = logging.root.handlers, logging.root.level, logging.raiseExceptions
    yield fd
    os.close(fd)
    structlog.reset_defaults()
    logging.root.handlers, logging.root.level, logging.raiseExceptions = handlers, level, raising


def _lines(fd: int) -> list[dict[str, Any]]:
    try:
        data = os.read(fd, 1 << 20)
    except BlockingIOError:
        return []
    return [json.loads(line) for line in data.splitlines()]


def test_line(tmp_path: Path, fifo: int) -> None:
    """A line has time, level, message, the constant fields and its own, in this order."""
    logs.configure(str(tmp_path), debug=False, sandbox="s1")
    structlog.get_logger("x").info("booted", phase="boot", ms=12)

    (line,) = _lines(fifo)
    assert list(line) == ["ts", "level", "msg", "sandbox", "phase", "ms"]
    assert (line["level"], line["msg"], line["sandbox"], line["ms"]) == ("info", "booted", "s1", 12)
    assert line["ts"].endswith("+00:00")


def test_levels(tmp_path: Path, fifo: int) -> None:
    """-debug decides whether debug lines appear."""
    logs.configure(str(tmp_path), debug=False)
    structlog.get_logger().debug("hidden")
    assert _lines(fifo) == []

    logs.configure(str(tmp_path), debug=True)
    structlog.get_logger().debug("shown")
    assert [line["level"] for line in _lines(fifo)] == ["debug"]


def test_the_configured_level(tmp_path: Path, fifo: int) -> None:
    """[runtime] log_level decides from then on, for loggers that exist too; debug wins over it."""
    logs.configure(str(tmp_path), debug=True)
    logger = structlog.get_logger()
    logs.set_level("warn", debug=False)
    logger.info("hidden")
    logger.warning("shown")
    logging.getLogger("library").warning("too")
    logs.set_level("error", debug=False)
    logger.warning("hidden")
    logging.getLogger("library").warning("hidden")
    logs.set_level("error", debug=True)
    logger.debug("all")

    assert [line["msg"] for line in _lines(fifo)] == ["shown", "too", "all"]


def test_secrets(tmp_path: Path, fifo: int) -> None:
    """Of environment and annotations only the names are written."""
    logs.configure(str(tmp_path), debug=False)
    structlog.get_logger().info("x", env=["TOKEN=hunter2"], annotations={"key": "hunter2"}, secrets="hunter2")

    (line,) = _lines(fifo)
    assert "hunter2" not in json.dumps(line)
    assert line["env"] == "['TOKEN=[redacted]']"
    assert "key" in line["annotations"]


def test_full_fifo_drops(tmp_path: Path, fifo: int) -> None:
    """With nobody reading, lines are dropped at once; the next that fits says how many."""
    logs.configure(str(tmp_path), debug=False)
    log = structlog.get_logger()
    for _ in range(2000):
        log.info("x" * 200)
    first = _lines(fifo)
    log.info("after")

    (last,) = _lines(fifo)
    assert 10 < len(first) < 2000
    assert last["msg"] == "after"
    assert last["dropped"] == 2000 - len(first)


def test_long_values(tmp_path: Path, fifo: int) -> None:
    """Whatever is logged, a line fits into one write and still says what happened."""
    logs.configure(str(tmp_path), debug=False)
    structlog.get_logger().info("m" * 10_000, **{f"k{i}": "ü" * 5000 for i in range(40)})

    data = os.read(fifo, 1 << 20)
    assert data.count(b"\n") == 1
    assert data.endswith(b"\n")
    assert len(data) <= logs.MAX_LINE
    assert b"mmm" in data


def test_exceptions(tmp_path: Path, fifo: int) -> None:
    """A traceback goes into one field of one line."""
    logs.configure(str(tmp_path), debug=False)
    try:
        raise ValueError("boom")
    except ValueError:
        structlog.get_logger().exception("failed")

    (line,) = _lines(fifo)
    assert line["level"] == "error"
    assert "ValueError: boom" in line["exception"]


def test_standard_logging(tmp_path: Path, fifo: int) -> None:
    """asyncio's own warnings arrive as lines of ours."""
    logs.configure(str(tmp_path), debug=False, sandbox="s1")
    logging.getLogger("asyncio").error("Task was %s", "destroyed")

    (line,) = _lines(fifo)
    assert (line["msg"], line["logger"], line["sandbox"]) == ("Task was destroyed", "asyncio", "s1")


def test_unprintable_values(tmp_path: Path, fifo: int) -> None:
    """Objects and broken text are written somehow; logging never raises."""
    logs.configure(str(tmp_path), debug=False)
    structlog.get_logger().info("x", value=object(), data=b"\xff", text="\ud800")

    assert len(_lines(fifo)) == 1


def test_whoever_a_value_came_from_it_is_plain(tmp_path: Path, fifo: int) -> None:
    """No sign that turns the writing round, breaks a line or speaks to a terminal; tracebacks keep lines."""
    logs.configure(str(tmp_path), debug=False)
    evil = "a\u202eb\u2028c\x1b[2Jd\x85e\x00"
    structlog.get_logger().info(evil, console=evil, keys=[evil])
    try:
        raise ValueError(evil)
    except ValueError:
        structlog.get_logger().exception("failed")

    raw = os.read(fifo, 1 << 20).decode()
    assert raw.replace("\n", "").isprintable()
    first, second = (json.loads(line) for line in raw.split("\n")[:2])
    assert (first["msg"], first["console"]) == ("ab cd e", "ab cd e")
    assert second["exception"].count("\n") >= 3
    assert second["exception"].replace("\n", "").isprintable()
