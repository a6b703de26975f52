"""What is in the guest: the packages, the modules, the parts of Python, the skeleton of /etc.

What: the tables that decide, and `assemble`, which turns unpacked packages and our sources into the
image's tree.
Why: one place to read for "is X in the guest, and why"; docs/guest.md explains the choices.
Invariants: each library that any program in the image is linked to is in the image (checked, not
hoped); nothing of the building machine enters except through packages, protobuf and our sources.
"""

from __future__ import annotations

import marshal
import os
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from devices.errors import HostError

from .elf import MAGIC, Elf
from .image import Tree
from .kernel import ModuleTree
from .module_list import for_workloads

__all__ = [
    "EARLY_MODULES",
    "ENTER",
    "ENVIRONMENT",
    "KERNEL_META",
    "LATE_MODULES",
    "PACKAGES",
    "assemble",
    "compile_python",
    "is_wanted",
    "protobuf_files",
    "python_name",
]

KERNEL_META = "linux-image-cloud-amd64"

PACKAGES = (
    "python3-minimal",
    "libpython3-stdlib",
    "crun",
    "busybox-static",
    "e2fsprogs",
    # What protobuf's extension module is linked to:
    "libgcc-s1",
    "libstdc++6",
)
"""What the guest is made of. What these depend on comes along, as far as `is_wanted` says so."""

# Libraries of parts that the image does not have: of excluded modules of Python (_NO_STDLIB), of e2fsprogs'
# other programs; and libsystemd, for which nosystemd.c stands in.
_NO_LIBRARY = re.compile(
    r"lib(ssl3|db5\.3|ncursesw6|readline8|sqlite3-0|tinfo6|tirpc3|nsl2|bz2-1\.0|crypt1|ss2|systemd0|zstd1)(t64)?"
)

# In the initramfs: without these there is no root disk, no agent channel and no shared directory.
EARLY_MODULES = ("virtio_pci", "virtio_mmio", "virtio_blk", "vmw_vsock_virtio_transport", "virtiofs")
# In the image, loaded while the agent starts.
LATE_MODULES = ("overlay", "virtio_net", "virtio_console", "virtio_balloon", "virtio_rng", "virtio_mem")
# In the image, loaded by the kernel or the agent when something asks for them.
OTHER_MODULES = (
    "erofs",
    "squashfs",
    "xfs",
    "loop",
    "tun",
    "veth",
    "bridge",
    "virtio_scsi",
    "sd_mod",
    "virtio_pmem",
    "nd_pmem",
    "nfit",
    "vfio_pci",
    "vfio_iommu_type1",
)

# Not in the image: tools, tests, GUIs, and what needs libraries that are not worth their size.
_NO_STDLIB = re.compile(
    r"^(test|idlelib|tkinter|ensurepip|distutils|lib2to3|pydoc_data|turtledemo|unittest|venv|sqlite3|curses|dbm"
    r"|xmlrpc|wsgiref|msilib|__phello__|_pyrepl|compression/zstd|concurrent/interpreters|config-3\.\d+.*)/"
    r"|^(pydoc|turtle|antigravity|this|__hello__|idle|ssl|cgi|cgitb|smtpd|smtplib|nntplib|ftplib|poplib|imaplib"
    r"|telnetlib|mailbox|mailcap|webbrowser|doctest|pdb|bdb|asynchat|asyncore|pickletools|sitecustomize"
    r"|_pydecimal|_(osx|aix|ios|apple|android)_support|_distutils_system_mod|sndhdr|sunau|wave|aifc|chunk|crypt|nturl2path)\.py$"
    r"|^lib-dynload/(_ssl|_hashlib|_sqlite3|_curses|_curses_panel|_dbm|readline|nis|ossaudiodev|audioop|_crypt|_bz2"
    r"|_zstd|_interp\w+|_remote_debugging|_codecs_\w+|_multibytecodec|_uuid|_lsprof|_test\w*|_ctypes_test|_xx\w*|xx\w*)\.cpython"
)

_AGENT_PACKAGES = ("agent", "ttrpc")
_AGENT_PROTO = (
    *("__init__", "capabilities", "agent_pb2", "oci_pb2", "types_pb2", "csi_pb2", "health_pb2"),
    *("recovery_pb2", "loopback_pb2"),
)

_PROTOBUF = "/usr/lib/kata-agent"
_LIBRARIES = "/usr/lib/x86_64-linux-gnu"
_PAUSE = "/usr/lib/kata-agent/pause"  # the root file system of a pod's own container (agent/pause.py)
SYSTEMD_STUB = "libsystemd.so.0"
ENTER = "enter"  # what makes an exec (agent/enter.py)
ENVIRONMENT = "environment.so"  # what the agent preloads into some runs of crun
_NOT_APPLETS = frozenset({"init", "linuxrc", "busybox", "reboot", "poweroff", "halt"})

_INIT = """\
#!/usr/bin/{python} -ISB
import sys

sys.path.append("/usr/lib/kata-agent")

import quickstart

quickstart.install("/usr/lib/kata-agent/bundles")

from agent.main import main

sys.exit(main())
"""

_ETC = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "hostname": "kata-guest\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "os-release": 'NAME="kata-shim guest"\nID=kata-shim\nID_LIKE=debian\nVERSION_ID=12\n',
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "profile": "export PS1='guest# '\n",
}


_COMPILER = """\
import marshal, os, py_compile, sys
target, optimize, sources = marshal.loads(sys.stdin.buffer.read())
for name, source in sorted(sources.items()):
    out = os.path.join(target, name + "c")
    os.makedirs(os.path.dirname(out), exist_ok=True)
    py_compile.compile(source, out, "/" + name, True, optimize,
                       py_compile.PycInvalidationMode.UNCHECKED_HASH, quiet=1)
"""


def is_wanted(package: str) -> bool:
    """Whether a package that one of PACKAGES depends on goes into the build."""
    if package.startswith(("lib", "zlib")):
        return not _NO_LIBRARY.fullmatch(package)
    return re.fullmatch(r"python3\.\d+-minimal", package) is not None


def python_name(root: str) -> str:
    """What the guest's Python is called, such as "python3.13". Raises `HostError`."""
    found = [name for name in os.listdir(f"{root}/usr/bin") if re.fullmatch(r"python3\.\d+", name)]
    if len(found) != 1:
        raise HostError(f"the guest's packages have {len(found)} Pythons, not one", phase="guest build")
    return found[0]


def protobuf_files() -> dict[str, str]:
    """The files of the installed protobuf that the guest needs: path below sys.path -> path here.

    The installed one, because its version matches the modules that protoc generated here; its
    extension module speaks Python's stable ABI and so runs under the guest's Python too.
    """
    found = {}
    for item in metadata.distribution("protobuf").files or ():
        name = str(item)
        if name.endswith((".py", ".so")) and not name.startswith(("google/protobuf/compiler/", "..")):
            found[name] = str(item.locate())
    if not any(name.endswith(".abi3.so") for name in found):
        raise HostError(
            "the installed protobuf has no upb extension module for the stable ABI",
            phase="guest build",
            hint="install the wheel: pip install --force-reinstall --only-binary :all: protobuf",
        )
    return found


def stdlib_files(root: str) -> list[str]:
    """The files of Python's standard library that the image has, below `usr/lib/python3.*`."""
    base, kept = f"{root}/usr/lib/{python_name(root)}", []
    for folder, _, names in os.walk(base):
        for name in names:
            path = os.path.relpath(os.path.join(folder, name), base)
            if path.endswith((".py", ".so")) and not _NO_STDLIB.search(path):
                kept.append(path)
    return sorted(kept)


def compile_python(root: str, sources: dict[str, str], target: str, *, optimize: int) -> None:
    """Compile files (name -> source path) with the guest's own Python into `target`, as `name` + "c".

    Hash-based and unchecked: no time enters the file, and the guest never looks for the source.
    Raises `HostError` with the compiler's message.
    """
    os.makedirs(target, exist_ok=True)
    run_guest_python(root, _COMPILER, (target, optimize, sources), "compile Python modules")


def run_guest_python(root: str, program: str, argument: tuple[Any, ...], what: str) -> None:
    """Run a program in the guest's Python here; it finds `argument` marshalled on its stdin.

    Raises `HostError` with its last words.
    """
    done = subprocess.run(
        [*guest_python(root), "-S", "-c", program],
        # Format 4 is the guest's, whatever this Python's is.
        input=marshal.dumps(argument, 4),
        capture_output=True,
        check=False,
        env={
            "PYTHONHOME": f"{root}/usr",
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            # Lines in tracebacks are enough; columns would be a fifth of the code.
            "PYTHONNODEBUGRANGES": "1",
            "LC_ALL": "C.UTF-8",
        },
    )
    if done.returncode != 0:
        words = done.stderr.decode("utf-8", "replace").strip()[-400:]
        raise HostError(f"the guest's Python cannot {what}: {words}", phase="guest build")


def guest_python(root: str) -> list[str]:
    """How to run the unpacked Python here: by its own loader and libraries, whatever the host has."""
    libraries = f"{root}/lib/x86_64-linux-gnu:{root}{_LIBRARIES}"
    return [
        f"{root}/lib64/ld-linux-x86-64.so.2",
        "--library-path",
        libraries,
        f"{root}/usr/bin/{python_name(root)}",
    ]


def agent_sources(repository: str) -> dict[str, str]:
    """Our own modules in the image: path below sys.path -> path here."""
    found = {}
    for package in _AGENT_PACKAGES:
        base = os.path.join(repository, package)
        for folder, _, names in os.walk(base):
            for name in names:
                if name.endswith(".py"):
                    path = os.path.join(folder, name)
                    found[os.path.relpath(path, repository)] = path
    found["quickstart.py"] = os.path.join(
        os.path.dirname(os.path.abspath(__file__)), "runtime", "quickstart.py"
    )
    for module in _AGENT_PROTO:
        found[f"proto/{module}.py"] = os.path.join(repository, "proto", f"{module}.py")
    missing = [name for name in ("agent/main.py", *found) if not os.path.exists(found.get(name, ""))]
    if missing:
        raise HostError(
            f"{repository} lacks {missing[0]}, which is part of the guest's agent", phase="guest build"
        )
    return found


def places(root: str, compiled: str, agent: str) -> dict[str, str]:
    """The directories on the agent's sys.path: where they are here -> where they are in the guest."""
    python = f"/usr/lib/{python_name(root)}"
    return {
        f"{compiled}/stdlib": python,
        f"{compiled}/stdlib/lib-dynload": f"{python}/lib-dynload",
        f"{compiled}/protobuf": _PROTOBUF,
        agent: _PROTOBUF,
    }


def assemble(root: str, modules: ModuleTree, compiled: str, agent: str, native: str) -> Tree:
    """The image's tree.

    `root`: unpacked packages; `compiled`: the directory with compiled stdlib and protobuf; `agent`: the
    directory with the compiled agent; `native`: the directory with what is compiled from C: the pause
    (pause.c), what makes execs (enter.c), what stands in for libsystemd (nosystemd.c), and a faster putenv
    (environment.c). Raises `HostError` if a library is missing.
    """
    tree = Tree()
    for path in ("/dev", "/proc", "/sys", "/run", "/mnt", "/usr/bin", "/usr/lib64", "/var/lib"):
        tree.directory(path)
    tree.directory("/tmp", 0o1777)
    tree.directory("/root", 0o700)
    for path, target in (
        ("/bin", "usr/bin"),
        ("/sbin", "usr/bin"),
        ("/lib", "usr/lib"),
        ("/lib64", "usr/lib64"),
    ):
        tree.link(path, target)
    tree.link("/usr/sbin", "bin")
    tree.link("/var/run", "/run")
    tree.link("/var/tmp", "/tmp")
    for name, text in _ETC.items():
        tree.file(f"/etc/{name}", text)
    tree.link("/etc/resolv.conf", "/run/resolv.conf")
    tree.link("/etc/mtab", "/proc/self/mounts")

    busybox = f"{root}/bin/busybox"
    tree.copy(busybox, "/usr/bin/busybox", 0o755)
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in sorted(set(applets) - _NOT_APPLETS):
        tree.link(f"/usr/bin/{applet}", "busybox")
    tree.copy(f"{root}/usr/bin/crun", "/usr/bin/crun", 0o755)
    tree.copy(f"{root}/sbin/mke2fs", "/usr/bin/mke2fs", 0o755)
    tree.copy(f"{root}/etc/mke2fs.conf", "/etc/mke2fs.conf", 0o644)
    python = python_name(root)
    tree.copy(f"{root}/usr/bin/{python}", f"/usr/bin/{python}", 0o755)
    tree.link("/usr/bin/python3", python)
    for folder, prefix in (
        (f"{compiled}/stdlib", f"/usr/lib/{python}"),
        (f"{compiled}/protobuf", _PROTOBUF),
        (agent, _PROTOBUF),
    ):
        tree.copy_tree(folder, prefix)
    tree.file("/usr/bin/init", _INIT.format(python=python), 0o755)
    _add_modules(tree, modules)
    tree.copy(f"{native}/{SYSTEMD_STUB}", f"{_LIBRARIES}/{SYSTEMD_STUB}", 0o644)
    tree.copy(f"{native}/{ENVIRONMENT}", f"{_PROTOBUF}/{ENVIRONMENT}", 0o644)
    tree.copy(f"{native}/pause", f"{_PAUSE}/pause", 0o755)
    tree.copy(f"{native}/{ENTER}", f"{_PROTOBUF}/{ENTER}", 0o755)
    for name in ("dev", "proc"):  # what is mounted in it
        tree.directory(f"{_PAUSE}/{name}")
    _check_stub(tree)
    _add_libraries(tree, root)
    return tree


def _add_modules(tree: Tree, modules: ModuleTree) -> None:
    base = f"/lib/modules/{os.path.basename(modules.directory)}".replace("/lib", "/usr/lib", 1)
    names = modules.order([*EARLY_MODULES, *LATE_MODULES, *OTHER_MODULES, *for_workloads(modules)])
    for name in names:
        tree.file(f"{base}/{modules.relative(name)}", modules.stripped(name))
    for name, data in modules.index(names).items():
        tree.file(f"{base}/{name}", data)
    early = set(modules.order(EARLY_MODULES))
    late = [name for name in modules.order(LATE_MODULES) if name not in early]
    lines = [f"{base}/{modules.relative(name)}\n" for name in late]
    tree.file("/usr/lib/modules/late", "".join(lines))


def _add_libraries(tree: Tree, root: str) -> None:
    """Add what the programs in the tree are linked to, and what that is linked to, and so on."""
    folders = (f"{root}/lib/x86_64-linux-gnu", root + _LIBRARIES, f"{root}/lib64")
    loader = "ld-linux-x86-64.so.2"
    tree.copy(f"{root}/lib64/{loader}", f"/usr/lib64/{loader}", 0o755)
    present = {loader, SYSTEMD_STUB}
    pending: list[tuple[str, bytes]] = [(path, node.data) for path, node in tree.nodes.items()]
    while pending:
        user, data = pending.pop()
        for name in _needed(data):
            if name in present:
                continue
            source = next(
                (f"{folder}/{name}" for folder in folders if os.path.exists(f"{folder}/{name}")), None
            )
            if source is None:
                raise HostError(
                    f"{user} needs the library {name}, which no package of the guest has",
                    phase="guest build",
                    hint="add its package to PACKAGES, or take it out of _NO_LIBRARY, in guest/contents.py",
                )
            present.add(name)
            tree.copy(source, f"{_LIBRARIES}/{name}", 0o644)
            pending.append((name, tree.nodes[f"{_LIBRARIES}/{name}"].data))


def _check_stub(tree: Tree) -> None:
    """The stand-in for libsystemd has every function that crun wants from it. Raises `HostError`."""
    _, wanted = Elf(tree.nodes["/usr/bin/crun"].data).dynamic_symbols()
    defined, _ = Elf(tree.nodes[f"{_LIBRARIES}/{SYSTEMD_STUB}"].data).dynamic_symbols()
    missing = sorted(name for name in wanted - defined if name.startswith("sd_"))
    if missing:
        raise HostError(
            f"crun wants {', '.join(missing)} from libsystemd",
            phase="guest build",
            hint="add them to guest/nosystemd.c and guest/nosystemd.map",
        )


def _needed(data: bytes) -> Iterable[str]:
    return Elf(data).needed() if data.startswith(MAGIC) else ()
