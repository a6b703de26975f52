"""`kata-ctl check`: can this host run containers in VMs, and if not, what to do.

What: a list of `Finding`s: the configuration, the guest's files, CPU and KVM (`ctl.vcpu`), vsock, virtiofsd,
memory, cgroups, network namespaces, the state directory and containerd's way to the shim; what the
chosen hypervisor's plugin says of itself (`HypervisorPlugin.check`); and a line for each other one.
Invariants: every check tells what it found, also when all is well; none changes anything, none raises;
what may hang is done in a child or has a deadline.
Exit code 1 if something fails; a warning is for what works, but worse than it could.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ctl.environment import first_line
from ctl.known_bad import why_bad
from ctl.vcpu import Measured, judge, measure
from devices.errors import KataError
from devices.kinds import Kind, Op
from devices.plain import plain
from hypervisors.base import Capabilities
from hypervisors.config import HostedSection
from hypervisors.registry import broken_plugins
from shim.config import Config, load_config

__all__ = ["Finding", "Host", "Level", "findings", "run"]


class Level(Enum):
    """How bad it is; the value is what is printed."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it."""

    level: Level
    name: str
    text: str
    hint: str = ""


def _new_netns() -> str:
    """Why no network namespace can be made, "" if one can. Tried in a child, which takes it away again."""
    import ctypes

    clone_newnet = 0x40000000
    pid = os.fork()
    if pid == 0:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            os._exit(ctypes.get_errno() & 0xFF if libc.unshare(clone_newnet) else 0)
        finally:
            os._exit(255)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return os.strerror(code) if code else ""


@dataclass(frozen=True, slots=True)
class Host:
    """Where the facts are; a test gives it another place. `path` is where programs are looked for.

    `measure` times a vCPU of the given device, `new_netns` makes a network namespace or says why not.
    """

    root: str = "/"
    path: str = os.defpath
    measure: Callable[[str], Measured] = measure
    new_netns: Callable[[], str] = _new_netns

    def at(self, path: str) -> str:
        """A path of this host."""
        return os.path.join(self.root, path.lstrip("/"))


def _ok(name: str, text: str) -> Finding:
    return Finding(Level.OK, name, text)


def _hosted(config: Config | None) -> bool:
    """Whether the VMs are on another machine: this one needs next to nothing for them."""
    return config is not None and isinstance(config.hypervisor, HostedSection)


def _guest(config: Config) -> Iterator[Finding]:
    section = config.hypervisor
    if _hosted(config):
        yield _ok("guest", "whoever makes the VM has its kernel and image")
        return
    for key in ("kernel", "initrd", "image"):
        path = getattr(section, key, "")
        if path:
            size = os.stat(path).st_size
            yield (
                _ok(key, f"{path}, {size / 1048576:.1f} MiB")
                if size
                else Finding(Level.FAIL, key, f"{path} is empty", "build the guest again: `make guest`")
            )
    if not getattr(section, "kernel", "") or not (section.initrd or section.image):
        yield Finding(
            Level.FAIL,
            "guest",
            f"{config.path} names no kernel, or neither initrd nor image",
            f"set kernel, initrd and image in [hypervisor.{config.hypervisor_name}]; `make install` does",
        )


def _cpu(host: Host) -> Finding:
    try:
        with open(host.at("/proc/cpuinfo"), encoding="utf-8", errors="replace") as file:
            text = file.read(1 << 20)
    except OSError as error:
        return Finding(Level.WARN, "cpu", f"/proc/cpuinfo cannot be read: {error.strerror}")
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*: (.*)$", text, re.MULTILINE)
    words = flags[1].split() if flags else []
    virtual = next((f", {word}" for word in ("vmx", "svm") if word in words), "")
    count = len(re.findall(r"^processor\s*:", text, re.MULTILINE))
    what = f"{model[1] if model else 'unknown'}, {count} online"
    if flags and not virtual:
        return Finding(Level.WARN, "cpu", f"{what}; advertises neither vmx nor svm")
    return _ok("cpu", what + virtual)


def _kvm(host: Host, config: Config | None) -> Finding:
    """A VMM that can emulate does without; the others, and QEMU when it is told to use KVM, do not."""
    if _hosted(config):
        return _ok("kvm", "not needed: VMs are on another machine")
    wanted = getattr(config.hypervisor, "accelerator", "kvm") if config else "auto"
    level = Level.FAIL if wanted == "kvm" else Level.WARN
    device = host.at("/dev/kvm")
    if not os.path.exists(device):
        return Finding(level, "kvm", f"{device} does not exist", _NO_KVM)
    useful, text = judge(host.measure(device), device)
    if useful:
        return _ok("kvm", text)
    hint = _NO_KVM if wanted == "kvm" else 'leave accelerator = "auto" or set "tcg"; for speed: ' + _KVM_HOW
    return Finding(level, "kvm", text, hint)


def _network(host: Host) -> Iterator[Finding]:
    problem = host.new_netns()
    if problem:
        yield Finding(
            Level.FAIL, "netns", f"a network namespace cannot be made: {problem}", "run the check as root"
        )
    else:
        yield _ok("netns", "network namespaces can be made and entered")
    tun = host.at("/dev/net/tun")
    try:
        os.close(os.open(tun, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        hint = "modprobe tun; without it pods have no network"
        yield Finding(Level.WARN, "tun", f"{tun}: {error.strerror}", hint)
    else:
        yield _ok("tun", f"{tun} opens")


def _vsock(host: Host, config: Config | None, able: Capabilities) -> Finding:
    if able.own_vsock:
        return _ok("vsock", "not needed: the VMM has its own")
    device = host.at("/dev/vhost-vsock")
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        why = f"{device}: {error.strerror}"
    else:
        return _ok("vsock", f"{device} opens")
    from devices.vsock_daemon import find_vsock_daemon

    try:
        daemon = find_vsock_daemon(getattr(config.hypervisor, "vsock_daemon", "") if config else "")
    except KataError as error:
        return Finding(Level.FAIL, "vsock", error.cause, error.hint)
    return _program("vsock", daemon, f"{why}; ", " serves instead")


def _virtiofsd(config: Config | None, able: Capabilities) -> Finding:
    section = config.hypervisor if config else None
    if not able.can(Kind.SHARE_FS, Op.COLD):
        return _ok("virtiofsd", "not needed: the VMM shares no directories")
    if getattr(section, "shared_fs", "") == "none":
        return _ok("virtiofsd", 'not needed: shared_fs = "none"')
    if section is not None and not hasattr(section, "virtio_fs_daemon"):
        return _ok("virtiofsd", "not needed: the VMM serves shared directories itself")
    from devices.share_fs import find_virtiofsd

    try:
        return _program("virtiofsd", find_virtiofsd(getattr(section, "virtio_fs_daemon", "")))
    except KataError as error:
        return Finding(Level.FAIL, "virtiofsd", error.cause, error.hint)


def _program(name: str, path: str, before: str = "", after: str = "") -> Finding:
    """Where it is and its version, and whether that is known to be bad."""
    version = first_line([path, "--version"])
    text = f"{before}{path}{after}: {version}" if version else f"{before}{path}{after}"
    bad = why_bad(version)
    return Finding(Level.WARN, name, f"{text}; {bad.reason}", bad.hint) if bad else _ok(name, text)


_LIMITING = ("cpu", "memory", "pids")  # the controllers that a pod's limits need


def _cgroup(host: Host) -> Finding:
    """What pods can be charged to, and held to, on this host."""
    mount = host.at("/sys/fs/cgroup")
    try:
        names = os.listdir(mount)
    except OSError:
        names = []
    if not names:
        return Finding(Level.FAIL, "cgroup", f"nothing is mounted at {mount}", "mount cgroup2 there")
    unified = "cgroup.controllers" in names
    if unified:
        kind, where = "version 2 (unified)", [mount]
        with open(os.path.join(mount, "cgroup.controllers"), encoding="ascii", errors="replace") as file:
            have = set(file.read().split())
    else:
        kind = f"version 1{', with version 2 beside it (hybrid)' if 'unified' in names else ''}"
        have = {word for name in names for word in name.split(",")}
        where = [os.path.join(mount, name) for name in names if name in _LIMITING]
    closed = [path for path in where if not os.access(path, os.W_OK)]
    if closed:
        return Finding(
            Level.WARN,
            "cgroup",
            f"{kind}; {closed[0]} cannot be written: pods are charged to containerd's cgroup",
            "run the check as root, and mount the cgroups read-write",
        )
    missing = [name for name in _LIMITING if name not in have]
    if missing:
        hint = "switch them on at boot (cgroup_enable=memory), or in cgroup.subtree_control of what is above"
        text = f"{kind}; without {', '.join(missing)}: what pods may have of it is not limited on the host"
        return Finding(Level.WARN, "cgroup", text, hint)
    return _ok("cgroup", kind)


def _confinement(host: Host, config: Config | None) -> Finding:
    """Whether children can be confined, and whose users the sandboxes' are."""
    from devices.confine import HELPER
    from devices.users import RANGE, parse_range

    if not os.access(HELPER, os.X_OK):
        return Finding(Level.FAIL, "confine", f"{HELPER} is not there: no child can be started", "make setup")
    section = config.hypervisor if config else None
    if not getattr(section, "rootless", True):
        return _ok("confine", "the VMM runs as root without capabilities (rootless = false)")
    text = getattr(section, "rootless_users", RANGE)
    numbers = parse_range(text)
    taken = [
        name for name, first, count in _users(host) if first < numbers.stop and first + count > numbers.start
    ]
    if taken:
        hint = "choose another range for rootless_users, which nobody on this host has"
        return Finding(Level.WARN, "confine", f"users {text} are {', '.join(taken[:3])}'s too", hint)
    return _ok("confine", f"each sandbox has a user of {text}")


def _users(host: Host) -> Iterator[tuple[str, int, int]]:
    """Whoever this host gives numbers to: name, first, how many."""
    for file in ("/etc/passwd", "/etc/subuid"):
        try:
            with open(host.at(file), encoding="utf-8", errors="replace") as lines:
                rows = [line.strip().split(":") for line in lines]
        except OSError:
            continue
        for name, *numbers in rows:
            words = numbers[1:2] if file == "/etc/passwd" else numbers[:2]
            if words and all(word.isdecimal() for word in words):
                yield name, int(words[0]), int(words[1]) if len(words) > 1 else 1


def _mounts(host: Host) -> Finding:
    """The shim has a mount namespace of its own, which receives the host's mounts if they are shared."""
    try:
        with open(host.at("/proc/self/mountinfo"), encoding="utf-8", errors="replace") as file:
            lines = [line.split() for line in file.read(16 << 20).splitlines()]
    except OSError as error:
        return Finding(Level.WARN, "mounts", f"/proc/self/mountinfo cannot be read: {error.strerror}")
    root = next((words for words in reversed(lines) if len(words) > 6 and words[4] == "/"), None)
    if root is None:
        return Finding(
            Level.FAIL,
            "mounts",
            "the root directory / is no mount point (a plain chroot)",
            "mount --bind ROOT ROOT, then chroot ROOT",
        )
    if not any(word.startswith("shared:") for word in root[6 : root.index("-")]):
        return Finding(
            Level.WARN,
            "mounts",
            "the mount at / is not shared: what the host mounts after a pod has started does not reach it",
            "mount --make-rshared / before containerd starts (systemd does it)",
        )
    return _ok("mounts", "the mount at / is shared")


def _state(host: Host) -> Finding:
    path = host.at("/run")
    try:
        facts = os.statvfs(path)
    except OSError as error:
        return Finding(Level.FAIL, "state", f"{path}: {error.strerror}", "a host needs a /run (tmpfs)")
    free = facts.f_bavail * facts.f_frsize / 1048576
    if not os.access(path, os.W_OK):
        return Finding(Level.WARN, "state", f"{path} is not writable for this user", "run the check as root")
    if free < 16:
        return Finding(Level.FAIL, "state", f"{path} has {free:.0f} MiB left", "make room in it")
    return _ok("state", f"{path} is writable, {free:.0f} MiB free")


def _memory(host: Host, config: Config | None) -> Finding:
    try:
        with open(host.at("/proc/meminfo"), encoding="ascii") as file:
            facts = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in file)}
        free = facts["MemAvailable"] // 1024
    except (OSError, ValueError, IndexError, KeyError) as error:
        return Finding(Level.WARN, "memory", f"/proc/meminfo cannot be read: {error}")
    needed = getattr(config.hypervisor, "default_memory", 0) if config and not _hosted(config) else 0
    if needed and free < needed:
        return Finding(
            Level.WARN,
            "memory",
            f"{free} MiB available, and a VM may take {needed}",
            "free some, or set a smaller default_memory",
        )
    return _ok("memory", f"{free} MiB available" + (f", a VM starts with {needed}" if needed else ""))


def _shim(host: Host) -> Finding:
    name = "containerd-shim-kata-v2"
    path = shutil.which(name, path=host.path)
    if path is None:
        return Finding(
            Level.WARN,
            "shim",
            f"{name} is not on this user's PATH; containerd looks on its own",
            "`make install` puts it into /usr/local/bin",
        )
    return _ok("shim", path)


def _capabilities(config: Config | None, get_plugin: Callable[[str], Any]) -> Capabilities:
    """What the chosen VMM needs of the host follows from what it can; QEMU's where it cannot be asked."""
    for name in (config.hypervisor_name if config else "qemu", "qemu"):
        with contextlib.suppress(Exception):  # somebody else's code; `_hypervisor` tells
            able = get_plugin(name).capabilities
            if isinstance(able, Capabilities):
                return able
    return Capabilities()


def _hypervisor(config: Config | None, get_plugin: Callable[[str], Any]) -> Iterator[Finding]:
    name = config.hypervisor_name if config else "qemu"
    try:
        results = get_plugin(name).check()
    except KataError as error:
        yield Finding(Level.FAIL, name, error.cause, error.hint)
        return
    except Exception as error:  # noqa: BLE001  (somebody else's code)
        yield Finding(Level.FAIL, name, f"its own check failed: {error!r:.200}", "tell its authors")
        return
    for result in results:
        if not result.ok:
            yield Finding(Level.FAIL, result.name, result.text, result.hint)
        elif result.name == "accelerator" and result.text.startswith("tcg"):
            yield Finding(Level.WARN, result.name, result.text, _NO_KVM)
        else:
            yield _ok(result.name, result.text)


_KVM_HOW = (
    "switch virtualization on in the firmware, or on a VM's host (nested), and load kvm_intel or kvm_amd"
)
_NO_KVM = f"QEMU works without, but the guest runs many times slower: {_KVM_HOW}"


def _others(config: Config | None, plugins: dict[str, Any]) -> Iterator[Finding]:
    """One line for each hypervisor that is not the chosen one: could it run here?"""
    for name, problem in sorted(broken_plugins().items()):
        yield Finding(Level.WARN, f"also {name}", f"installed, but cannot be loaded: {problem}")
    for name, plugin in sorted(plugins.items()):
        if name == (config.hypervisor_name if config else "qemu"):
            continue
        try:
            bad = [result for result in plugin.check() if not result.ok]
        except Exception as error:  # noqa: BLE001  (somebody else's code)
            yield Finding(Level.WARN, f"also {name}", f"its own check failed: {error!r:.200}")
            continue
        if bad:
            reasons = "; ".join(result.text for result in bad)
            hints = "; ".join(result.hint for result in bad if result.hint)
            yield Finding(Level.WARN, f"also {name}", f"not here: {reasons}", hints)
        else:
            yield _ok(f"also {name}", "could run here")


def findings(
    config_path: str | None = None,
    *,
    host: Host | None = None,
    get_plugin: Callable[[str], Any] | None = None,
    plugins: dict[str, Any] | None = None,
) -> list[Finding]:
    """All findings, in the order in which a reader would want them. `plugins`: by default all installed.

    What is said here of a thing counts more than what the plugin says of the same: the plugin does not
    know the paths in the configuration.
    """
    if get_plugin is None:
        from hypervisors.registry import get_plugin as from_registry

        get_plugin = from_registry
    if plugins is None:
        from hypervisors.registry import load_plugins

        plugins = load_plugins()
    host = host or Host(path=os.environ.get("PATH", os.defpath))
    config: Config | None = None
    found: list[Finding] = []
    try:
        config = load_config(config_path, env=os.environ, get_plugin=get_plugin)
    except KataError as error:
        found.append(Finding(Level.FAIL, "config", error.cause, error.hint))
    else:
        without = sum(not each.harmless for each in config.inactive)
        found.append(_ok("config", config.path + (f", {without} keys without effect" if without else "")))
        found += _guest(config)
        if getattr(config.hypervisor, "path", ""):
            found.append(_program(config.hypervisor_name, config.hypervisor.path))
        if getattr(config.hypervisor, "jailer_path", ""):
            found.append(_program("jailer", config.hypervisor.jailer_path))
        if path := getattr(config.hypervisor, "remote_hypervisor_socket", ""):
            from hypervisors.remote.plugin import answers

            answer = answers(path)
            level = Level.OK if answer.ok else Level.FAIL
            found.append(Finding(level, answer.name, answer.text, answer.hint))
    able = _capabilities(config, get_plugin)
    own = [_cpu(host), _kvm(host, config), _vsock(host, config, able), _virtiofsd(config, able)]
    own += [
        _memory(host, config),
        _cgroup(host),
        _confinement(host, config),
        _mounts(host),
        *_network(host),
        _state(host),
        _shim(host),
    ]
    own += _others(config, plugins)
    told = {each.name for each in found + own}
    theirs = [each for each in _hypervisor(config, get_plugin) if each.name not in told]
    return found + theirs + own


def run(config_path: str | None = None, *, as_json: bool = False) -> int:
    """The command; returns its exit code."""
    found = findings(os.path.abspath(config_path) if config_path else None)
    failed = sum(each.level is Level.FAIL for each in found)
    if as_json:
        lines = [
            {"level": each.level.value.lower(), "name": each.name, "text": each.text, "hint": each.hint}
            for each in found
        ]
        print(json.dumps({"ok": not failed, "findings": lines}, indent=2))
        return 1 if failed else 0
    width = max(len(each.name) for each in found)
    colours = {Level.OK: "32", Level.WARN: "33", Level.FAIL: "31"}
    for each in found:
        level = f"{each.level.value:<4}"
        if sys.stdout.isatty():
            level = f"\x1b[{colours[each.level]}m{level}\x1b[0m"
        print(f"{level}  {plain(each.name):<{width}}  {plain(each.text)}")
        if each.hint:
            print(f"      {'':<{width}}  -> {plain(each.hint)}")
    warned = sum(each.level is Level.WARN for each in found)
    print(f"\n{failed} failed, {warned} to know" if failed else f"\nThis host can run it ({warned} to know).")
    return 1 if failed else 0
