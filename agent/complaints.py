"""What crun says when it cannot make a process, in the words of who asked for it.

What: `explain` takes crun's message and the config.json that it was given, and answers a status: what of the
spec was wrong, why, under which code, and what to try.
Why: crun names paths below the container's root, files of cgroups and system calls, and all of it is an
internal error; who wrote the spec knows its mounts by their destinations, and its limits by their names.
Invariants: a message that is not known stays as it is. Text of the config in it is cut: parts of it come from
images. Why a program cannot be run is told in runc's words, in small letters: Docker's client finds 127 and
126 by "executable file not found", "no such file or directory", "permission denied" and "is a directory", and
takes the first two for 127 wherever they stand.
Source: crun's src/libcrun/{linux,container,cgroup-resources,utils}.c, 1.8 to 1.28; moby's daemon/errors.go
and Docker's cli/command/container/run.go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from ttrpc import Code, RpcError

__all__ = ["explain"]

Json = Mapping[str, Any]

_RLIMIT = re.compile(r"setrlimit `?(RLIMIT_\w+)`?: (.*)")
_MOUNT = re.compile(r"mount(?:ing)? `([^`]*)` to `([^`]*)`: (.*)")
_STAT = re.compile(r"(?:error )?stat(?:'ing file)? `([^`]*)`: (.*)")
_OPEN = re.compile(r"(?:openat2|open(?:at)?|mkdir(?:at)?|create(?: directory)?) `([^`]*)`: (.*)")
_CHDIR = re.compile(r"chdir(?:\(\))? `?([^`:]*)`?: (.*)")
_CGROUP = re.compile(r"(?:writing|open|write to) (?:file )?`?(?:/sys/fs/cgroup\S*/)?([a-z]+\.[\w.]+)`?: (.*)")
_NOT_FOUND = re.compile(r"executable file `.*` not found|cannot find `?.*`? in \$PATH")
_NOT_RUN = re.compile(r"(?:open executable|exec container process(?: \([^)]*\))?(?: `.*`)?): (.*)")
# crun 1.21 and later look at the file first, and end with "Operation not permitted" whatever it is.
_NO_PROGRAM = re.compile(r"the path `.*` (exists but it is not executable|is not a regular file)")
_NO_FILE_SYSTEM = "the guest's kernel has no such file system: see kernel_modules in [agent.kata]"
_HINTS = {
    "Not a directory": "one of the two is a file and the other a directory, or a file is on the way",
    "No such device": _NO_FILE_SYSTEM,
    "unknown filesystem type": _NO_FILE_SYSTEM,
    "Invalid argument": "look at the mount's type and options",
    "Too many levels of symbolic links": "a link of the image leads nowhere",
}


def explain(error: RpcError, config: Json) -> RpcError:
    """`error` is of a run of crun, with its message at the end; `config` may have a process only."""
    for rule in _RULES:
        found = rule(error.message, config)
        if found is not None:
            code, text, hint = found
            what = error.message.partition(": ")[0]
            return RpcError(code, f"{what}: {text}" + (f"; try: {hint}" if hint else ""))
    return error


_Found = tuple[Code, str, str] | None


def _rlimit(message: str, config: Json) -> _Found:
    match = _RLIMIT.search(message)
    if match is None:
        return None
    name, why = match.groups()
    limits = [limit for limit in config.get("process", {}).get("rlimits", ()) if limit["type"] == name]
    shown = f" (soft {limits[0]['soft']}, hard {limits[0]['hard']})" if limits else ""
    hint = "the soft limit must not be above the hard one" if "Invalid" in why else ""
    if "not permitted" in why:
        hint = "it is above what the guest's kernel allows"
        hint += ": fs.nr_open" if name == "RLIMIT_NOFILE" else ""
    return Code.INVALID_ARGUMENT, f"process.rlimits {name}{shown} cannot be set: {why}", hint


def _mount(message: str, config: Json) -> _Found:
    match = _MOUNT.search(message)
    if match is None:
        return None
    source, target, why = match.groups()
    return _about_mount(config, why, lambda mount: _is(mount, source, target))


def _source(message: str, config: Json) -> _Found:
    match = _STAT.search(message)
    if match is None:
        return None
    path, why = match.groups()
    return _about_mount(config, why, lambda mount: mount.get("source") == path)


def _place(message: str, config: Json) -> _Found:
    """crun names what it could not open or make on the way to a mount's destination, relative to the root."""
    match = _OPEN.search(message)
    path = match[1].strip("/") if match else ""
    if match is None or not path:
        return None
    return _about_mount(
        config, match[2], lambda mount: f"{mount['destination'].strip('/')}/".startswith(f"{path}/")
    )


def _about_mount(config: Json, why: str, wanted: Callable[[Json], bool]) -> _Found:
    mounts = [mount for mount in config.get("mounts", ()) if wanted(mount)]
    if not mounts:
        return None
    mount = mounts[0]
    of = mount.get("source") or ""
    if mount.get("type") not in ("bind", None, ""):
        of = f"{mount['type']}, options {','.join(mount.get('options', ()))[:200] or 'none'}"
    text = f"the mount at {mount['destination'][:200]} (of {of[:300]}) cannot be made: {why}"
    hint = next((hint for words, hint in _HINTS.items() if words in why), "")
    code = Code.FAILED_PRECONDITION if "ermi" in why else Code.INVALID_ARGUMENT  # permission, not permitted
    return code, text, hint


def _is(mount: Json, source: str, target: str) -> bool:
    return mount["destination"].strip("/") == target.strip("/") and source in (
        mount.get("source", ""),
        mount.get("type", ""),
    )


def _directory(message: str, config: Json) -> _Found:
    match = _CHDIR.search(message)
    cwd = config.get("process", {}).get("cwd", "")
    if match is None or match[1] != cwd:
        return None
    return Code.INVALID_ARGUMENT, f"process.cwd {cwd[:200]!r} cannot be entered: {match[2]}", ""


def _program(message: str, config: Json) -> _Found:
    args = config.get("process", {}).get("args") or [""]
    program = str(args[0])[:200]
    absent, unfit = _NOT_FOUND.search(message), _NOT_RUN.search(message)
    if absent is not None:
        why = "no such file or directory" if "/" in program else "executable file not found in $PATH"
    elif unfit is not None:
        why = unfit[1].lower()
    elif (found := _NO_PROGRAM.search(message)) is not None:
        why = "permission denied" if "executable" in found[1] else "operation not permitted"
    else:
        return None
    if why == "operation not permitted":  # crun's own word for what is no regular file
        why = "it is no file: permission denied"
    hint = "it must be a file that the container's user may execute" if "denied" in why else ""
    return Code.INVALID_ARGUMENT, f"process.args[0] {program!r} cannot be run: {why}", hint


def _limit(message: str, config: Json) -> _Found:
    if "the memory limit could be too low" in message:
        limit = config.get("linux", {}).get("resources", {}).get("memory", {}).get("limit")
        text = f"linux.resources.memory.limit {limit or ''} is too low for a process to start".replace(
            "  ", " "
        )
        return Code.INVALID_ARGUMENT, text, "some MiB are needed to start any program"
    match = _CGROUP.search(message)
    if match is None:
        return None
    hint = "the guest's kernel has no such control" if "No such file" in match[2] else ""
    return Code.INVALID_ARGUMENT, f"linux.resources: {match[1]} cannot be set: {match[2]}", hint


def _hostname(message: str, config: Json) -> _Found:
    if "sethostname" not in message:
        return None
    why = message.rpartition(": ")[2]
    return (
        Code.INVALID_ARGUMENT,
        f"hostname {str(config.get('hostname', ''))[:80]!r} cannot be set: {why}",
        "",
    )


_RULES = (_program, _rlimit, _mount, _source, _directory, _limit, _hostname, _place)
