"""`kata-ctl`: look at the host, the configuration, the sandboxes and the times of their starts.

What: parses the command line and calls the module of the command, which is imported only then.
Invariants: exit code 0 is "fine", 1 "something is wrong, and was told", 2 a wrong command line. Errors
of ours are one paragraph on stderr, without a traceback. Nothing here changes a running sandbox or a file,
except `config set`, `direct-volume`, `factory` and `recover`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from ctl.which import add_arguments
from devices.errors import CallerError, KataError

__all__ = ["main"]


def _check(arguments: argparse.Namespace) -> int:
    from ctl.check import run

    return run(arguments.config, as_json=arguments.json)


def _env(arguments: argparse.Namespace) -> int:
    from ctl.environment import run

    return run(arguments.config, as_json=arguments.json)


def _config_show(arguments: argparse.Namespace) -> int:
    from ctl.configuration import show

    return show(arguments.file, written=arguments.written, origin=arguments.origin)


def _config_set(arguments: argparse.Namespace) -> int:
    from ctl.config_set import set_key

    return set_key(arguments.key, arguments.value, path=arguments.file, drop_in=arguments.drop_in)


def _hypervisors(arguments: argparse.Namespace) -> int:
    from ctl.hypervisors import run

    return run(as_json=arguments.json, as_markdown=arguments.markdown)


def _conformance(arguments: argparse.Namespace) -> int:
    from ctl.conformance import run

    return run(
        arguments.name,
        config=arguments.config or "",
        only=arguments.only,
        first=arguments.first,
        bench_host=arguments.bench_host,
    )


def _config_check(arguments: argparse.Namespace) -> int:
    from ctl.configuration import check

    return check(arguments.file)


def _list(arguments: argparse.Namespace) -> int:
    from ctl.sandboxes import run

    return run(as_json=arguments.json)


def _trace(arguments: argparse.Namespace) -> int:
    from ctl.trace import run
    from ctl.which import Which, which

    text = arguments.run
    is_file = text and os.path.isfile(text)
    wanted = Which() if is_file else which(text, arguments.namespace, arguments.address)
    path = text if is_file else None
    return run(wanted, path=path, svg=arguments.svg, listing=arguments.list, everything=arguments.all)


def _recover(arguments: argparse.Namespace) -> int:
    from ctl.recover import run
    from ctl.which import which

    if arguments.all == bool(arguments.sandbox):
        raise CallerError("recover takes a sandbox, or --all", phase="recover", code="INVALID_ARGUMENT")
    wanted = which(arguments.sandbox, arguments.namespace, arguments.address)
    return run(None if arguments.all else wanted)


def _factory(arguments: argparse.Namespace) -> int:
    from ctl import factory

    match arguments.action:
        case "init":
            return factory.init(arguments.config)
        case "status":
            return factory.status(arguments.config, as_json=arguments.json)
    return factory.destroy(arguments.config)


def _direct_volume(arguments: argparse.Namespace) -> int:
    from ctl import direct_volume
    from ctl.which import which

    match arguments.action:
        case "add":
            return direct_volume.add(arguments.volume, arguments.mount_info)
        case "remove":
            return direct_volume.remove(arguments.volume)
        case "stats":
            wanted = which(arguments.sandbox, arguments.namespace, arguments.address)
            return direct_volume.stats(arguments.volume, wanted)
    wanted = which(arguments.sandbox, arguments.namespace, arguments.address)
    return direct_volume.resize(arguments.volume, arguments.size, wanted)


def parser() -> argparse.ArgumentParser:
    """The command line of kata-ctl."""
    top = argparse.ArgumentParser(prog="kata-ctl", description="Look at kata-shim and its host.")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(
        into: argparse._SubParsersAction[argparse.ArgumentParser],
        name: str,
        run: Callable[[argparse.Namespace], int],
        text: str,
    ) -> argparse.ArgumentParser:
        command = into.add_parser(name, help=text, description=text)
        command.set_defaults(call=run)
        return command

    check = add(commands, "check", _check, "Can this host run containers in VMs, and if not, what to do.")
    env = add(commands, "env", _env, "Print versions and paths, for a bug report.")
    for command in (check, env):
        command.add_argument("--config", metavar="FILE", help="a configuration other than the shim's")
    text = "Read and change the configuration, as the shim would read it."
    config = commands.add_parser("config", help=text, description=text)
    actions = config.add_subparsers(required=True, metavar="ACTION")
    show = add(actions, "show", _config_show, "Print the complete configuration, defaults filled in.")
    verify = add(actions, "check", _config_check, "Tell every mistake, and every key without effect.")
    for command in (show, verify):
        command.add_argument("file", nargs="?", metavar="FILE", help="default: the shim's")
    which = show.add_mutually_exclusive_group()
    which.add_argument("--effective", action="store_true", help="with defaults filled in (the default)")
    which.add_argument("--written", action="store_true", help="only what the file and its drop-ins say")
    show.add_argument("--origin", action="store_true", help="with the file and line of each value")
    change = add(
        actions, "set", _config_set, "Change one key, keeping comments; what would not load is not written."
    )
    change.add_argument("key", metavar="KEY", help="with its section: hypervisor.qemu.default_memory")
    change.add_argument("value", metavar="VALUE", help="a TOML value; anything else is taken as a string")
    change.add_argument("--file", metavar="FILE", help="default: the shim's")
    change.add_argument("--drop-in", metavar="NAME", help="write into config.d/NAME.toml beside the file")
    kinds = add(commands, "hypervisors", _hypervisors, "List the hypervisors and what each can do.")
    kinds.add_argument("--json", action="store_true", help="for programs")
    kinds.add_argument("--markdown", action="store_true", help="as the table in docs/hypervisors.md")
    suite = add(
        commands,
        "conformance",
        _conformance,
        "Try whether a hypervisor's plugin keeps its promises, on real VMs whose guests are asked.",
    )
    suite.add_argument("name", metavar="NAME", help="of the plugin, as `kata-ctl hypervisors` shows it")
    suite.add_argument(
        "--config", metavar="FILE", help="the configuration that chooses it; default: the shim's"
    )
    suite.add_argument("-k", dest="only", metavar="EXPRESSION", default="", help="only these: pytest's -k")
    suite.add_argument(
        "--bench-host", action="store_true", help="in a nested machine with KVM: needs kata-shim's checkout"
    )
    suite.add_argument("-x", dest="first", action="store_true", help="stop at the first that fails")
    listing = add(commands, "list", _list, "List the sandboxes of this host.")
    for command in (check, env, listing):
        command.add_argument("--json", action="store_true", help="for programs")
    trace = add(commands, "trace", _trace, "Print and draw the phases of one start.")
    trace.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help="[NAMESPACE/]ID of a sandbox, or the beginning of one, or a file; default: the newest",
    )
    add_arguments(trace)
    trace.add_argument("--list", action="store_true", help="list the runs that are kept")
    trace.add_argument("--all", action="store_true", help="also what came after the start (execs, stop)")
    trace.add_argument("--svg", metavar="FILE", help="draw into FILE as well")
    recover = add(
        commands,
        "recover",
        _recover,
        'Give a sandbox a new shim, if its VM outlived the old one (on_shim_death = "keep").',
    )
    recover.add_argument("sandbox", nargs="?", metavar="[NAMESPACE/]ID", help="as `kata-ctl list` shows it")
    recover.add_argument("--all", action="store_true", help="all that can be; none is no error")
    add_arguments(recover)
    text = "Make, list or remove the templates that VMs begin with (docs/templates.md)."
    factory = commands.add_parser("factory", help=text, description=text)
    actions = factory.add_subparsers(required=True, metavar="ACTION", dest="action")
    for name, text in (
        ("init", "Make the template of the configuration now, instead of with the first VM."),
        ("status", "List them; exit code 1 if the configuration's own is missing."),
        ("destroy", "Remove them all; VMs that began with one go on."),
    ):
        action = add(actions, name, _factory, text)
        action.add_argument("--config", metavar="FILE", help="a configuration other than the shim's")
        if name == "status":
            action.add_argument("--json", action="store_true", help="for programs")
    text = "Assign disks to volumes, and look at or grow those that sandboxes have."
    volumes = commands.add_parser("direct-volume", help=text, description=text)
    actions = volumes.add_subparsers(required=True, metavar="ACTION", dest="action")
    for name, text in (
        ("add", "Have the volume be this disk for containers that mount it."),
        ("remove", "Take that back."),
        ("stats", "Print how full it is, as the guest says."),
        ("resize", "Grow it: its image, its disk in the VM, its file system in the guest."),
    ):
        action = add(actions, name, _direct_volume, text)
        action.add_argument("volume", metavar="PATH", help="the source of the containers' mount")
        if name == "add":
            action.add_argument("mount_info", metavar="JSON", help="Kata's mountInfo.json")
        if name == "resize":
            action.add_argument("size", metavar="BYTES", type=int)
        if name in ("stats", "resize"):
            action.add_argument("--sandbox", metavar="[NAMESPACE/]ID", help="if several have the volume")
            add_arguments(action)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.call(arguments)
        sys.stdout.flush()
    except KataError as error:
        print(f"kata-ctl: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `kata-ctl ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code
