"""`kata-ctl check` promises a line for each thing a VM needs, and for each failure a way out."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from ctl import check
from ctl.check import Finding, Host, Level, findings
from ctl.vcpu import Measured
from devices.errors import ConfigError
from hypervisors.base import Capabilities, CheckResult
from hypervisors.remote.plugin import RemotePlugin


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    path: str = ""
    kernel: str = ""
    initrd: str = ""
    image: str = ""
    default_memory: int = 64
    shared_fs: str = "virtio-fs"
    virtio_fs_daemon: str = ""
    vsock_daemon: str = ""


class Plugin:
    section = Section

    def __init__(self, results: list[CheckResult]) -> None:
        self.results = results

    def adjust_config(self, section: Section) -> Section:
        return section

    def validate_config(self, section: Section) -> None:
        pass

    def check(self) -> list[CheckResult]:
        return self.results


class World:
    """A host below a directory, on which everything is well until a test changes it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.results = [CheckResult("accelerator", True, "kvm", "not shown")]
        for folder in ("dev/net", "run", "proc", "sys/fs/cgroup", "bin"):
            (root / folder).mkdir(parents=True)
        for device in ("vhost-vsock", "kvm", "net/tun"):
            (root / "dev" / device).write_text("")
        (root / "proc/cpuinfo").write_text(
            "processor: 0\nmodel name\t: Fast\nflags\t\t: fpu svm\nprocessor: 1\n"
        )
        (root / "proc/self").mkdir()
        self.mounts("1 0 8:1 / / rw shared:1 - ext4 /dev/root rw")
        self.measured = Measured(ratio=1.04)
        self.netns = ""
        self.plugins: dict[str, Any] = {}
        (root / "sys/fs/cgroup/cgroup.controllers").write_text("cpu memory pids\n")
        (root / "proc/meminfo").write_text("MemTotal: 4096000 kB\nMemAvailable: 2048000 kB\n")
        for name in ("containerd-shim-kata-v2", "virtiofsd", "vsockd", "qemu"):
            self.program(name)
        for name in ("vmlinux", "initrd", "image"):
            (root / name).write_bytes(b"x" * (1 << 20))
        self.config = root / "c.toml"
        self.write(
            f'path = "{root}/bin/qemu"\nkernel = "{root}/vmlinux"\ninitrd = "{root}/initrd"\n'
            f'image = "{root}/image"\nvirtio_fs_daemon = "{root}/bin/virtiofsd"\n'
            f'vsock_daemon = "{root}/bin/vsockd"\n'
        )

    def mounts(self, *lines: str) -> None:
        (self.root / "proc/self/mountinfo").write_text("".join(f"{line}\n" for line in lines))

    def program(self, name: str) -> None:
        path = self.root / "bin" / name
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)

    def write(self, section: str) -> None:
        self.config.write_text(f"[hypervisor.qemu]\n{section}")

    def get_plugin(self, name: str) -> Any:
        assert name == "qemu"
        return Plugin(self.results)

    def host(self) -> Host:
        return Host(str(self.root), str(self.root / "bin"), lambda _: self.measured, lambda: self.netns)

    def look(self) -> dict[str, Finding]:
        found = findings(str(self.config), host=self.host(), get_plugin=self.get_plugin, plugins=self.plugins)
        names = [each.name for each in found]
        assert len(names) == len(set(names)), names
        return {each.name: each for each in found}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_good_host_has_a_line_for_everything_and_no_complaint(world: World) -> None:
    found = world.look()
    assert {name: each.level for name, each in found.items() if each.level is not Level.OK} == {}
    assert list(found) == [
        "config",
        "kernel",
        "initrd",
        "image",
        "qemu",
        "accelerator",
        "cpu",
        "kvm",
        "vsock",
        "virtiofsd",
        "memory",
        "cgroup",
        "confine",
        "mounts",
        "netns",
        "tun",
        "state",
        "shim",
    ]
    assert found["kernel"].text == f"{world.root}/vmlinux, 1.0 MiB"
    assert found["cpu"].text == "Fast, 2 online, svm"
    assert (
        found["kvm"].text
        == f"{world.root}/dev/kvm works: a loop on a vCPU takes 1.0 times as long as on the host"
    )
    assert not any(each.hint for each in found.values())


def test_a_kvm_that_emulates_is_told_in_words(world: World) -> None:
    world.measured = Measured(ratio=123.4)
    found = world.look()["kvm"]
    assert found.text == (
        f"{world.root}/dev/kvm opens but emulates the CPU: a loop on a vCPU takes about 100 times "
        "as long as on the host; TCG is faster"
    )
    # This section has no accelerator to choose, so its VMM needs KVM.
    assert found.level is Level.FAIL
    world.measured = Measured(timed_out=True)
    assert "did not end within 2 s" in world.look()["kvm"].text
    (world.root / "dev/kvm").unlink()
    assert world.look()["kvm"].text.endswith("dev/kvm does not exist")


def test_a_cpu_that_cannot_virtualise(world: World) -> None:
    (world.root / "proc/cpuinfo").write_text("processor: 0\nmodel name: Old\nflags: fpu vme\n")
    found = world.look()["cpu"]
    assert (found.level, found.text) == (
        Level.WARN,
        "Old, 1 online; advertises neither vmx nor svm",
    )


def test_rights_for_network_namespaces(world: World) -> None:
    world.netns = "Operation not permitted"
    (world.root / "dev/net/tun").unlink()
    found = world.look()
    assert (found["netns"].level, found["netns"].hint) == (Level.FAIL, "run the check as root")
    assert found["tun"].level is Level.WARN


def test_a_line_for_each_other_hypervisor(world: World) -> None:
    world.plugins = {
        "qemu": Plugin([]),
        "tiny": Plugin([CheckResult("tiny", True, "/bin/tiny")]),
        "fire": Plugin([CheckResult("fire", False, "no fire", "light it")]),
    }
    found = world.look()
    assert found["also tiny"] == Finding(Level.OK, "also tiny", "could run here")
    assert found["also fire"] == Finding(Level.WARN, "also fire", "not here: no fire", "light it")
    assert "also qemu" not in found


def test_a_plugin_whose_check_fails_is_one_line(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Plugin):
        def check(self) -> list[CheckResult]:
            raise RuntimeError("oops")

    world.plugins = {"acme": Broken([])}
    monkeypatch.setattr(check, "broken_plugins", lambda: {"worse": "ImportError: no module"})
    found = world.look()
    assert found["also acme"].text == "its own check failed: RuntimeError('oops')"
    assert found["also worse"].text == "installed, but cannot be loaded: ImportError: no module"
    assert {found["also acme"].level, found["also worse"].level} == {Level.WARN}


def test_a_bad_configuration_fails_and_the_rest_is_looked_at_all_the_same(world: World) -> None:
    world.write("kernal = 1\n")
    found = world.look()
    assert found["config"].level is Level.FAIL
    assert 'the nearest is "kernel"' in found["config"].text
    assert found["cgroup"].level is Level.OK


def test_a_guest_that_is_not_named_or_empty(world: World) -> None:
    world.write("")
    assert world.look()["guest"].level is Level.FAIL
    (world.root / "image").write_bytes(b"")
    world.write(f'kernel = "{world.root}/vmlinux"\nimage = "{world.root}/image"\n')
    found = world.look()
    assert "guest" not in found
    assert (found["image"].level, found["image"].hint) == (Level.FAIL, "build the guest again: `make guest`")


def test_vsock_by_the_daemon_where_the_kernel_has_none(world: World) -> None:
    (world.root / "dev/vhost-vsock").unlink()
    found = world.look()["vsock"]
    assert found.level is Level.OK
    assert "bin/vsockd serves instead" in found.text
    world.write(f'kernel = "{world.root}/vmlinux"\nimage = "{world.root}/image"\n')
    path = os.environ["PATH"]
    os.environ["PATH"] = str(world.root / "nothing")
    try:
        missing = world.look()["vsock"]
    finally:
        os.environ["PATH"] = path
    assert missing.level is Level.FAIL
    assert "vhost-device-vsock" in missing.hint


def test_virtiofsd_is_not_needed_without_a_shared_file_system(world: World) -> None:
    world.write(f'shared_fs = "none"\nkernel = "{world.root}/vmlinux"\nimage = "{world.root}/image"\n')
    assert "not needed" in world.look()["virtiofsd"].text


def test_what_a_vmm_has_itself_is_not_looked_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vsock of its own needs neither kernel nor daemon; who shares no directories needs no virtiofsd."""
    (world.root / "dev/vhost-vsock").unlink()
    for name in ("vsockd", "virtiofsd"):
        (world.root / "bin" / name).unlink()
    world.write(f'kernel = "{world.root}/vmlinux"\nimage = "{world.root}/image"\n')
    monkeypatch.setenv("PATH", str(world.root / "nothing"))
    assert world.look()["vsock"].level is Level.FAIL
    monkeypatch.setattr(Plugin, "capabilities", Capabilities(own_vsock=True), raising=False)
    found = world.look()
    assert [found[name].level for name in ("vsock", "virtiofsd")] == [Level.OK, Level.OK]
    assert "the VMM has its own" in found["vsock"].text


def test_what_the_plugin_finds(world: World) -> None:
    world.results = [
        CheckResult("accelerator", True, "tcg: /dev/kvm does not open"),
        CheckResult("firmware", False, "missing", "install it"),
        CheckResult("virtiofsd", False, "not where the plugin looks", "the configuration knows better"),
    ]
    found = world.look()
    assert found["accelerator"].level is Level.WARN
    assert found["firmware"] == Finding(Level.FAIL, "firmware", "missing", "install it")
    assert found["virtiofsd"].level is Level.OK


def test_an_unknown_hypervisor_is_one_failure(world: World) -> None:
    def refuse(name: str) -> Any:
        raise ConfigError("there is no hypervisor", hint="install it")

    found = findings(str(world.config), host=world.host(), get_plugin=refuse, plugins={})
    assert {each.name for each in found if each.level is Level.FAIL} == {"config", "qemu"}


@pytest.mark.parametrize(
    ("entries", "level", "text"),
    [
        (
            ["memory", "pids", "cpu,cpuacct", "unified"],
            Level.OK,
            "version 1, with version 2 beside it (hybrid)",
        ),
        (["memory", "cpu", "pids"], Level.OK, "version 1"),
        (["memory", "cpu"], Level.WARN, "version 1; without pids: what pods may have of it is not limited"),
        ([], Level.FAIL, "nothing is mounted"),
    ],
)
def test_cgroup_modes(world: World, entries: list[str], level: Level, text: str) -> None:
    (world.root / "sys/fs/cgroup/cgroup.controllers").unlink()
    for entry in entries:
        (world.root / "sys/fs/cgroup" / entry).mkdir()
    found = world.look()["cgroup"]
    assert found.level is level
    assert found.text.startswith(text)


def test_cgroups_of_version_2(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (world.look()["cgroup"].level, world.look()["cgroup"].text) == (Level.OK, "version 2 (unified)")
    (world.root / "sys/fs/cgroup/cgroup.controllers").write_text("cpu pids\n")
    found = world.look()["cgroup"]
    assert found.level is Level.WARN
    assert found.text.startswith("version 2 (unified); without memory: ")
    assert "cgroup_enable=memory" in found.hint
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "cgroup" not in str(path) and access(path, mode))
    found = world.look()["cgroup"]
    assert found.level is Level.WARN
    assert "cannot be written: pods are charged to containerd's cgroup" in found.text


def test_users_that_somebody_has_are_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """By /etc/passwd and by /etc/subuid; and without the program that confines nothing can be started."""
    (world.root / "etc").mkdir(exist_ok=True)
    (world.root / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nodd\nx:y:z\n")
    (world.root / "etc/subuid").write_text("alice:100000:65536\n")
    found = world.look()["confine"]
    assert (found.level, found.text) == (Level.OK, "each sandbox has a user of 2000000000-2000065535")
    (world.root / "etc/passwd").write_text("bob:x:2000000007:5::/:/bin/sh\n")
    (world.root / "etc/subuid").write_text("alice:1999999999:2\n")
    found = world.look()["confine"]
    assert (found.level, found.text) == (Level.WARN, "users 2000000000-2000065535 are bob, alice's too")
    assert "rootless_users" in found.hint
    monkeypatch.setattr("devices.confine.HELPER", "/nope/kata-confine")
    found = world.look()["confine"]
    assert (found.level, found.hint) == (Level.FAIL, "make setup")


@pytest.mark.parametrize(
    ("line", "level", "hint"),
    [
        ("1 0 8:1 / / rw shared:1 - ext4 /dev/root rw", Level.OK, ""),
        ("1 0 8:1 / / rw master:1 shared:2 - ext4 /dev/root rw", Level.OK, ""),
        ("1 0 8:1 / / rw - ext4 /dev/root rw", Level.WARN, "make-rshared /"),
        ("1 0 8:1 / / rw master:7 - ext4 /dev/root rw", Level.WARN, "make-rshared /"),
        ("1 0 8:1 / /run rw shared:1 - tmpfs run rw", Level.FAIL, "mount --bind ROOT ROOT"),
        ("garbage", Level.FAIL, "mount --bind ROOT ROOT"),
    ],
)
def test_how_the_root_is_mounted(world: World, line: str, level: Level, hint: str) -> None:
    """A chroot that is no mount point cannot do it; one that is not shared misses later mounts."""
    world.mounts(line)
    found = world.look()["mounts"]

    assert found.level is level
    assert hint in found.hint


def test_memory_below_what_a_vm_takes(world: World) -> None:
    (world.root / "proc/meminfo").write_text("MemAvailable: 32768 kB\n")
    found = world.look()["memory"]
    assert (found.level, found.text) == (Level.WARN, "32 MiB available, and a VM may take 64")
    (world.root / "proc/meminfo").write_text("nothing\n")
    assert world.look()["memory"].level is Level.WARN


def test_a_shim_that_is_not_installed(world: World) -> None:
    (world.root / "bin/containerd-shim-kata-v2").unlink()
    assert world.look()["shim"].level is Level.WARN


def test_the_exit_code_and_the_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [Finding(Level.OK, "a", "fine"), Finding(Level.WARN, "bb", "so so", "do this")]
    monkeypatch.setattr(check, "findings", lambda _: lines)
    assert check.run() == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok    a   fine",
        "warn  bb  so so",
        "          -> do this",
        "",
        "This host can run it (1 to know).",
    ]
    lines.append(Finding(Level.FAIL, "c", "bad"))
    assert check.run() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 failed, 1 to know"
    assert check.run(as_json=True) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    assert told["findings"][1] == {"level": "warn", "name": "bb", "text": "so so", "hint": "do this"}


def test_a_remote_hypervisor_needs_its_service_and_nothing_of_this_host(world: World) -> None:
    """Neither kernel nor KVM nor memory; the service is asked where the configuration has it."""
    socket = world.root / "hypervisor.sock"
    world.config.write_text(f'[hypervisor.remote]\nremote_hypervisor_socket = "{socket}"\n')
    (world.root / "dev/kvm").unlink()
    (world.root / "proc/meminfo").write_text("MemTotal: 4096 kB\nMemAvailable: 2048 kB\n")
    found = findings(str(world.config), host=world.host(), get_plugin=lambda _: RemotePlugin(), plugins={})
    by_name = {each.name: each for each in found}
    assert [each.name for each in found if each.level is Level.FAIL] == ["remote"]
    assert str(socket) in by_name["remote"].text
    assert "cloud-api-adaptor" in by_name["remote"].hint
    for name in ("guest", "kvm", "vsock", "virtiofsd", "memory"):
        assert by_name[name].level is Level.OK, by_name[name]
