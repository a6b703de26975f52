"""The hypervisor service: one coroutine for each call of Kata's hypervisor.proto, by ttrpc on a unix socket.

What: `Service`, which speaks to whoever makes the VMs, such as cloud-api-adaptor; `stop_blocking` for a dead
shim.
Invariants: each call has a deadline, and a connection of its own, so that a service which was restarted in
between does not matter. What it answers is bounded, and its words are plain and short. It is told a deadline
where it may give up then (`create`, `start`), and none where it must not (`stop`).
Source: proto/remote.proto; cloud-api-adaptor of August 2026, pkg/adaptor/cloud/cloud.go.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from devices.errors import HypervisorError
from devices.plain import plain
from proto import remote_pb2
from ttrpc import Client, ConnectionClosed, RemoteProtocolError, RpcError

__all__ = ["ANSWER_LIMIT", "RefusedError", "Service", "stop_blocking"]

_SERVICE = remote_pb2.DESCRIPTOR.services_by_name["Hypervisor"]
ANSWER_LIMIT = 64 << 10
"""Bytes of an answer."""
_MAX_WORDS = 1000
_CONNECT = 5.0  # seconds
_NO_ANSWER = frozenset({"UNAVAILABLE", "CANCELLED"})  # it may have done it, or may do so yet


class RefusedError(HypervisorError):
    """The service has answered, and said no."""


class Service:
    """At `path`. Every call raises HypervisorError; `RefusedError` where there was an answer."""

    def __init__(self, path: str) -> None:
        self.path = path

    async def create(self, vm: str, annotations: Mapping[str, str], netns: str, timeout: float) -> str:
        """CreateVM: where its agent will be reached."""
        request = remote_pb2.CreateVMRequest(id=vm, annotations=annotations, networkNamespacePath=netns)
        answer = await self._call("CreateVM", request, timeout)
        return str(answer.agentSocketPath)

    async def start(self, vm: str, timeout: float) -> None:
        """StartVM: returns when the agent can be reached."""
        await self._call("StartVM", remote_pb2.StartVMRequest(id=vm), timeout)

    async def stop(self, vm: str, timeout: float) -> None:
        """StopVM. The service is told no deadline: one that gives a deletion up leaves a VM to somebody's
        bill. It counts our hanging up as such, too."""
        await self._call("StopVM", remote_pb2.StopVMRequest(id=vm), timeout, told=False)

    async def version(self, timeout: float) -> str:
        """Version: what it calls itself."""
        answer = await self._call("Version", remote_pb2.VersionRequest(), timeout)
        return plain(answer.version[:_MAX_WORDS])

    async def _call(self, name: str, request: Any, timeout: float, *, told: bool = True) -> Any:
        try:
            async with asyncio.timeout(timeout):
                client = await Client.connect_unix(self.path, timeout=min(timeout, _CONNECT))
                try:
                    return await client.call(
                        _SERVICE.methods_by_name[name],
                        request,
                        timeout=timeout if told else None,
                        max_response=ANSWER_LIMIT,
                    )
                finally:
                    await client.close()
        except RpcError as error:
            if error.code.name == "DEADLINE_EXCEEDED":
                raise self._late(name, timeout) from None
            refused = error.code.name not in _NO_ANSWER
            words = (
                f"the hypervisor service at {self.path} refused {name}: {plain(error.message[:_MAX_WORDS])}"
            )
            raise (RefusedError if refused else HypervisorError)(words) from None
        except TimeoutError:
            raise self._late(name, timeout) from None
        except (ConnectionClosed, RemoteProtocolError) as error:
            words = plain(str(error)[:_MAX_WORDS])
            raise HypervisorError(
                f"the hypervisor service at {self.path} ended {name} without an answer: {words}"
            ) from None
        except OSError as error:
            raise HypervisorError(
                f"the hypervisor service at {self.path} cannot be reached: {error.strerror or error}",
                hint="is cloud-api-adaptor running? see [hypervisor.remote] remote_hypervisor_socket",
            ) from error

    def _late(self, name: str, timeout: float) -> HypervisorError:
        return HypervisorError(
            f"the hypervisor service at {self.path} did not answer {name} within {timeout:g} s",
            code="DEADLINE_EXCEEDED",
            hint="see its log; [hypervisor.remote] remote_hypervisor_timeout is the time that a VM may take",
        )


def stop_blocking(path: str, vm: str, timeout: float) -> None:
    """`Service.stop` where there is no event loop. That the service knows no such VM is no error. Raises
    HypervisorError."""
    with contextlib.suppress(RefusedError):
        asyncio.run(Service(path).stop(vm, timeout))
