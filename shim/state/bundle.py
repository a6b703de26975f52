"""Paths and small files that `start`, the daemon and `delete` agree on.

What: the sandbox a bundle belongs to, the socket address by containerd's convention, and the
files `address` and `shim.pid`. (What else follows from the three that name a sandbox: `shim.state.identity`.)
Why apart: all three actions need the same answers, two of them in a few milliseconds; so this
module imports nothing that a bare interpreter has not loaded already.
Invariants: every path is made of constants, checked ids and hex digits.
"""

import os

__all__ = [
    "PREFIX",
    "SOCKET_DIR",
    "BundleError",
    "Group",
    "address_of",
    "digest",
    "find_group",
    "socket_path",
    "write_atomically",
]

PREFIX = os.environ.get("KATA_SHIM_PREFIX", "")
"""Before all paths below /run: for tests."""
SOCKET_DIR = PREFIX + "/run/containerd/s"
"""containerd's convention for the sockets of shims."""

MAX_CONFIG = 64 << 20
"""Largest config.json read, in bytes."""

# (type key, the type of a member, sandbox id key): CRI of containerd, CRI-O, dockershim.
_GROUPINGS = (
    ("io.kubernetes.cri.container-type", "container", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "container", "io.kubernetes.cri-o.SandboxID"),
    ("io.kubernetes.docker.type", "container", "io.kubernetes.sandbox.id"),
)


class BundleError(Exception):
    """The bundle cannot be used as it is; the text names file, cause and hint."""


class Group:
    """Which sandbox a container belongs to, and whether it is only a member of it."""

    __slots__ = ("is_member", "sandbox_id")

    def __init__(self, sandbox_id: str, is_member: bool) -> None:
        self.sandbox_id = sandbox_id
        self.is_member = is_member


def find_group(bundle: str, container_id: str, *, bare: bool = False) -> Group:
    """Read the pod annotations of `bundle`/config.json.

    A container without them is its own sandbox. Raises BundleError if the file is missing, too big or
    not JSON. Sandboxes of the Sandbox API have none; 2.x keeps their bundles apart, 1.7 among those of
    containers: `bare` says that one there which has none is a sandbox's, as it is at `start`.
    """
    path = os.path.join(bundle, "config.json")
    try:
        text = _read(path, MAX_CONFIG)
    except FileNotFoundError:
        where = os.path.realpath(bundle)
        if "io.containerd.sandbox.controller." in where or (bare and "io.containerd.runtime.v2." in where):
            return Group(container_id, False)
        raise BundleError(
            f"start: {path} does not exist; try: let containerd prepare the bundle"
            " (the working directory must be the bundle)"
        ) from None
    except OSError as error:
        raise BundleError(f"start: cannot read {path}: {error.strerror}") from None
    # Most containers are not of a pod. To look for the keys first saves the JSON parser (its import
    # alone is half of what `start` costs); what is found is then parsed properly.
    if not any(sandbox_key.encode() in text for _, _, sandbox_key in _GROUPINGS):
        stripped = text.strip()
        if not (stripped.startswith(b"{") and stripped.endswith(b"}")):
            raise BundleError(f"start: {path} is not a JSON object; try: look at the file's last bytes")
        return Group(container_id, False)
    annotations = _annotations(path, text)
    for type_key, member_type, sandbox_key in _GROUPINGS:
        sandbox_id = annotations.get(sandbox_key)
        if isinstance(sandbox_id, str) and sandbox_id:
            is_member = annotations.get(type_key) == member_type and sandbox_id != container_id
            return Group(sandbox_id, is_member)
    return Group(container_id, False)


def _read(path: str, limit: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        if size > limit:
            raise BundleError(f"start: {path} has {size} bytes; at most {limit} are read")
        chunks = []
        while chunk := os.read(fd, 1 << 20):
            chunks.append(chunk)
        return b"".join(chunks)
    finally:
        os.close(fd)


def _annotations(path: str, text: bytes) -> dict[str, object]:
    import json

    try:
        spec = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"start: {path} is not JSON: {error}; try: look at that place of the file"
        ) from None
    annotations = spec.get("annotations") if isinstance(spec, dict) else None
    return annotations if isinstance(annotations, dict) else {}


def socket_path(grpc_address: str, namespace: str, group_id: str, directory: str = "") -> str:
    """The shim's socket: <directory>/<digest of the three>."""
    return os.path.join(directory or SOCKET_DIR, digest(grpc_address, namespace, group_id))


def digest(grpc_address: str, namespace: str, group_id: str) -> str:
    """64 hex digits of containerd's address, the namespace and the sandbox's id.

    Source: containerd's runtime/v2/shim SocketAddress; the three are joined like a cleaned path.
    """
    joined = os.path.normpath("/".join(part for part in (grpc_address, namespace, group_id) if part))
    try:
        # CPython 3.11's own; hashlib would load OpenSSL: 3 ms.
        from _sha256 import sha256  # type: ignore[import-not-found]
    except ImportError:
        from hashlib import sha256
    found: str = sha256(os.fsencode(joined)).hexdigest()
    return found


def address_of(path: str) -> str:
    """The address that containerd dials for a socket's path."""
    return "unix://" + path


def write_atomically(directory: str, name: str, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new one, never a part."""
    temporary = os.path.join(directory, f".{name}.{os.getpid()}")  # others may be writing theirs
    final = os.path.join(directory, name)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
    os.rename(temporary, final)
