"""Local OCI images, made here byte for byte: nothing is pulled.

What: `build_image` writes an OCI image archive (a tar that `ctr image import` takes) from a list of
layers; `busybox_image`, `layered_image` are the two that the demo and the tests use.
Invariants: the same input gives the same bytes (times are zero, names sorted, owners numeric), so the
image's digest says what is in it. Layers are plain tars: OCI allows that, and packing costs time.
Source: OCI image specification 1.0 (layout, manifest, config), opencontainers/image-spec.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "BUSYBOX",
    "Dir",
    "File",
    "Link",
    "build_image",
    "busybox_image",
    "busybox_tree",
    "layered_image",
    "pause_image",
]

BUSYBOX = Path("/bin/busybox")  # Debian's busybox-static


@dataclass(frozen=True, slots=True)
class File:
    """A regular file of a layer."""

    data: bytes
    mode: int = 0o644
    uid: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link of a layer."""

    target: str


@dataclass(frozen=True, slots=True)
class Dir:
    """A directory of a layer."""

    mode: int = 0o755
    uid: int = 0


Layer = Mapping[str, File | Link | Dir]


def _pack(layer: Layer) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, entry in sorted(layer.items()):
            info = tarfile.TarInfo(name)
            match entry:
                case File(data, mode, uid):
                    info.size, info.mode, info.uid, info.gid = len(data), mode, uid, uid
                    archive.addfile(info, io.BytesIO(data))
                case Link(target):
                    info.type, info.linkname, info.mode = tarfile.SYMTYPE, target, 0o777
                    archive.addfile(info)
                case Dir(mode, uid):
                    info.type, info.mode, info.uid, info.gid = tarfile.DIRTYPE, mode, uid, uid
                    archive.addfile(info)
    return buffer.getvalue()


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def build_image(
    path: Path, name: str, layers: Sequence[Layer], *, config: Mapping[str, object] | None = None
) -> None:
    """Write an OCI image archive with these layers (lowest first) to `path`.

    `name` is the reference that containerd will give it; `config` the image's execution parameters
    (Env, Cmd, User, WorkingDir). Raises OSError when the file cannot be written.
    """
    blobs: dict[str, bytes] = {}

    def add(data: bytes, media_type: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    packed = [add(_pack(layer), "application/vnd.oci.image.layer.v1.tar") for layer in layers]
    image_config = {
        "architecture": "amd64",
        "os": "linux",
        "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in packed]},
        "history": [{"created_by": "kata-shim testing"} for _ in packed],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": add(_json(image_config), "application/vnd.oci.image.config.v1+json"),
        "layers": packed,
    }
    entry = add(_json(manifest), "application/vnd.oci.image.manifest.v1+json")
    index = {
        "schemaVersion": 2,
        "manifests": [entry | {"annotations": {"io.containerd.image.name": name}}],
    }
    files = {
        "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
        "index.json": _json(index),
        **{f"blobs/sha256/{digest}": data for digest, data in blobs.items()},
    }
    path.write_bytes(_pack({file: File(data) for file, data in files.items()}))


def _busybox_layer() -> dict[str, File | Link | Dir]:
    applets = subprocess.run(
        [str(BUSYBOX), "--list"], check=True, capture_output=True, text=True, timeout=10
    ).stdout.split()
    layer: dict[str, File | Link | Dir] = {
        "bin": Dir(),
        "bin/busybox": File(BUSYBOX.read_bytes(), 0o755),
        "etc": Dir(),
        "etc/passwd": File(b"root:x:0:0:root:/root:/bin/sh\nalice:x:1000:1000:Alice:/home/alice:/bin/sh\n"),
        "etc/group": File(b"root:x:0:\nalice:x:1000:\n"),
        "home": Dir(),
        "home/alice": Dir(0o750, 1000),
        "root": Dir(0o700),
        "tmp": Dir(0o1777),
        "usr": Dir(),
        "usr/bin": Link("../bin"),
        "var": Dir(),
    }
    layer |= {f"{name}": Dir() for name in ("dev", "proc", "sys", "run", "sbin")}
    layer |= {f"bin/{name}": Link("busybox") for name in applets if name != "busybox"}
    return layer


_CONFIG = {"Env": ["PATH=/bin", "KATA_IMAGE=busybox"], "Cmd": ["sh"], "WorkingDir": "/"}


def busybox_image(path: Path, name: str, *, user: str = "") -> None:
    """One layer: a static busybox with all its applets, root and alice (1000). `user` as in Docker."""
    config: dict[str, object] = dict(_CONFIG)
    if user:
        config["User"] = user
    build_image(path, name, [_busybox_layer()], config=config)


def busybox_tree(path: Path) -> None:
    """The same files without an image about them, as `docker import` takes them."""
    path.write_bytes(_pack(_busybox_layer()))


def pause_image(path: Path, name: str) -> None:
    """An image with nothing in it, not even the program that its configuration names."""
    build_image(path, name, [{}], config={"Entrypoint": ["/pause"]})


def layered_image(path: Path, name: str, *, layers: int) -> None:
    """A busybox with `layers` layers: each adds /layers/NN, overwrites /layers/top, and whites out the
    file /layers/gone-NN of the layer below it.
    """
    stack: list[Layer] = [_busybox_layer() | {"layers": Dir()}]
    stack += [
        {
            f"layers/{number:02}": File(b"layer %d\n" % number),
            "layers/top": File(b"%d\n" % number),
            f"layers/gone-{number:02}": File(b""),
            f"layers/.wh.gone-{number - 1:02}": File(b""),
        }
        for number in range(1, layers)
    ]
    build_image(path, name, stack, config=_CONFIG)
