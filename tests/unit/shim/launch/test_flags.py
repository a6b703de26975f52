"""The shim's command line follows Go's flag syntax, and nothing unfit for a path passes `check`."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.launch.flags import USAGE, FlagError, check_id, parse, runtime_class_of

# What containerd 1.6, 1.7 and 2.x execute (facts 1.2).
START = [
    *("-namespace", "k8s.io", "-address", "/run/containerd/containerd.sock"),
    *("-publish-binary", "/usr/bin/containerd", "-id", "c1", "-debug", "start"),
]


def test_containerd_start_line() -> None:
    """The line that containerd runs for `start` is understood whole."""
    flags = parse(START)

    assert (flags.namespace, flags.id, flags.action) == ("k8s.io", "c1", "start")
    assert (flags.address, flags.publish_binary) == (
        "/run/containerd/containerd.sock",
        "/usr/bin/containerd",
    )
    assert flags.debug
    assert not flags.version


def test_containerd_delete_line() -> None:
    """`delete` names the bundle, and has no -debug in 1.6."""
    flags = parse(["-namespace", "n", "-address", "/a", "-id", "x", "-bundle", "/b", "delete"])

    assert (flags.action, flags.bundle, flags.debug) == ("delete", "/b", False)


@pytest.mark.parametrize("form", [["-id", "x"], ["--id", "x"], ["-id=x"], ["--id=x"]])
def test_forms_of_a_value(form: list[str]) -> None:
    """One dash or two, a separate value or an equals sign: all the same."""
    assert parse([*form, "start"]).id == "x"


@pytest.mark.parametrize(
    ("word", "expected"), [("-debug", True), ("-debug=true", True), ("-debug=0", False), ("--debug=F", False)]
)
def test_booleans(word: str, expected: bool) -> None:
    """A boolean flag takes no separate value."""
    flags = parse([word, "start"])

    assert flags.debug is expected
    assert flags.action == "start"


def test_value_that_looks_like_a_flag() -> None:
    """As with Go, the word after a flag is its value, whatever it looks like."""
    assert parse(["-id", "-debug", "start"]).id == "-debug"


@pytest.mark.parametrize("word", ["-v", "--version", "-version"])
def test_version(word: str) -> None:
    """-v, -version and --version ask for the version without an action."""
    flags = parse([word])

    assert flags.version
    assert flags.action == ""


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["-nope"], "unknown flag"),
        (["-id"], "needs a value"),
        (["-debug=maybe"], "boolean"),
        (["start", "-id", "x"], "before the action"),
    ],
)
def test_refusals(argv: list[str], text: str) -> None:
    """A wrong line is refused with the reason."""
    with pytest.raises(FlagError, match=text):
        parse(argv)


def test_usage_names_every_flag() -> None:
    """-help lists what is accepted."""
    for name in ("namespace", "address", "publish-binary", "id", "bundle", "debug", "info", "v"):
        assert f"-{name}" in USAGE


@pytest.mark.parametrize("value", ["a", "A1", "pod-1.x_y", "x" * 128, "0" * 64])
def test_good_ids(value: str) -> None:
    """Letters, digits and inner punctuation, up to 128 characters."""
    check_id("id", value)


@pytest.mark.parametrize(
    "value", ["", ".", "..", "-x", "a/b", "a\0", "a b", "ü", "x" * 129, "_a", "²", "a\n"]
)
def test_bad_ids(value: str) -> None:
    """Nothing that could leave a directory, look like a flag or hide a character."""
    with pytest.raises(FlagError):
        check_id("id", value)


@given(st.text(max_size=140))
def test_accepted_ids_stay_in_their_directory(value: str) -> None:
    """Whatever text is accepted is one plain path component."""
    try:
        check_id("id", value)
    except FlagError:
        return

    assert os.path.normpath(os.path.join("/run/kata", value)) == "/run/kata/" + value
    assert os.path.dirname("/run/kata/" + value) == "/run/kata"
    assert value.isprintable()


@given(st.lists(st.text(max_size=12), max_size=8))
def test_parse_never_fails_otherwise(argv: list[str]) -> None:
    """Any command line is parsed or refused with FlagError, nothing else."""
    with contextlib.suppress(FlagError):
        assert isinstance(parse(argv).action, str)


@pytest.mark.parametrize(
    ("program", "found"),
    [
        ("/usr/local/bin/containerd-shim-kata-fc-v2", "fc"),
        ("containerd-shim-kata-qemu-snp-v2", "qemu-snp"),
        ("/usr/local/bin/containerd-shim-kata-v2", ""),
        ("/x/containerd-shim-kata--v2", ""),
        ("/x/containerd-shim-kata-..-v2", ""),
        ("/x/containerd-shim-kata-a.b-v2", ""),
        ("/x/containerd-shim-kata-\u00e9-v2", ""),
        ("/x/containerd-shim-runc-v2", ""),
        ("python -m shim.launch.launcher", ""),
    ],
)
def test_the_class_is_in_the_programs_name(program: str, found: str) -> None:
    assert runtime_class_of(program) == found
