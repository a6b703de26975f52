"""The command line of a shim binary, in the syntax of Go's flag package.

What: `parse` turns argv into `Flags`; `Flags.check` validates what becomes part of a path.
Why not argparse: importing it costs more than the whole rest of `start`, and its syntax differs
(`-id x`, `-id=x`, `--id x` are all legal here, flags end at the first other word).
Invariants: no import at all; nothing here touches the system.
"""

__all__ = ["USAGE", "FlagError", "Flags", "check_id", "parse", "runtime_class_of"]

MAX_ID = 128
"""Longest id accepted, in characters (containerd's own limit is 76)."""

_STRINGS = {
    "namespace": "containerd's namespace of the container",
    "address": "path of containerd's gRPC socket",
    "publish-binary": "path of the containerd binary",
    "id": "id of the container",
    "bundle": "path of the bundle (default: the working directory)",
    "socket": "listening socket to bind instead of the conventional one (daemon only)",
    "debug-socket": "accepted for containerd 2.x, unused",
}
_BOOLS = {
    "debug": "log at level debug",
    "v": "print the version",
    "version": "print the version",
    "info": "print the runtime's features (protobuf) and exit",
    "h": "print this help",
    "help": "print this help",
}
_TRUE = ("1", "t", "T", "true", "TRUE", "True")
_FALSE = ("0", "f", "F", "false", "FALSE", "False")
_PUNCTUATION = str.maketrans("", "", "_.-")


class FlagError(Exception):
    """The command line is wrong; the text says what and is meant for people."""


class Flags:
    """The parsed command line. Strings that were not given are empty. `placed`: the caller's options name the
    cgroup that the shim is in."""

    __slots__ = (
        "action",
        "address",
        "bundle",
        "debug",
        "help",
        "id",
        "info",
        "namespace",
        "placed",
        "publish_binary",
        "runtime_class",
        "socket",
        "version",
    )

    def __init__(self, strings: dict[str, str], bools: dict[str, bool], action: str) -> None:
        self.action = action
        self.namespace = strings.get("namespace", "")
        self.address = strings.get("address", "")
        self.publish_binary = strings.get("publish-binary", "")
        self.id = strings.get("id", "")
        self.bundle = strings.get("bundle", "")
        self.runtime_class = ""
        self.placed = False
        self.socket = strings.get("socket", "")
        self.debug = bools.get("debug", False)
        self.version = bools.get("v", False) or bools.get("version", False)
        self.info = bools.get("info", False)
        self.help = bools.get("h", False) or bools.get("help", False)

    def check(self) -> None:
        """Raise FlagError unless id and namespace are fit to be parts of a path."""
        check_id("namespace", self.namespace)
        check_id("id", self.id)
        if "\0" in self.address:
            raise FlagError("flag -address contains a NUL byte")


def check_id(what: str, value: str) -> None:
    """Raise FlagError unless `value` matches [A-Za-z0-9][A-Za-z0-9_.-]{0,127}.

    The names of containerd are a subset. What passes can be joined to a path: it has no slash, is
    neither "." nor "..", and does not look like a flag.
    """
    if not value:
        raise FlagError(f"flag -{what} is required")
    if len(value) > MAX_ID:
        raise FlagError(f"flag -{what} has {len(value)} characters; at most {MAX_ID} are allowed")
    plain = value.translate(_PUNCTUATION)
    if not (value.isascii() and value[0].isalnum() and plain.isalnum()):
        raise FlagError(
            f"flag -{what} is {value!a}; a letter or digit, then letters, digits, '_', '.', '-' are allowed"
        )


def parse(argv: list[str]) -> Flags:
    """Parse argv without the program's name. Raises FlagError."""
    strings: dict[str, str] = {}
    bools: dict[str, bool] = {}
    rest = list(argv)
    while rest:
        word = rest[0]
        if len(word) < 2 or word[0] != "-":
            break
        rest.pop(0)
        if word == "--":
            break
        name, has_value, value = word[2 if word[1] == "-" else 1 :].partition("=")
        if name in _BOOLS:
            if has_value and value not in _TRUE + _FALSE:
                raise FlagError(f"flag -{name} is a boolean; {value!a} is none")
            bools[name] = not has_value or value in _TRUE
        elif name in _STRINGS:
            if not has_value:
                if not rest:
                    raise FlagError(f"flag -{name} needs a value")
                value = rest.pop(0)
            strings[name] = value
        else:
            raise FlagError(f"unknown flag {word[:80]!a}; -help lists the flags")
    if len(rest) > 1:
        raise FlagError(f"one action expected, got {len(rest)}: flags must come before the action")
    return Flags(strings, bools, rest[0] if rest else "")


def runtime_class_of(program: str) -> str:
    """The CLASS of a program called `containerd-shim-kata-CLASS-v2`, "" for any other name.

    containerd runs a program of that name for the runtime io.containerd.kata-CLASS.v2: a link to ours.
    CLASS is fit to be part of a file's name: letters, digits and '-'.
    """
    name = program.rpartition("/")[2]
    prefix, suffix = "containerd-shim-kata-", "-v2"
    if not (name.startswith(prefix) and name.endswith(suffix)) or len(name) <= len(prefix) + len(suffix):
        return ""
    found = name[len(prefix) : -len(suffix)]
    return found if found.isascii() and found.replace("-", "").isalnum() else ""


def _usage() -> str:
    lines = ["usage: containerd-shim-kata-v2 [flags] start|delete|recover|daemon", ""]
    lines += [f"  -{name} value\n        {text}" for name, text in _STRINGS.items()]
    lines += [f"  -{name}\n        {text}" for name, text in _BOOLS.items()]
    return "\n".join(lines)


USAGE = _usage()
