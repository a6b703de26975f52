"""The root image: a tree described in Python, written as a read-only ext4 by e2fsprogs.

What: `Tree` collects files, directories and links with their final modes; `write_ext4` makes the image.
Why not `mkfs.ext4 -d`: e2fsprogs 1.47.0 takes change times and the order of directories from the
building machine. Here debugfs writes every node, in our order, and then sets the times; so equal trees
give equal images.
Invariants: everything belongs to root and has one fixed time; UUID and hash seed are constants; there
is no journal and no checksum, since nobody ever writes to the image (the build's hash covers it).
"""

from __future__ import annotations

import os
import posixpath
import stat
import tempfile
from dataclasses import dataclass

from devices.errors import HostError

from .tools import run_tool

__all__ = ["Node", "Tree", "write_ext4"]

_BLOCK = 4096
_UUID = "6b617461-2d73-4869-8d2d-677565737400"  # "kata-shi.m-guest.", as a version 4 UUID
_FEATURES = (
    "^has_journal,^resize_inode,^metadata_csum,^64bit,^dir_index,^huge_file,^dir_nlink,^extra_isize"
    ",^orphan_file"
)


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the tree: st_mode and, for a file its contents, for a link its target."""

    mode: int
    data: bytes = b""


class Tree:
    """Nodes by absolute path. Parents of a node are made as it is added. Later nodes replace earlier."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {"/": Node(stat.S_IFDIR | 0o755)}

    def _add(self, path: str, node: Node) -> None:
        if not path.startswith("/") or posixpath.normpath(path) != path or any(c in path for c in '" \n'):
            raise ValueError(f"{path!r} is not a plain absolute path")
        parent = posixpath.dirname(path)
        if parent not in self.nodes:
            self._add(parent, Node(stat.S_IFDIR | 0o755))
        if not stat.S_ISDIR(self.nodes[parent].mode):
            raise ValueError(f"{path}: {parent} is not a directory")
        self.nodes[path] = node

    def directory(self, path: str, mode: int = 0o755) -> None:
        """A directory."""
        self._add(path, Node(stat.S_IFDIR | mode))

    def file(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        """A regular file."""
        self._add(path, Node(stat.S_IFREG | mode, data.encode() if isinstance(data, str) else data))

    def link(self, path: str, target: str) -> None:
        """A symbolic link."""
        self._add(path, Node(stat.S_IFLNK | 0o777, target.encode()))

    def copy(self, source: str, path: str, mode: int | None = None) -> None:
        """A file from the building machine; its mode is 0755 or 0644 by the owner's x bit."""
        if mode is None:
            mode = 0o755 if os.stat(source).st_mode & stat.S_IXUSR else 0o644
        with open(source, "rb") as stream:
            self.file(path, stream.read(), mode)

    def copy_tree(self, source: str, path: str) -> None:
        """All regular files below a directory of the building machine."""
        for folder, _, names in os.walk(source):
            for name in names:
                full = os.path.join(folder, name)
                self.copy(full, posixpath.join(path, os.path.relpath(full, source)))

    def ordered(self) -> list[tuple[str, Node]]:
        """All nodes: directories first, each group by name."""
        return sorted(self.nodes.items(), key=lambda item: (not stat.S_ISDIR(item[1].mode), item[0]))


def _blocks(node: Node) -> int:
    return max(1, -(-len(node.data) // _BLOCK))


def write_ext4(tree: Tree, target: str, *, time: int) -> None:
    """Write the image file. Raises `HostError` if e2fsprogs is missing or refuses."""
    nodes = tree.ordered()
    # Inode tables and bitmaps come on top; 2 MiB and 3 % cover them for any tree of this kind.
    inodes = len(nodes) + 16
    size = (sum(_blocks(node) for _, node in nodes) * _BLOCK + inodes * 256) * 103 // 100 + (2 << 20)
    size = -(-size // (1 << 20)) << 20
    environment = {"E2FSPROGS_FAKE_TIME": str(time), "MKE2FS_SKIP_PROGRESS": "1"}
    with open(target, "wb") as stream:
        stream.truncate(size)
    make = [
        "mkfs.ext4",
        "-q",
        "-F",
        "-O",
        _FEATURES,
        "-m",
        "0",
        "-b",
        str(_BLOCK),
        "-I",
        "256",
        "-N",
        str(inodes),
    ]
    make += ["-U", _UUID, "-L", "kata-guest", "-E", f"hash_seed={_UUID},lazy_itable_init=0,nodiscard", target]
    run_tool(make, env=environment)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(target))) as scratch:
        script = os.path.join(scratch, "script")
        with open(script, "w", encoding="utf-8") as stream:
            stream.write("\n".join(_script(nodes, scratch, time)) + "\n")
        output = run_tool(["debugfs", "-w", "-f", script, target], env=environment)
    complaints = [
        line
        for line in output.splitlines()
        if line and not line.startswith(("debugfs", "Allocated inode", "Setting current time"))
    ]
    if complaints:
        raise HostError(f"debugfs could not write the image: {complaints[0]}", phase="guest build")


def _script(nodes: list[tuple[str, Node]], scratch: str, time: int) -> list[str]:
    """debugfs commands that create the nodes and give each its mode and times."""
    lines = [f"set_current_time @{time}"]
    for number, (path, node) in enumerate(nodes):
        parent, name = posixpath.split(path)
        if path != "/":
            lines.append(f"cd {parent}")
        if stat.S_ISDIR(node.mode):
            if path != "/":
                lines.append(f"mkdir {name}")
        elif stat.S_ISLNK(node.mode):
            lines.append(f"symlink {name} {node.data.decode()}")
        else:
            source = os.path.join(scratch, str(number))
            with open(source, "wb") as stream:
                stream.write(node.data)
            lines.append(f"write {source} {name}")
    lines.append("cd /")
    for path, node in [*nodes, ("/lost+found", Node(stat.S_IFDIR | 0o700))]:
        lines.append(f"set_inode_field {path} mode 0{node.mode:o}")
        lines += [f"set_inode_field {path} {name} @{time}" for name in ("atime", "ctime", "mtime", "crtime")]
    return lines
