"""What tests that break a private containerd's pods share: the containerd, and the count of what is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from testing import leaks
from testing.containerd import Containerd, chosen_version
from testing.guest import Value, guest_files
from testing.images import busybox_image

__all__ = ["BUSYBOX", "busybox_archive", "nothing_left", "private_containerd"]

BUSYBOX = "local/busybox:1"


def busybox_archive(folder: Path) -> Path:
    """An image to import. Fails if there is no guest to run it in."""
    missing = [str(path) for path in guest_files().values() if not path.exists()]
    if missing:
        pytest.fail(f"the guest is not built: {', '.join(missing)}; run `make guest`", pytrace=False)
    archive = folder / "busybox.tar"
    busybox_image(archive, BUSYBOX)
    return archive


@contextmanager
def private_containerd(
    archive: Path, overrides: Mapping[str, Mapping[str, Value | None]] | None = None
) -> Iterator[Containerd]:
    """One with that image; `overrides` change its shims' configuration."""
    with Containerd(debug=True, version=chosen_version(), overrides=overrides) as daemon:
        daemon.ctr("image", "import", str(archive))
        yield daemon


@contextmanager
def nothing_left(containerd: Containerd) -> Iterator[None]:
    """Everything that comes meanwhile is gone again soon after."""

    def take() -> dict[str, set[str]]:
        daemon = containerd
        return leaks.snapshot(
            tag=daemon.tag,
            root=str(daemon.root),
            sockets=[leaks.shim_socket(daemon.address, daemon.namespace, name) for name in daemon.ids],
            ignore=[daemon.pid] if daemon.pid else [],
        )

    before = take()
    yield
    left = leaks.settle(before, take, timeout=10)
    assert left == {}, containerd.log_tail(80)
