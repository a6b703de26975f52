"""From Debian's kernel package to what the VM boots: a PVH ELF kernel and a few lean modules.

What: `kernel_files` says where a package has its parts; `extract_vmlinux` finds and decompresses the ELF
kernel inside a bzImage; `ModuleTree` reads the modules of a kernel package, their dependencies and aliases.
Why: QEMU loads an ELF kernel with a PVH note directly, which skips the boot-time decompressor (0.25 s
under TCG). The module facts come from the modules, as Debian's package has no modules.dep. The guest gets
modules that are not compressed: its insmod and busybox's modprobe read no others.
Invariants: what `extract_vmlinux` returns is an ELF file that has the PVH entry note. What `modules.builtin`
names is there, without a file.

Source: Documentation/arch/x86/boot.rst (setup header, protocol 2.08+), include/xen/interface/elfnote.h,
Documentation/kbuild/kbuild.rst (modules.builtin).
"""

from __future__ import annotations

import bz2
import contextlib
import lzma
import os
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterable

from devices.errors import HostError

from .elf import Elf, ElfError
from .tools import run_tool

__all__ = ["ModuleTree", "extract_vmlinux", "kernel_files"]

_SETUP_SECTS = 0x1F1
_SETUP_MAGIC = 0x202  # "HdrS", then the protocol version
_PAYLOAD = 0x248  # offset and length of the compressed kernel, relative to the protected-mode code
_MIN_PROTOCOL = 0x208
_PVH_NOTE = ("Xen", 18)  # XEN_ELFNOTE_PHYS32_ENTRY


def kernel_files(root: str, release: str) -> tuple[str, str]:
    """(the bzImage, the directory of the modules) in unpacked packages; Debian 14 has moved the former.
    Raises `HostError`."""
    modules = f"{root}/usr/lib/modules/{release}"
    for image in (f"{root}/boot/vmlinuz-{release}", f"{modules}/vmlinuz"):
        if os.path.exists(image):
            return image, modules
    raise HostError(f"the packages of the kernel {release} hold no vmlinuz", phase="guest build")


def _filter(*argv: str) -> Callable[[bytes], bytes]:
    """A decompressor that Python 3.11 lacks, as a filter program."""

    def run(data: bytes) -> bytes:
        try:
            # The program may complain about the four bytes of length after the stream, so its exit
            # code says nothing; whether the result is a kernel is checked by the caller.
            return subprocess.run(
                argv, input=data, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
            ).stdout
        except FileNotFoundError as error:
            raise HostError(
                f"the kernel or a module is compressed with {argv[0]}, and there is no program {argv[0]}",
                phase="guest build",
                hint=f"apt-get install {argv[0]}",
            ) from error

    return run


# The kernel's scripts write these; lz4 is the legacy frame format that only its own program reads.
_DECOMPRESSORS: tuple[tuple[bytes, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", lambda data: zlib.decompressobj(wbits=31).decompress(data)),
    (b"\xfd7zXZ\0", lambda data: lzma.LZMADecompressor().decompress(data)),
    (b"\x5d\0\0", lambda data: lzma.LZMADecompressor(format=lzma.FORMAT_ALONE).decompress(data)),
    (b"BZh", lambda data: bz2.BZ2Decompressor().decompress(data)),
    (b"\x02\x21\x4c\x18", _filter("lz4", "-dc")),
    (b"\x28\xb5\x2f\xfd", _filter("zstd", "-dc")),
)


_MODULE_DECOMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".ko": lambda data: data,
    ".ko.xz": lambda data: lzma.LZMADecompressor().decompress(data),
    ".ko.zst": _filter("zstd", "-dc"),
    ".ko.gz": lambda data: zlib.decompressobj(wbits=31).decompress(data),
}


def extract_vmlinux(image: bytes) -> bytes:
    """The ELF kernel inside a bzImage (or the file itself, if it is one already).

    Raises `HostError` if the file is not a bzImage, is compressed in an unknown way, or holds a
    kernel without the PVH entry point (CONFIG_PVH).
    """
    if image[:4] == b"\x7fELF":
        return _checked(image)
    if len(image) < _PAYLOAD + 8 or image[_SETUP_MAGIC : _SETUP_MAGIC + 4] != b"HdrS":
        raise _not_a_kernel("it has no Linux boot header")
    if struct.unpack_from("<H", image, _SETUP_MAGIC + 4)[0] < _MIN_PROTOCOL:
        raise _not_a_kernel("its boot protocol is older than 2.08")
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    start = ((image[_SETUP_SECTS] or 4) + 1) * 512 + offset
    # The build appends the unpacked size in four bytes; formats with an end marker ignore them, lz4's
    # legacy format would take them for one more block.
    payload = image[start : start + length]
    for magic, decompress in _DECOMPRESSORS:
        if payload.startswith(magic):
            try:
                return _checked(decompress(payload[:-4] if magic[0] == 2 else payload))
            except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
                raise _not_a_kernel(f"its payload does not decompress: {error}") from error
    raise _not_a_kernel(f"its payload is compressed in an unknown way (magic {payload[:4].hex()})")


def _not_a_kernel(why: str) -> HostError:
    return HostError(f"cannot take a kernel out of the bzImage: {why}", phase="guest build")


def _checked(data: bytes) -> bytes:
    try:
        notes = Elf(data).notes()
    except ElfError as error:
        raise _not_a_kernel(f"its payload is no kernel: {error}") from error
    if _PVH_NOTE not in notes:
        raise _not_a_kernel("the kernel has no PVH entry point; it must be built with CONFIG_PVH=y")
    return data


class ModuleTree:
    """The modules below one `lib/modules/<release>` directory. Names use `_`, as the kernel does.

    `builtin`: those that the kernel has in itself.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.paths: dict[str, str] = {}
        for folder, _, names in os.walk(directory):
            for name in names:
                stem, ko, rest = name.partition(".ko")
                if f"{ko}{rest}" in _MODULE_DECOMPRESSORS:
                    self.paths[stem.replace("-", "_")] = os.path.join(folder, name)
        self.builtin: frozenset[str] = frozenset()
        with (
            contextlib.suppress(FileNotFoundError),
            open(os.path.join(directory, "modules.builtin"), encoding="utf-8") as stream,
        ):
            found = (os.path.basename(line.strip()).removesuffix(".ko") for line in stream)
            self.builtin = frozenset(name.replace("-", "_") for name in found) - self.paths.keys()
        self._facts: dict[str, dict[str, list[str]]] = {}

    def read(self, name: str) -> bytes:
        """The module as it is loaded. Raises `HostError` for one that is not there, or broken."""
        if name not in self.paths:
            raise HostError(
                f"the kernel package has no module {name}",
                phase="guest build",
                hint="use a Debian cloud kernel",
            )
        path = self.paths[name]
        with open(path, "rb") as stream:
            data = stream.read()
        _, ko, rest = os.path.basename(path).partition(".ko")
        try:
            return _MODULE_DECOMPRESSORS[f"{ko}{rest}"](data)
        except (zlib.error, lzma.LZMAError, EOFError) as error:
            raise HostError(f"{path} does not decompress: {error}", phase="guest build") from error

    def facts(self, name: str) -> dict[str, list[str]]:
        """The module's `.modinfo`. Raises as `read`."""
        if name not in self._facts:
            self._facts[name] = Elf(self.read(name)).modinfo()
        return self._facts[name]

    def depends(self, name: str) -> list[str]:
        """The modules that must be loaded right before this one."""
        listed = ",".join(self.facts(name).get("depends", []))
        return [item.replace("-", "_") for item in listed.split(",") if item]

    def order(self, names: Iterable[str]) -> list[str]:
        """These modules and all that they need, each after its dependencies, each once; without what is
        built in."""
        ordered: list[str] = []

        def visit(name: str) -> None:
            if name not in ordered and name not in self.builtin:
                for needed in self.depends(name):
                    visit(needed)
                ordered.append(name)

        for name in names:
            visit(name)
        return ordered

    def relative(self, name: str) -> str:
        """The module's path below the tree once it is decompressed, such as `kernel/fs/fuse/fuse.ko`."""
        path = os.path.relpath(self.paths[name], self.directory)
        return path[: path.rindex(".ko")] + ".ko"

    def stripped(self, name: str) -> bytes:
        """The module without debug information, BTF and signature: half the time to load it.

        It taints the guest's kernel ("E", unsigned module), which has no further effect.
        """
        with tempfile.TemporaryDirectory() as scratch:
            whole, stripped = f"{scratch}/whole.ko", f"{scratch}/stripped.ko"
            with open(whole, "wb") as stream:
                stream.write(self.read(name))
            run_tool(["strip", "-g", "-R", ".BTF", "-o", stripped, whole])
            with open(stripped, "rb") as stream:
                return stream.read()

    def index(self, names: Iterable[str]) -> dict[str, bytes]:
        """`modules.dep`, `modules.alias` and `modules.builtin` for these modules: what modprobe reads.
        Raises as `read`."""
        dep, alias = [], ["# Aliases extracted from modules themselves."]
        for name in sorted(names):
            needed = [item for item in self.order([name]) if item != name]
            dep.append(
                f"{self.relative(name)}: {' '.join(self.relative(n) for n in reversed(needed))}".rstrip()
            )
            alias += [f"alias {pattern} {name}" for pattern in self.facts(name).get("alias", [])]
        return {
            "modules.dep": "".join(f"{line}\n" for line in dep).encode(),
            "modules.alias": "".join(f"{line}\n" for line in alias).encode(),
            "modules.builtin": "".join(f"kernel/{name}.ko\n" for name in sorted(self.builtin)).encode(),
        }
