"""Paths and small files that `start`, the daemon and `delete` agree on.

What: the sandbox a bundle belongs to and what its container is to it, the socket address by containerd's
convention, and the files `address` and `shim.pid`. (What else follows from the three that name a sandbox:
`shim.state.identity`.)
Why apart: all three actions need the same answers, two of them in a few milliseconds; so this
module imports nothing that a bare interpreter has not loaded already.
Invariants: every path is made of constants, checked ids and hex digits.
"""

import os
import sys

__all__ = [
    "MEMBER",
    "OWN",
    "PREFIX",
    "SINGLE",
    "SOCKET_DIR",
    "BundleError",
    "Group",
    "address_of",
    "digest",
    "find_group",
    "pod_role",
    "socket_path",
    "write_atomically",
]

PREFIX = os.environ.get("KATA_SHIM_PREFIX", "")
"""Before all paths below /run: for tests."""
SOCKET_DIR = PREFIX + "/run/containerd/s"
"""containerd's convention for the sockets of shims."""

MAX_CONFIG = 4 << 20
"""Largest config.json read, in bytes: what containerd's messages have, and the agent's."""

SINGLE, OWN, MEMBER = "single_container", "pod_sandbox", "pod_container"
"""What a container is to its sandbox: all of it, the one that holds a pod together, one of a pod's others."""

# (type key, sandbox id key), whoever asks reads them in this order: CRI of containerd, CRI-O, dockershim.
_PODS = (
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
    ("io.kubernetes.docker.type", "io.kubernetes.sandbox.id"),
)
_TYPES = {"sandbox": OWN, "podsandbox": OWN, "pod_sandbox": OWN, "container": MEMBER}


class BundleError(Exception):
    """The bundle cannot be used as it is; the text names file, cause and hint."""


class Group:
    """Which sandbox a container belongs to, and whether it is only a member of it."""

    __slots__ = ("is_member", "sandbox_id")

    def __init__(self, sandbox_id: str, is_member: bool) -> None:
        self.sandbox_id = sandbox_id
        self.is_member = is_member


def pod_role(annotations: dict[str, object]) -> tuple[str, str]:
    """SINGLE, OWN or MEMBER, and the id of the sandbox that the annotations name ("": the container's own).

    Raises BundleError for a type that is none, and where the keys of two makers of pods are there and say
    different things: one of them came from whoever may annotate the pod, and would lead into another one.
    """
    found = None
    for type_key, id_key in _PODS:
        kind = annotations.get(type_key)
        if not isinstance(kind, str):
            continue
        if kind not in _TYPES:
            raise BundleError(f"annotation {type_key} is {kind[:40]!a}; try: sandbox or container")
        sandbox_id = annotations.get(id_key)
        here = _TYPES[kind], sandbox_id if isinstance(sandbox_id, str) else ""
        if found is not None and found != here:
            raise BundleError(f"annotation {type_key} contradicts that of another kind; try: leave one out")
        found = here
    return found or (SINGLE, "")


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
    if not any(type_key.encode() in text for type_key, _ in _PODS) and not _hides_letters(text):
        stripped = text.strip()
        if not (stripped.startswith(b"{") and stripped.endswith(b"}")):
            raise BundleError(f"start: {path} is not a JSON object; try: look at the file's last bytes")
        return Group(container_id, False)
    try:
        kind, sandbox_id = pod_role(_annotations(path, text))
    except BundleError as error:
        raise BundleError(f"start: {path}: {error}") from None
    sandbox_id = sandbox_id or container_id
    return Group(sandbox_id, kind == MEMBER and sandbox_id != container_id)


def _read(path: str, limit: int) -> bytes:
    """`devices.small_file.read_small`, without its imports."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        info = os.fstat(fd)
        if info.st_mode & 0o170000 != 0o100000:  # S_ISREG
            raise BundleError(f"start: {path} is no regular file")
        if info.st_size > limit:
            raise BundleError(f"start: {path} has {info.st_size} bytes; at most {limit} are read")
        chunks = []
        while chunk := os.read(fd, 1 << 20):
            chunks.append(chunk)
        return b"".join(chunks)
    finally:
        os.close(fd)


def _hides_letters(text: bytes) -> bool:
    """Whether a character that needs no escape is written as one: \\u002d, where a key has a dash.

    Go, which writes these files, does so with <, > and & only.
    """
    at = text.find(b"\\u00")
    while at >= 0:
        if text[at + 4 : at + 5] in b"234567" and text[at + 4 : at + 6].lower() not in (b"3c", b"3e", b"26"):
            return True
        at = text.find(b"\\u00", at + 6)
    return False


def _annotations(path: str, text: bytes) -> dict[str, object]:
    """Those of the spec, by the rules of `shim.spec.shape`: the key in any letters, but once."""
    import json

    try:
        spec = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"start: {path} is not JSON: {error}; try: look at that place of the file"
        ) from None
    found = [spec[key] for key in spec if _folded(key) == "annotations"] if isinstance(spec, dict) else []
    if len(found) > 1:
        raise BundleError("annotations are there twice; try: leave one out")
    return found[0] if found and isinstance(found[0], dict) else {}


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _folded(key: str) -> str:
    return key.replace("\u017f", "s").lower()


def socket_path(grpc_address: str, namespace: str, group_id: str, directory: str = "") -> str:
    """The shim's socket: <directory>/<digest of the three>."""
    return os.path.join(directory or SOCKET_DIR, digest(grpc_address, namespace, group_id))


def digest(grpc_address: str, namespace: str, group_id: str) -> str:
    """64 hex digits of containerd's address, the namespace and the sandbox's id.

    Source: containerd's runtime/v2/shim SocketAddress; the three are joined like a cleaned path.
    """
    joined = os.path.normpath("/".join(part for part in (grpc_address, namespace, group_id) if part))
    try:
        # CPython's own, by the name of its version; hashlib would load OpenSSL: 3 ms.
        if sys.version_info >= (3, 12):
            from _sha2 import sha256
        else:
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
