"""What the bench host boots: the guest's kernel, an initramfs, and a module tree that modprobe can read.

What: `prepare` makes (once for each kernel) `build/benchhost/<release>`: the initramfs' modules and
`lib/modules/<release>` with the files of depmod; `initramfs` packs one machine's initramfs.
Why the guest's kernel: `make setup` has fetched and unpacked Debian's cloud kernel for the guest, and that
one has KVM, vhost and VFIO as modules; so nothing is installed, and nothing more is downloaded.
Invariants: a prepared directory is complete (it got its name by a rename).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from devices.errors import HostError
from guest import cpio
from guest.kernel import ModuleTree
from testing.guest import PROJECT

__all__ = ["BootFiles", "initramfs", "prepare"]

_HERE = Path(__file__).parent
_GUEST = PROJECT / "build" / "guest"
_OUT = PROJECT / "build" / "benchhost"
_BUSYBOX = Path("/bin/busybox")
# The disk, the root file system, the job's ports; everything else the job loads from the module tree.
_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "virtiofs", "overlay", "virtio_rng")
_EPOCH = 0


@dataclass(frozen=True, slots=True)
class BootFiles:
    """`kernel`: an ELF file; `tree`: the directory that has `lib/modules/<release>`; `modules`: the
    initramfs' modules in loading order, name -> contents."""

    kernel: Path
    release: str
    tree: Path
    modules: Mapping[str, bytes]


def prepare() -> BootFiles:
    """The boot files, made if they are not there. Raises HostError if the guest is not built."""
    try:
        release = str(json.loads((_GUEST / "manifest.json").read_text())["kernel"])
        (unpacked,) = _GUEST.glob(f"cache/packages-*/lib/modules/{release}")
    except (OSError, KeyError, ValueError) as error:
        raise HostError(
            f"{_GUEST} does not hold an unpacked kernel ({error})", phase="bench host", hint="make guest"
        ) from error
    tree = _OUT / release
    if not tree.is_dir():
        _make_tree(unpacked, tree)
    names = (tree / "order").read_text().split()
    modules = {name: (tree / "initramfs" / f"{name}.ko").read_bytes() for name in names}
    return BootFiles(_GUEST / "vmlinux", release, tree, modules)


def _make_tree(unpacked: Path, tree: Path) -> None:
    scratch = tree.with_name(f"{tree.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    # Copies, not links: guest.build removes its cache when a package has a newer version.
    shutil.copytree(unpacked, scratch / "lib/modules" / unpacked.name)
    subprocess.run(["depmod", "-b", str(scratch), unpacked.name], check=True, timeout=120)
    modules = ModuleTree(str(unpacked))
    names = modules.order(_MODULES)
    (scratch / "initramfs").mkdir()
    for name in names:
        (scratch / "initramfs" / f"{name}.ko").write_bytes(modules.stripped(name))
    (scratch / "order").write_text("\n".join(names))
    try:
        scratch.rename(tree)
    except OSError:  # somebody was first
        shutil.rmtree(scratch)
    if not tree.is_dir():
        raise HostError(f"cannot make {tree}", phase="bench host")


def initramfs(files: BootFiles, job: str) -> bytes:
    """One machine's initramfs; `job` is the text of /job, which stage2.sh sources."""
    entries = [cpio.directory(name) for name in ("bin", "modules", "rw", "proc", "sys", "dev", "host", "new")]
    entries += [cpio.file(f"modules/{name}.ko", data) for name, data in files.modules.items()]
    order = "".join(f"/modules/{name}.ko\n" for name in files.modules)
    entries += [
        cpio.file("modules/order", order.encode()),
        cpio.file("bin/busybox", _BUSYBOX.read_bytes(), 0o755),
        cpio.file("init", (_HERE / "init.sh").read_bytes(), 0o755),
        cpio.file("stage2.sh", (_HERE / "stage2.sh").read_bytes()),
        cpio.file("job", job.encode()),
    ]
    return cpio.archive(entries, time=_EPOCH)
