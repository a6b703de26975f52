"""Containers and their processes as `shim.state.recoveryfile` has them: written down, and had back.

What: `snapshot` says how they stand, `recall` makes them again for a daemon that takes their sandbox over.
Invariants: what was told as ended stays so, with its status and time, and is never told again; everything
else is asked of the guest, which remembers. A process that the guest does not know any more has exited with
`VM_DEATH`. Nothing here waits for a process.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable

import structlog
from google.protobuf.message import DecodeError

from devices.errors import KataError
from proto import oci_pb2
from shim.protocols import VM_DEATH, Exit
from shim.state.recoveryfile import SavedContainer, SavedProcess
from shim.stdio.stdio import StdioSpec
from shim.tasks.container import Container
from shim.tasks.process import Process, Status

__all__ = ["recall", "snapshot", "streams"]

_log = structlog.get_logger("recovery")


def snapshot(containers: Iterable[Container]) -> tuple[SavedContainer, ...]:
    """Of those that are created and not deleted."""
    return tuple(
        SavedContainer(
            id=container.id,
            bundle=container.bundle,
            processes=tuple(_process(container, process) for process in container.processes()),
        )
        for container in containers
    )


def _process(container: Container, process: Process) -> SavedProcess:
    spec, beyond = "", {}
    if process.exec_id and process.status is Status.CREATED:
        message, more = container.exec_spec(process.exec_id)
        spec, beyond = base64.b64encode(message.SerializeToString()).decode(), dict(more)
    ended = process.exit
    return SavedProcess(
        exec_id=process.exec_id,
        stdin=process.stdio_spec.stdin,
        stdout=process.stdio_spec.stdout,
        stderr=process.stdio_spec.stderr,
        terminal=process.stdio_spec.terminal,
        status=process.status.value,
        input_over=process.stdio is not None and process.stdio.input_over,
        exit_status=-1 if ended is None else ended.status,
        exited_at=0 if ended is None else ended.at,
        spec=spec,
        beyond=beyond,
    )


def _spec(text: str) -> oci_pb2.Process:
    try:
        return oci_pb2.Process.FromString(base64.b64decode(text, validate=True))
    except DecodeError as error:
        raise ValueError(f"a process that cannot be read: {error}") from None


def streams(process: SavedProcess) -> StdioSpec:
    """What containerd asked for."""
    return StdioSpec(process.stdin, process.stdout, process.stderr, process.terminal)


async def recall(container: Container, saved: SavedContainer) -> None:
    """Have its processes back. Raises KataError when the guest does not answer, ValueError for what no
    `snapshot` made; `Container.abandon` gives back what was taken."""
    for index, each in enumerate(saved.processes):
        if bool(index) != bool(each.exec_id):
            raise ValueError(f"process {index} of {saved.id} is out of place")
        process = Process(container.id, each.exec_id, streams(each)) if each.exec_id else container.init
        process.status = Status(each.status)
        if each.exit_status >= 0:
            process.ended = Exit(each.exit_status, each.exited_at)
            process.exited.set_result(process.ended)
        try:
            await container.recall(process, (_spec(each.spec), each.beyond), input_over=each.input_over)
        except KataError as error:
            if error.code != "NOT_FOUND":
                raise
            _log.error("the guest does not know the process any more", process=process.name)
            container.tell_exit(process, Exit.now(VM_DEATH))
