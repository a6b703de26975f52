"""From an RPC's name to the name of its Python handler."""

from __future__ import annotations

__all__ = ["snake_case"]


def snake_case(name: str) -> str:
    """`CloseIO` -> `close_io`, `GetOOMEvent` -> `get_oom_event`, `SetIPTables` -> `set_ip_tables`.

    A word starts at a capital that follows a small letter or digit, and at the last capital of a run
    when a small letter follows it.
    """
    out: list[str] = []
    for index, char in enumerate(name):
        if char.isupper() and index:
            before, after = name[index - 1], name[index + 1 : index + 2]
            if after.islower() if before.isupper() else before != "_":
                out.append("_")
        out.append(char.lower())
    return "".join(out)
