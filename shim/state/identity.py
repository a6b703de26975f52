"""Who a sandbox is, and the places on the host that follow from it.

What: `Identity` is containerd's gRPC address, the namespace and the sandbox's id. Its `key` names whatever is
the host's: the state directory, the share, swap, scratch disks, a jail, a kept trace.
Why all three: an id is unique within one namespace of one containerd, and a host may have several of both. A
name made of the id alone would be two pods', and the end of one the end of the other.
Invariants: the key is the beginning of the digest that names the shim's socket, so the one can be told from
the other; it has 32 hex digits, so what lies below a state directory fits into a socket's path (107 bytes).

`<KATA_RUN>/<id>`, where Kata's tools look, is a link to the state directory of whoever came first
(`shim.state.names`). With journals of version 1 it was the state directory itself.
"""

import os

from shim.state.bundle import PREFIX, digest

__all__ = ["KATA_RUN", "RUN_DIR", "SHARED_ROOT", "Identity", "is_key", "key_of_socket"]

RUN_DIR = PREFIX + "/run/kata-shim"
"""The state directories (0700), each named by a key."""
KATA_RUN = PREFIX + "/run/kata"
"""Kata's place for them: links, named by ids; and state directories of older shims (journal version 1)."""
SHARED_ROOT = PREFIX + "/run/kata-containers/shared/sandboxes"
"""What sandboxes share with their guests, one directory each, named by a key (by older shims: by an id)."""

_KEY = 32  # hex digits of the 64


class Identity:
    """A sandbox of this host. Two are equal if they are the same sandbox's."""

    __slots__ = ("address", "digest", "namespace", "sandbox_id")

    def __init__(self, address: str, namespace: str, sandbox_id: str) -> None:
        self.address = address
        self.namespace = namespace
        self.sandbox_id = sandbox_id
        self.digest = digest(address, namespace, sandbox_id)

    @property
    def key(self) -> str:
        """Names it on this host, and no other: 32 hex digits."""
        return self.digest[:_KEY]

    @property
    def state_dir(self) -> str:
        """Its journal and private sockets; 0700."""
        return os.path.join(RUN_DIR, self.key)

    @property
    def share_dir(self) -> str:
        """What it shares with its guest."""
        return os.path.join(SHARED_ROOT, self.key)

    @property
    def link(self) -> str:
        """Where Kata's tools look for its state directory."""
        return os.path.join(KATA_RUN, self.sandbox_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        """For messages: NAMESPACE/ID and whose."""
        where = self.address or "(no address)"
        return f"{self.namespace}/{self.sandbox_id} of the containerd at {where}"

    def __repr__(self) -> str:
        return f"Identity({self.address!r}, {self.namespace!r}, {self.sandbox_id!r})"


def is_key(name: str) -> bool:
    """Whether a file of that name can be a sandbox's."""
    return len(name) == _KEY and not name.strip("0123456789abcdef")


def key_of_socket(path: str) -> str:
    """The key of the sandbox whose shim has its socket at `path`."""
    return os.path.basename(path)[:_KEY]
