"""Fuzzing of everything that reads bytes of a guest, a VMM, a caller or a file.

There is a function for each reader: bytes in, nothing out, any exception but the reader's own is a fault, and
so is an answer outside of its bounds. `targets` has ttrpc, the agent and the streams, `vmms` the VMMs,
`documents` config.json and other JSON, `inputs` the files. `corpora/TARGET` holds what is known to lead
somewhere; each of its files is replayed by tests/fuzz/test_corpora.py, with a minute of fuzzing.

    make fuzz                                                a minute, over all targets
    make fuzz FUZZ_ARGS='--seconds 3600'                     an hour; what is found is below build/fuzz
    make fuzz FUZZ_ARGS='--runs 400000'                      more than 10^7 executions over all
    make fuzz FUZZ_ARGS='--target qmp --runs 1000000'        one target
    make fuzz FUZZ_ARGS='--seconds 600 --merge'              and make tests/fuzz/corpora of it

What was found is repeated with `TARGETS[name](bytes of build/fuzz/found-NAME-...)`; it becomes a unit test
of the reader, and its fix stays.
"""

from __future__ import annotations

from collections.abc import Callable


def all_targets() -> dict[str, Callable[[bytes], None]]:
    """The targets by name. Imported late, so that a child can instrument what they import."""
    from tests.fuzz import documents, inputs, targets, vmms  # noqa: F401  (each enters its own)

    return dict(targets.TARGETS)
