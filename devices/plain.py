"""Text of somebody else, made fit for a log, an error message and a terminal.

What: `plain` makes one line of it, `plain_lines` keeps its lines apart.
Why: a guest, an image, a bundle or a caller chooses it. A carriage return or an escape sequence rewrites what
an operator sees; a line separator makes a second entry of a log; a sign that turns the writing direction
round has a name read as another one. One function, so that no place forgets one of them.
Invariants: what comes out is printable (`str.isprintable`): letters, marks, digits, signs, and blanks as the
only space. White space of any kind becomes a blank, line and paragraph separators too; whatever else does not
print is dropped: controls (C0, C1), escape sequences as a whole, writing directions, zero-width and other
format characters, halves of surrogate pairs, and what Unicode has not assigned. Nothing here bounds a length.
Source: Unicode's general categories Cc, Cf, Cs, Co, Cn, Zl, Zp, Zs; ECMA-48 for the sequences.
"""

from __future__ import annotations

import re

__all__ = ["plain", "plain_lines"]

_ESCAPES = r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b\n]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]"


def plain(text: str) -> str:
    """`text` as one line."""
    if text.isprintable():
        return text
    text = re.sub(_ESCAPES, "", text)  # compiled when it is first needed: most starts have nothing odd to say
    return "".join(each if each.isprintable() else " " if each.isspace() else "" for each in text)


def plain_lines(text: str) -> list[str]:
    """The lines of `text`, which only a newline ends, each as `plain` has it, without a carriage return at
    its end."""
    return [plain(line.rstrip("\r")) for line in text.split("\n")]
