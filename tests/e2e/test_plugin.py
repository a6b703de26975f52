"""Somebody else's VMM, and several runtime classes in one containerd.

docs/example-plugin is installed where its user would install it, beside kata-shim and not into it; nothing
in this repository knows it. Its runtime class runs next to QEMU's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testing.containerd import Containerd
from testing.guest import PROJECT, write_configuration

BUSYBOX = "local/busybox:1"
TINY = "io.containerd.kata-tiny.v2"
QEMU = "io.containerd.kata-qemu.v2"

pytestmark = pytest.mark.kata_only


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the example plugin installed by pip, as from a package index."""
    directory = tmp_path_factory.mktemp("plugin")
    source = directory / "source"
    shutil.copytree(PROJECT / "docs" / "example-plugin", source)
    target = directory / "site"
    _install(source, target)
    return target


def _install(source: Path, target: Path) -> None:
    """By pip, into a directory of its own, without the network."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    options = ["--no-build-isolation", "--target", str(target)]
    subprocess.run([*pip, *options, str(source)], check=True, timeout=120)


@pytest.fixture(scope="module")
def classes(containerd: Containerd, site: Path) -> Iterator[None]:
    """Two more runtimes: `kata-tiny`, whose program finds the plugin, and `kata-qemu`, a mere link."""
    programs = containerd.root / "bin"
    tiny = programs / "containerd-shim-kata-tiny-v2"
    script = [sys.executable, "-m", "shim.launch.launcher_script", str(tiny), "--path", str(site)]
    subprocess.run(script, check=True, cwd=PROJECT, timeout=60)
    link = programs / "containerd-shim-kata-qemu-v2"
    link.symlink_to("containerd-shim-kata-v2")
    qemu_file = write_configuration(containerd.root / "configuration-qemu.toml")
    text = qemu_file.read_text()
    tiny_file = containerd.root / "configuration-tiny.toml"
    tiny_file.write_text(text.replace("[hypervisor.qemu]", "[hypervisor.tiny]").replace('"qemu"', '"tiny"'))
    yield
    for path in (tiny, link, qemu_file, tiny_file):
        path.unlink()


def test_a_container_runs_under_somebody_elses_vmm(
    containerd: Containerd, classes: None, no_leaks: Callable[[], None]
) -> None:
    script = "echo out; echo err >&2; exit 7"
    done = containerd.run(BUSYBOX, "sh", "-c", script, runtime=TINY, check=False)
    assert (done.code, done.out, done.err) == (7, b"out\n", b"err\n")


def test_two_classes_run_side_by_side(
    containerd: Containerd, classes: None, no_leaks: Callable[[], None]
) -> None:
    """Each class has its own VMM at the same time; the plain runtime keeps its configuration."""
    names = {runtime: containerd.new_id("class") for runtime in (TINY, QEMU)}
    for runtime, name in names.items():
        containerd.ctr("run", "--detach", "--runtime", runtime, BUSYBOX, name, "sleep", "100000")
    command_lines = {}
    for line in containerd.ctr("task", "ls").text.splitlines()[1:]:
        name, pid, _status = line.split()
        command_lines[name] = Path(f"/proc/{pid}/cmdline").read_bytes()
    assert f"tiny-{names[TINY]}".encode() in command_lines[names[TINY]]
    assert f"sandbox-{names[QEMU]}".encode() in command_lines[names[QEMU]]
    done = containerd.ctr("task", "exec", "--exec-id", "e", names[TINY], "sh", "-c", "exit 3", check=False)
    assert done.code == 3
    _kill_and_wait(containerd, names[TINY])
    for name in names.values():
        containerd.remove(name)


def _kill_and_wait(containerd: Containerd, name: str) -> None:
    """The VMM of one pod dies: its task ends, and the other pod's does not."""

    def tasks() -> dict[str, list[str]]:
        lines = containerd.ctr("task", "ls").text.splitlines()[1:]
        return {line.split()[0]: line.split() for line in lines}

    before = tasks()
    os.kill(int(before[name][1]), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while tasks()[name][2] != "STOPPED":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    others = {task: fields for task, fields in before.items() if task != name}
    assert {task: fields for task, fields in tasks().items() if task != name} == others


def test_a_class_without_its_file_is_refused(containerd: Containerd, classes: None) -> None:
    """It never runs as something else: not with $KATA_CONF_FILE, which is for the plain runtime."""
    link = containerd.root / "bin" / "containerd-shim-kata-nothing-v2"
    link.symlink_to("containerd-shim-kata-v2")
    done = containerd.run(BUSYBOX, "true", runtime="io.containerd.kata-nothing.v2", check=False)
    assert done.code != 0
    assert 'no configuration file for the runtime class "nothing"' in done.error
    assert f"{containerd.root}/configuration-nothing.toml" in done.error


def test_the_suite_runs_without_the_checkout(site: Path, tmp_path: Path) -> None:
    """`kata-ctl conformance`, with kata-shim installed from its sources and the plugin beside it."""
    sources = tmp_path / "sources"
    unwanted = shutil.ignore_patterns("build", "tests", "docs", ".*", "__pycache__", "*.egg-info")
    shutil.copytree(PROJECT, sources, ignore=unwanted)
    target = tmp_path / "installed"
    _install(sources, target)
    shutil.rmtree(sources)
    file = write_configuration(tmp_path / "configuration-tiny.toml")
    text = file.read_text().replace("[hypervisor.qemu]", "[hypervisor.tiny]").replace('"qemu"', '"tiny"')
    file.write_text(text)
    words = [sys.executable, "-m", "ctl", "conformance", "tiny", "--config", str(file)]
    few = "check_asks or vcpus_it_was or address or killed"
    done = subprocess.run(
        [*words, "-k", few],
        env={**os.environ, "PYTHONPATH": f"{target}:{site}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout
    assert f"rootdir: {target}/conformance" in done.stdout
