"""The factory: a template for a pod's VM, or the reason why it boots instead.

What: `why_cold` says what keeps a pod from a template before anything is looked at; `obtain` finds the
template of its configuration's class, or makes it.
Invariants: nobody waits for somebody else's build, and no failure in here fails a pod: it boots then, and the
reason is in the log. A tenant decides whether its VM begins with a template, never what is in one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog

from devices.errors import HostError, KataError
from devices.threads import acquire, look
from devices.undo import UndoLog
from shim.config import Config
from shim.factory.build import build
from shim.factory.cold import Cold
from shim.factory.store import BusyError, Store
from shim.factory.template_class import TemplateClass, template_class
from shim.protocols import Deadlines
from shim.resources.sizing import sized
from shim.state.trace import Trace

__all__ = ["obtain", "reject", "why_cold"]

_log = structlog.get_logger("factory")


def why_cold(config: Config, spec: Mapping[str, Any], *, pod: bool) -> str:
    """Why the VM of this first container cannot begin with a template of its configuration, "" if it can.
    `pod`: the spec is a pod's sandbox container's."""
    if config.annotations:
        return f"the pod's annotations change its VM ({', '.join(config.annotations)})"
    if config.runtime.dan_conf:
        return "dan_conf: what its network is made of is known before a VM starts, and plugged then"
    static = config.runtime.static_sandbox_resource_mgmt
    if static and sized(config.hypervisor, spec, static=static, pod=pod) != sized(
        config.hypervisor, {}, static=static, pod=True
    ):
        return "static_sandbox_resource_mgmt, and the pod has limits: its VM has a size of its own"
    return ""


async def obtain(config: Config, undo: UndoLog, trace: Trace) -> tuple[TemplateClass, str]:
    """The class, and the directory of its template, made now if there is none. Raises Cold."""
    store = Store(config.factory.template_path)
    try:
        wanted = await look(template_class, config)
        if path := await look(store.find, wanted.digest):
            return wanted, path
        if reason := await look(store.failed, wanted.digest):
            raise Cold(f"there is no template, because: {reason}")
        deadlines = Deadlines(boot=config.agent.boot_deadline, request=config.agent.request_deadline)
        try:
            with trace.phase("template"):
                path = await build(
                    store, wanted, undo, deadlines=deadlines, port=config.agent.server_port, trace=trace
                )
        except BusyError:
            raise
        except KataError as error:
            await acquire(store.fail, wanted.digest, str(error))
            raise
        return wanted, path
    except OSError as error:
        raise Cold(f"no template: {error}") from error
    except BusyError as error:
        raise Cold(f"no template yet: {error.cause}") from error
    except KataError as error:
        raise Cold(f"no template could be made: {error}") from error


async def reject(config: Config, wanted: TemplateClass, reason: str) -> None:
    """No VM could begin with the template: the next ones boot, until it is made anew."""
    try:
        await acquire(Store(config.factory.template_path).fail, wanted.digest, reason)
    except HostError as error:
        _log.warning("the template is kept", error=str(error))
