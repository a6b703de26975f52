"""The phases of one sandbox's life with their times, for `kata-ctl trace` and the bench.

What: `Trace` collects (phase, start, end, id) in memory and writes them as JSON lines:
`{"phase": "vmm.boot", "start": 12.25, "end": 13.5, "id": "c1"}`, times in seconds of
CLOCK_MONOTONIC, so that the lines of several processes of one host can be laid side by side. A
phase that failed also has `"error": "<class of the exception>"`. The first line says whose it is:
`{"trace": 1, "sandbox": ID, "namespace": NAMESPACE, "containerd": address of its socket}`.
Where: `<state_dir>/trace.jsonl` while the sandbox lives; `close` moves it to
/var/log/kata-shim/trace/<name>.jsonl, by the sandbox's key, and keeps the newest 50 there.
Invariants: recording costs microseconds and never fails; at most MAX_ENTRIES are kept per sandbox,
so a pod with a probe each second does not grow; files that cannot be written are done without,
because a container must not fail for its trace. Imports nothing that the daemon would not anyway.
"""

from __future__ import annotations

import os
from time import monotonic
from types import TracebackType

__all__ = ["ARCHIVE_DIR", "KEEP", "MAX_ENTRIES", "TRACE_FILE", "Trace", "owner_of"]

ARCHIVE_DIR = "/var/log/kata-shim/trace"
TRACE_FILE = "trace.jsonl"
KEEP = 50
MAX_ENTRIES = 4096


class _Phase:
    """The context manager of one phase; entering a generator-based one costs three times as much."""

    __slots__ = ("_id", "_name", "_start", "_trace")

    def __init__(self, trace: Trace, name: str, id_: str) -> None:
        self._trace = trace
        self._name = name
        self._id = id_
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._trace.mark(
            self._name, self._start, monotonic(), id=self._id, error=kind.__name__ if kind else ""
        )


class Trace:
    """The recorder of one sandbox.

    `state_dir` is where `flush` appends (it need not exist before the first flush); an empty one
    records in memory only. `name`: that of the file which is kept (default: the sandbox's id).
    """

    def __init__(
        self,
        sandbox_id: str,
        state_dir: str = "",
        *,
        name: str = "",
        namespace: str = "",
        containerd: str = "",
        archive_dir: str = ARCHIVE_DIR,
    ) -> None:
        self.sandbox_id = sandbox_id
        self._name = name or os.path.basename(sandbox_id)
        self._owner = {"trace": 1, "sandbox": sandbox_id, "namespace": namespace, "containerd": containerd}
        self._flushed = False
        self._path = os.path.join(state_dir, TRACE_FILE) if state_dir else ""
        self._archive_dir = archive_dir
        self._pending: list[dict[str, str | float]] = []
        self._count = 0

    def phase(self, name: str, *, id: str = "") -> _Phase:  # noqa: A002  (the name on the wire)
        """`with trace.phase("vmm.boot"):` records from here to the end of the block, error or not."""
        return _Phase(self, name, id)

    def mark(
        self,
        name: str,
        start: float,
        end: float,
        *,
        id: str = "",  # noqa: A002
        error: str = "",
    ) -> None:
        """Record a phase that was timed elsewhere; `start` and `end` as time.monotonic() gives them."""
        if self._count >= MAX_ENTRIES:
            return
        self._count += 1
        entry: dict[str, str | float] = {
            "phase": name,
            "start": round(start, 6),
            "end": round(end, 6),
            "id": id or self.sandbox_id,
        }
        if error:
            entry["error"] = error
        self._pending.append(entry)

    def flush(self) -> bool:
        """Append what is new to the file; False if that was impossible (the entries stay pending)."""
        if not self._pending or not self._path:
            return not self._pending
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(self._lines())
        except OSError:
            return False
        self._pending.clear()
        self._flushed = True
        return True

    def durations(self) -> dict[str, float]:
        """Seconds of each phase of the sandbox itself (not of its containers), by name."""
        import json

        found: dict[str, float] = {}
        try:
            for line in self._content().splitlines():
                entry = json.loads(line)
                if entry.get("id") == self.sandbox_id:
                    seconds = float(entry["end"]) - float(entry["start"])
                    if seconds - seconds == 0:  # json reads NaN and Infinity
                        found[str(entry["phase"])] = round(seconds, 6)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            pass  # somebody spoilt the file; what was read is right
        return found

    def close(self) -> bool:
        """Put everything into the archive and remove the file; whether it is in the archive now.

        The two are usually on different file systems, so this copies: some kilobytes, no fsync. The
        state directory may be gone already; then only what was not flushed before is left to keep.
        """
        name = f"{self._name}.jsonl"
        target = os.path.join(self._archive_dir, name)
        try:
            content = self._content()
            if not content:
                return False
            os.makedirs(self._archive_dir, mode=0o700, exist_ok=True)
            temporary = os.path.join(self._archive_dir, f".{name}.{os.getpid()}")
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(content)
            os.replace(temporary, target)
            self._pending.clear()
            os.unlink(self._path)
        except FileNotFoundError:
            pass  # nothing was flushed, or the state directory went first
        except OSError:
            return False
        _prune(self._archive_dir)
        return True

    def _lines(self) -> str:
        import json

        head = [] if self._flushed or not self._pending else [self._owner]
        return "".join(json.dumps(entry) + "\n" for entry in [*head, *self._pending])

    def _content(self) -> str:
        """What was flushed and what was not."""
        content = ""
        if self._path:
            try:
                with open(self._path, encoding="utf-8") as file:
                    content = file.read()
            except FileNotFoundError:
                self._flushed = False
        return content + self._lines()


def owner_of(path: str) -> tuple[str, str, str]:
    """(sandbox id, namespace, containerd's address) as the file's first line says; "" for what it does not.
    Raises OSError."""
    import json

    with open(path, encoding="utf-8", errors="replace") as file:
        line = file.readline(1 << 16)
    try:
        head = json.loads(line)
        texts = [head.get(key) for key in ("sandbox", "namespace", "containerd")] if "trace" in head else []
    except (ValueError, RecursionError, AttributeError, TypeError):
        texts = []
    sandbox, namespace, containerd = (text if isinstance(text, str) else "" for text in texts or [""] * 3)
    return sandbox, namespace, containerd


def _prune(directory: str) -> None:
    """Leave the newest KEEP files; another shim may be pruning as well."""
    found: list[tuple[float, str]] = []
    try:
        for name in os.listdir(directory):
            if name.endswith(".jsonl"):
                path = os.path.join(directory, name)
                found.append((os.stat(path).st_mtime, path))
        for _, path in sorted(found, reverse=True)[KEEP:]:
            os.unlink(path)
    except OSError:
        return  # somebody else removed one just now: the next run prunes again
