"""`python -m guest.build`: kernel, initramfs and root image from Debian packages, cached by their inputs.

What: five stages, each a directory below OUT/cache named by the hash of all that goes into it: unpacked
packages, kernel, compiled Python, compiled agent; then the image. OUT gets vmlinux, vmlinux.acpi (the
same with ACPI tables), initrd.img, rootfs.img and manifest.json.
Why stages: a change of the agent alone rebuilds in seconds; nothing changed is noticed in half a second.
Invariants: equal inputs give equal files, byte for byte, wherever and whenever they are built; OUT never
holds a mixture of two builds that the manifest calls complete; only the building of one OUT at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from devices.errors import KataError

from . import contents, cpio, debian
from .acpi import with_tables
from .bundle import make_bundles
from .image import write_ext4
from .kernel import ModuleTree, extract_vmlinux, kernel_files
from .tools import run_tool

__all__ = ["OUTPUTS", "build", "main"]

OUTPUTS = ("vmlinux", "vmlinux.acpi", "initrd.img", "rootfs.img")
FORMAT = 1  # of the manifest
# The time of every file in the guest: like SOURCE_DATE_EPOCH, but nothing here depends on its value.
EPOCH = 1_767_225_600  # 2026-01-01
_REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_STUB_FLAGS = (
    *("-shared", "-fPIC", "-nostdlib", "-Os", "-Wall", "-Wextra", "-Werror", "-s"),
    *("-Wl,--build-id=none", "-Wl,-soname,libsystemd.so.0"),
)
_PRELOAD_FLAGS = (
    *("-shared", "-fPIC", "-Os", "-Wall", "-Wextra", "-Werror", "-s"),
    "-Wl,--build-id=none",
)
_BARE_FLAGS = (
    *("-static", "-nostdlib", "-ffreestanding", "-mgeneral-regs-only", "-fno-stack-protector"),
    *("-fno-asynchronous-unwind-tables", "-Os", "-Wall", "-Wextra", "-Werror", "-s"),
    *("-Wl,--build-id=none", "-Wl,-z,noseparate-code"),
)
_CFLAGS = ("-static", "-Os", "-Wall", "-Wextra", "-Werror", "-Wl,--build-id=none", "-s")


class Progress:
    """One line for each step: what, and how long it took."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Show the step while it runs and its time when it is done."""
        begin = time.monotonic()
        if not self.quiet:
            print(f"guest: {what} ... ", end="", flush=True)
        yield
        if not self.quiet:
            print(f"{time.monotonic() - begin:.1f} s", flush=True)

    def say(self, text: str) -> None:
        """Show one line."""
        if not self.quiet:
            print(f"guest: {text}", flush=True)


def _digest(*parts: object) -> str:
    """A short hash of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _file_hash(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hashes(files: Mapping[str, str]) -> dict[str, str]:
    return {name: _file_hash(path) for name, path in sorted(files.items())}


def _tool_version(*argv: str) -> str:
    """The first line of what a tool says of its version: tools are inputs too."""
    return run_tool(list(argv)).strip().partition("\n")[0]


class Builder:
    """One build into one directory. Stages are methods that return the directory of their result."""

    def __init__(self, out: str, repository: str, progress: Progress, *, release: str, kernel: str) -> None:
        self.out = out
        self.cache = os.path.join(out, "cache")
        self.repository = repository
        self.progress = progress
        self.release, self.kernel_suite = _own(release), _own(kernel) or _own(release)
        own = os.path.dirname(os.path.abspath(__file__))
        self.own = _hashes(
            {
                name: os.path.join(own, name)
                for name in os.listdir(own)
                if name.endswith((".py", ".c", ".map")) and name != "boot.py"
            }
        )
        self.kernel_release, self.kernel_versions, self.user_versions = self._ask_apt()
        self.versions = {**self.user_versions, **self.kernel_versions}
        self.agent_files = contents.agent_sources(repository)
        self.protobuf_files = contents.protobuf_files()
        self.tools = {
            "gcc": _tool_version("gcc", "--version"),
            "strip": _tool_version("strip", "--version"),
            "mkfs.ext4": _tool_version("mkfs.ext4", "-V"),
        }
        self.keys = {
            "packages": _digest(self.versions, self.own["debian.py"]),
            "kernel": _digest(self.kernel_versions, self.own, self.tools),
            "python": _digest(self.user_versions, self.own, _hashes(self.protobuf_files)),
            "agent": _digest(
                self.user_versions, self.own, _hashes(self.protobuf_files), _hashes(self.agent_files)
            ),
        }
        self.key = _digest(FORMAT, self.keys, EPOCH)

    def _ask_apt(self) -> tuple[str, dict[str, str], dict[str, str]]:
        """The kernel's release, the versions of its packages, those of all others. apt takes a second to
        say so: its answer is kept, as long as it is the same question, asked by the same code."""
        memory = os.path.join(self.cache, "apt.json")
        apts = {suite: debian.Apt(suite) for suite in (self.release, self.kernel_suite)}
        for suite, apt in apts.items():
            if suite:
                with self.progress.step(f"lists of {suite}"):
                    apt.refresh()
        question = _digest([(suite, apt.state()) for suite, apt in apts.items()], self.own)
        try:
            with open(memory, encoding="utf-8") as stream:
                asked, kernel, of_kernel, of_user = json.load(stream)
            if asked == question:
                return str(kernel), dict(of_kernel), dict(of_user)
        except (OSError, ValueError, TypeError):
            pass
        user_apt, kernel_apt = apts[self.release], apts[self.kernel_suite]
        kernel, names = debian.kernel_packages(kernel_apt, contents.KERNEL_META)
        of_kernel = kernel_apt.candidates(names)
        of_user = user_apt.candidates(user_apt.closure(contents.PACKAGES, contents.is_wanted))
        os.makedirs(self.cache, exist_ok=True)
        _write(memory, json.dumps([question, kernel, of_kernel, of_user]).encode())
        return kernel, of_kernel, of_user

    # ---- what is there already ---------------------------------------------------------------

    def up_to_date(self) -> bool:
        """True if OUT holds the complete result of exactly these inputs."""
        try:
            with open(os.path.join(self.out, "manifest.json"), encoding="utf-8") as stream:
                manifest = json.load(stream)
            if manifest["inputs"] != self.key:
                return False
            return all(
                os.stat(os.path.join(self.out, name)).st_size == manifest["files"][name]["bytes"]
                for name in OUTPUTS
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _stage(self, name: str, what: str, make: Callable[[str], None]) -> str:
        """The stage's directory, made by `make(directory)` unless it is there."""
        final = os.path.join(self.cache, f"{name}-{self.keys[name]}")
        if not os.path.isdir(final):
            with self.progress.step(what):
                scratch = f"{final}.new"
                shutil.rmtree(scratch, ignore_errors=True)
                os.makedirs(scratch)
                make(scratch)
                os.replace(scratch, final)
            for other in os.listdir(self.cache):
                if other.startswith(f"{name}-") and os.path.join(self.cache, other) != final:
                    shutil.rmtree(os.path.join(self.cache, other), ignore_errors=True)
        return final

    # ---- stages ------------------------------------------------------------------------------

    def packages(self) -> str:
        """Debian's packages, unpacked: the directory is a root."""
        store = os.path.join(self.out, "debs")
        with self.progress.step(f"download {len(self.versions)} packages"):
            debian.Apt(self.release).download(self.user_versions, store)
            debian.Apt(self.kernel_suite).download(self.kernel_versions, store)
        return self._stage("packages", "unpack", lambda root: debian.unpack(self.versions, store, root))

    def kernel(self, root: str) -> str:
        """vmlinux, the initramfs with init and its modules, and what else is compiled from C."""
        image, folder = kernel_files(root, self.kernel_release)

        def make(directory: str) -> None:
            with open(image, "rb") as stream:
                vmlinux = extract_vmlinux(stream.read())
            _write(f"{directory}/vmlinux", vmlinux)
            _write(f"{directory}/vmlinux.acpi", with_tables(vmlinux))
            init = f"{directory}/init"
            own = os.path.dirname(os.path.abspath(__file__))
            run_tool(["gcc", *_CFLAGS, "-o", init, f"{own}/init.c"])
            script = f"-Wl,--version-script={own}/nosystemd.map"
            stub = f"{directory}/{contents.SYSTEMD_STUB}"
            run_tool(["gcc", *_STUB_FLAGS, script, "-o", stub, f"{own}/nosystemd.c"])
            preload = f"{directory}/{contents.ENVIRONMENT}"
            run_tool(["gcc", *_PRELOAD_FLAGS, "-o", preload, f"{own}/environment.c"])
            for program in ("pause", contents.ENTER):
                run_tool(["gcc", *_BARE_FLAGS, "-o", f"{directory}/{program}", f"{own}/{program}.c"])
            modules = ModuleTree(folder)
            names = modules.order(contents.EARLY_MODULES)
            entries = [cpio.directory(name) for name in ("dev", "proc", "sys", "modules")]
            entries += [cpio.file(f"modules/{name}.ko", modules.stripped(name)) for name in names]
            entries.append(
                cpio.file("modules/early", "".join(f"/modules/{name}.ko\n" for name in names).encode())
            )
            with open(init, "rb") as stream:
                entries.append(cpio.file("init", stream.read(), 0o755))
            _write(f"{directory}/initrd.img", cpio.archive(entries, time=EPOCH))

        return self._stage("kernel", "kernel and initramfs", make)

    def python(self, root: str) -> str:
        """The standard library and protobuf, compiled by the guest's Python."""

        def make(directory: str) -> None:
            base = f"{root}/usr/lib/{contents.python_name(root)}"
            stdlib = {name: os.path.join(base, name) for name in contents.stdlib_files(root)}
            for part, files in (("stdlib", stdlib), ("protobuf", self.protobuf_files)):
                _compile_and_copy(root, files, os.path.join(directory, part), optimize=2)

        return self._stage("python", "compile the standard library and protobuf", make)

    def agent(self, root: str, compiled: str) -> str:
        """Our agent and what it imports of this repository, compiled."""

        def make(directory: str) -> None:
            _compile_and_copy(root, self.agent_files, directory, optimize=0)
            os.mkdir(f"{directory}/bundles")
            make_bundles(root, contents.places(root, compiled, directory), f"{directory}/bundles")

        return self._stage("agent", "compile and bundle the agent", make)

    def run(self) -> dict[str, Any]:
        """Build all; return the manifest."""
        os.makedirs(self.cache, exist_ok=True)
        root = self.packages()
        kernel = self.kernel(root)
        compiled = self.python(root)
        agent = self.agent(root, compiled)
        work = os.path.join(self.cache, "out.new")
        shutil.rmtree(work, ignore_errors=True)
        os.makedirs(work)
        with self.progress.step("root image"):
            _, folder = kernel_files(root, self.kernel_release)
            modules = ModuleTree(folder)
            tree = contents.assemble(root, modules, compiled, agent, kernel)
            write_ext4(tree, f"{work}/rootfs.img", time=EPOCH)
        for name in ("vmlinux", "vmlinux.acpi", "initrd.img"):
            shutil.copyfile(f"{kernel}/{name}", f"{work}/{name}")
        manifest = {
            "format": FORMAT,
            "inputs": self.key,
            "kernel": self.kernel_release,
            "packages": self.versions,
            "tools": self.tools,
            "files": {
                name: {"sha256": _file_hash(f"{work}/{name}"), "bytes": os.path.getsize(f"{work}/{name}")}
                for name in OUTPUTS
            },
        }
        # While files are replaced there is no manifest, so a build that is cut short is not complete.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.out, "manifest.json"))
        for name in OUTPUTS:
            os.replace(f"{work}/{name}", os.path.join(self.out, name))
        _write(f"{work}/manifest.json", json.dumps(manifest, indent=2, sort_keys=True).encode() + b"\n")
        os.replace(f"{work}/manifest.json", os.path.join(self.out, "manifest.json"))
        shutil.rmtree(work)
        return manifest


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(data)


def _compile_and_copy(root: str, files: Mapping[str, str], target: str, *, optimize: int) -> None:
    """Sources become bytecode, extension modules stay as they are."""
    sources = {name: path for name, path in files.items() if name.endswith(".py")}
    contents.compile_python(root, sources, target, optimize=optimize)
    for name in files.keys() - sources.keys():
        os.makedirs(os.path.dirname(os.path.join(target, name)), exist_ok=True)
        shutil.copyfile(files[name], os.path.join(target, name))


def _own(suite: str) -> str:
    """The suite, or "" if it is this host's own: that has its lists already."""
    return "" if suite == debian.host_suite() else suite


def build(
    out: str,
    *,
    force: bool = False,
    repository: str = _REPOSITORY,
    quiet: bool = False,
    release: str = "",
    kernel: str = "",
) -> dict[str, Any]:
    """Bring `out` up to date; return the manifest. `repository` is where agent/, ttrpc/, proto/ lie.

    `release`: the Debian suite whose packages the guest is made of, "" for the host's own; `kernel`: the one
    of its kernel, "" for the same. `force` forgets the cache (but not downloaded packages).
    Raises `devices.errors.HostError`.
    """
    progress = Progress(quiet)
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, ".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if force:
            shutil.rmtree(os.path.join(out, "cache"), ignore_errors=True)
        builder = Builder(
            os.path.abspath(out), os.path.abspath(repository), progress, release=release, kernel=kernel
        )
        if not force and builder.up_to_date():
            progress.say(f"{out} is up to date")
            with open(os.path.join(out, "manifest.json"), encoding="utf-8") as stream:
                return dict(json.load(stream))
        begin = time.monotonic()
        manifest = builder.run()
        sizes = ", ".join(f"{name} {manifest['files'][name]['bytes'] / 2**20:.1f} MiB" for name in OUTPUTS)
        progress.say(f"{out}: {sizes}; {time.monotonic() - begin:.1f} s")
        return manifest


def main(arguments: Iterable[str] | None = None) -> int:
    """The command line. Exit code 1 and one paragraph on stderr if the guest cannot be built."""
    parser = argparse.ArgumentParser(
        prog="python -m guest.build", description="Build the guest's kernel and image."
    )
    parser.add_argument("--out", default="build/guest", help="where the files go (default: %(default)s)")
    parser.add_argument(
        "--force", action="store_true", help="build everything anew, from downloaded packages"
    )
    parser.add_argument(
        "--repository", default=_REPOSITORY, help="where agent/, ttrpc/ and proto/ are taken from"
    )
    parser.add_argument(
        "--release",
        default="",
        help="the Debian release of its packages, such as trixie (default: the host's)",
    )
    parser.add_argument("--kernel", default="", help="that of its kernel (default: the same)")
    options = parser.parse_args(None if arguments is None else list(arguments))
    try:
        build(
            options.out,
            force=options.force,
            repository=options.repository,
            release=options.release,
            kernel=options.kernel,
        )
    except KataError as error:
        print(f"\nguest: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
