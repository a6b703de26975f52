"""A kernel comes out of a bzImage however it is compressed; modules are loaded after what they need."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from devices.errors import HostError
from guest.kernel import ModuleTree, extract_vmlinux, kernel_files


def elf_with(sections: dict[str, bytes]) -> bytes:
    """A minimal ELF file with these sections."""
    names = b"\0"
    body, table = b"", [bytes(64)]
    for name, data in [*sections.items(), (".shstrtab", b"")]:
        at = len(names)
        names += name.encode() + b"\0"
        if name != ".shstrtab":
            table.append(struct.pack("<IIQQQQIIQQ", at, 1, 0, 0, 64 + len(body), len(data), 0, 0, 1, 0))
            body += data
        else:
            table.append(struct.pack("<IIQQQQIIQQ", at, 3, 0, 0, 64 + len(body), len(names), 0, 0, 1, 0))
    body += names
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = (ident, 2, 62, 1, 0, 0, 64 + len(body), 0, 64, 56, 0, 64, len(table), len(table) - 1)
    return struct.pack("<16sHHIQQQIHHHHHH", *header) + body + b"".join(table)


PVH_NOTE = struct.pack("<III", 4, 4, 18) + b"Xen\0" + b"\0\0\0\1"
KERNEL = elf_with({".notes": PVH_NOTE, ".text": bytes(range(256)) * 64})


def bz_image(payload: bytes, *, sectors: int = 3, protocol: int = 0x20F) -> bytes:
    """A bzImage around a compressed payload: setup sectors, 100 bytes of code, payload, its unpacked size."""
    payload += struct.pack("<I", len(KERNEL))
    setup = bytearray((sectors + 1) * 512)
    setup[0x1F1] = sectors
    setup[0x202:0x208] = b"HdrS" + struct.pack("<H", protocol)
    struct.pack_into("<II", setup, 0x248, 100, len(payload))
    return bytes(setup) + bytes(100) + payload + b"trailer"


def by_program(*argv: str) -> Callable[[bytes], bytes]:
    """A compressor that Python lacks."""
    return lambda data: subprocess.run(argv, input=data, capture_output=True, check=True).stdout


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "lz4": by_program("lz4", "-l", "-c"),
    "zstd": by_program("zstd", "-c"),
}
# How Debian 12, Debian 13 and others ship modules.
COMPRESSORS |= {
    ".ko": bytes,
    ".ko.xz": lzma.compress,
    ".ko.zst": COMPRESSORS["zstd"],
    ".ko.gz": gzip.compress,
}
SUFFIXES = {"a": ".ko.xz", "b-two": ".ko.zst", "c": ".ko.gz", "lone": ".ko"}


@pytest.mark.parametrize("how", [how for how in COMPRESSORS if not how.startswith(".")])
def test_each_compression(how: str) -> None:
    """All that the kernel's build offers and Debian has used."""
    assert extract_vmlinux(bz_image(COMPRESSORS[how](KERNEL))) == KERNEL


def test_an_elf_kernel_stays_as_it_is() -> None:
    """Some packages ship vmlinux."""
    assert extract_vmlinux(KERNEL) == KERNEL


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (b"", "no Linux boot header"),
        (bytes(4096), "no Linux boot header"),
        (bz_image(gzip.compress(KERNEL), protocol=0x207), "older than 2.08"),
        (bz_image(b"who knows what this is"), "unknown way"),
        (bz_image(gzip.compress(KERNEL)[:20] + bytes(50)), "kernel"),
        (bz_image(gzip.compress(b"no kernel")), "no kernel"),
        (bz_image(gzip.compress(elf_with({".text": b"x"}))), "CONFIG_PVH"),
    ],
    ids=["empty", "zeros", "old", "unknown", "broken", "text", "no PVH"],
)
def test_what_is_no_kernel(image: bytes, words: str) -> None:
    """Each reason has its sentence."""
    with pytest.raises(HostError, match=words):
        extract_vmlinux(image)


@pytest.fixture
def modules(tmp_path: Path) -> ModuleTree:
    """c needs b-two needs a, lone nothing; each is compressed in another way; in_side is built in."""
    for name, facts in {
        "a": b"depends=\0alias=pci:1*\0",
        "b-two": b"depends=a\0",
        "c": b"depends=b_two,a\0alias=fs-c\0",
        "lone": b"depends=\0",
    }.items():
        folder = tmp_path / "kernel" / name[0]
        folder.mkdir(parents=True)
        (folder / f"{name}{SUFFIXES[name]}").write_bytes(
            COMPRESSORS[SUFFIXES[name]](elf_with({".modinfo": facts}))
        )
    (tmp_path / "modules.builtin").write_text("kernel/fs/fuse/in-side.ko\n")
    return ModuleTree(str(tmp_path))


@pytest.mark.parametrize(
    "place", ["boot/vmlinuz-7", "usr/lib/modules/7/vmlinuz"], ids=["until 13", "since 14"]
)
def test_where_a_package_has_its_kernel(place: str, tmp_path: Path) -> None:
    """Debian 14 moved it beside the modules."""
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_bytes(b"")

    assert kernel_files(str(tmp_path), "7") == (f"{tmp_path}/{place}", f"{tmp_path}/usr/lib/modules/7")
    with pytest.raises(HostError, match="hold no vmlinuz"):
        kernel_files(str(tmp_path), "8")


def test_what_is_built_in_is_not_loaded(modules: ModuleTree) -> None:
    """It is no error, wherever it is asked for; modprobe is told of it."""
    assert modules.order(["in_side", "a", "in_side"]) == ["a"]
    assert b"in_side" in modules.index(["a"])["modules.builtin"]


def test_order(modules: ModuleTree) -> None:
    """Each after its dependencies, each once."""
    assert modules.order(["c", "b_two", "lone"]) == ["a", "b_two", "c", "lone"]


def test_index_for_modprobe(modules: ModuleTree) -> None:
    """Dependencies nearest first, as modprobe loads them from the end."""
    index = modules.index(["a", "b_two", "c"])

    # They are unpacked by then, whatever the package had.
    assert "kernel/c/c.ko: kernel/b/b-two.ko kernel/a/a.ko\n" in index["modules.dep"].decode()
    assert "kernel/a/a.ko:\n" in index["modules.dep"].decode()
    assert "alias fs-c c\n" in index["modules.alias"].decode()


def test_a_module_that_is_not_there(modules: ModuleTree) -> None:
    """The error names it."""
    with pytest.raises(HostError, match="no module virtio_fs"):
        modules.order(["virtio_fs"])
