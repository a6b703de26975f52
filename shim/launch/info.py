"""`-info`: what containerd 2.x asks a runtime before its first task.

Invariants: stdout carries one serialized containerd.types.RuntimeInfo and nothing else; the options
that containerd writes to stdin do not change the answer. No annotation containerd.io/runtime-allow-mounts:
containerd 2.2+ leaves those types of mounts to the runtime, and we want it to do all that mount(2) alone
cannot; what is then left for us is what every older version sends.
"""

from __future__ import annotations

import sys

from proto import introspection_pb2

__all__ = ["print_info"]


def print_info(version: str, runtime_class: str = "") -> int:
    """Write RuntimeInfo to stdout; returns the exit code. `runtime_class` as in `runtime_class_of`."""
    info = introspection_pb2.RuntimeInfo(
        name=f"io.containerd.kata-{runtime_class}.v2" if runtime_class else "io.containerd.kata.v2",
        version=introspection_pb2.RuntimeVersion(version=version),
    )
    sys.stdout.buffer.write(info.SerializeToString())
    sys.stdout.buffer.flush()
    return 0
