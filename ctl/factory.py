"""`kata-ctl factory init|status|destroy`: the templates of this host's VMs (docs/templates.md).

`init` makes the template of a configuration now, also one that failed a moment ago; `status` lists what there
is, and whether the configuration's is among it; `destroy` removes all of the configuration's store.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import asdict

from devices.errors import CallerError, KataError
from devices.plain import plain
from devices.undo import MemoryUndo
from hypervisors.registry import register_built_in
from shim.config import Config, load_config
from shim.factory.build import build
from shim.factory.store import Store
from shim.factory.template_class import template_class
from shim.protocols import Deadlines
from shim.state.trace import Trace

__all__ = ["destroy", "init", "status"]


def _load(path: str | None) -> tuple[Config, Store]:
    register_built_in()
    config = load_config(os.path.abspath(path) if path else None, env=os.environ)
    return config, Store(config.factory.template_path)


def init(path: str | None) -> int:
    """Make it, unless it is there; the exit code. Raises KataError."""
    config, store = _load(path)
    if not config.factory.enable_template:
        raise CallerError(
            f"{config.path} has no templates: enable_template is false in [hypervisor.NAME.factory]",
            phase="factory",
            code="FAILED_PRECONDITION",
        )
    wanted = template_class(config)
    if found := store.find(wanted.digest):
        print(f"{found}: there already")
        return 0
    print(f"{asyncio.run(_build(config, store))}: made")
    return 0


async def _build(config: Config, store: Store) -> str:
    undo = MemoryUndo()
    try:
        return await build(
            store,
            template_class(config),
            undo,
            deadlines=Deadlines(boot=config.agent.boot_deadline, request=config.agent.request_deadline),
            port=config.agent.server_port,
            trace=Trace("template", ""),
        )
    finally:
        errors = await undo.release_all()
        if errors:
            raise KataError(f"not all was released: {errors[0]}", phase="factory")


def status(path: str | None, *, as_json: bool) -> int:
    """Print the templates; 0 if the configuration's own is there, or it wants none, else 1."""
    config, store = _load(path)
    wanted = template_class(config).digest if config.factory.enable_template else ""
    listed = store.listed()
    if as_json:
        print(json.dumps({"wanted": wanted, "templates": [asdict(one) for one in listed]}, indent=2))
    else:
        for one in listed:
            mark = "*" if one.digest == wanted else " "
            age = time.time() - one.made
            print(f"{mark} {one.digest}  {one.bytes >> 20} MiB  {age:.0f} s old  {plain(one.config)}")
        if not wanted:
            print(f"{config.path}: enable_template is false")
        elif not any(one.digest == wanted for one in listed):
            why = store.failed(wanted)
            print(f"{config.path}: no template yet" + (f", because: {plain(why)}" if why else ""))
    return int(bool(wanted) and not any(one.digest == wanted for one in listed))


def destroy(path: str | None) -> int:
    """Remove all templates of the store; VMs that began with one go on. The exit code."""
    _, store = _load(path)
    print(f"{store.directory}: {store.destroy()} removed")
    return 0
