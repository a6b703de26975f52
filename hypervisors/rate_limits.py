"""Rate limits in the form that Firecracker's and Cloud Hypervisor's APIs have in common: token buckets.

Invariants: a bucket is for bytes or operations in each `refill_time`, a second: its size is the rate.
"""

from __future__ import annotations

from typing import Any

__all__ = ["rate_limiter"]

_REFILL = 1000  # milliseconds


def rate_limiter(
    *, bytes_: int = 0, bytes_burst: int = 0, ops: int = 0, ops_burst: int = 0
) -> dict[str, Any] | None:
    """For the API; None without a limit. A burst counts only beside its rate."""
    limits: dict[str, Any] = {}
    if bytes_:
        limits["bandwidth"] = _bucket(bytes_, bytes_burst)
    if ops:
        limits["ops"] = _bucket(ops, ops_burst)
    return limits or None


def _bucket(size: int, burst: int) -> dict[str, int]:
    bucket = {"size": size, "refill_time": _REFILL}
    return {**bucket, "one_time_burst": burst} if burst else bucket
