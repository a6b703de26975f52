"""Versions with a published fault are told, and no others."""

from __future__ import annotations

import pytest

from ctl.known_bad import why_bad


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("Firecracker v1.13.1", "CVE-2026-1386"),
        ("Firecracker v1.12.1", "CVE-2026-1386"),
        ("Firecracker v1.14.0", "CVE-2026-1386"),
        ("Jailer v1.14.0", "CVE-2026-1386"),
        ("virtiofsd version 5.2.0 (Debian 1:5.2+dfsg-11)", "CVE-2020-35517"),
        ("QEMU emulator version 5.2.0 (Debian 1:5.2+dfsg-11)", "older"),
    ],
)
def test_known_to_be_bad(said: str, word: str) -> None:
    """With what to do about it."""
    bad = why_bad(said)

    assert bad is not None
    assert word in bad.reason
    assert "update" in bad.hint


@pytest.mark.parametrize(
    "said",
    [
        "Firecracker v1.13.2",
        "Firecracker v1.14.1",
        "virtiofsd version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)",
        "virtiofsd 1.10.0",
        "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)",
        "QEMU emulator version 11.1.3",
        "vhost-device-vsock 0.3.0",
        "Firecracker, built by me",
        "",
    ],
)
def test_all_others_are_not_judged(said: str) -> None:
    assert why_bad(said) is None
