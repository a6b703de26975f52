"""Whether VMs of a configuration can begin with a template: `check_factory`.

What: the rules between [hypervisor.NAME.factory] and the other sections.
Why here: a configuration whose VMs could not would be slower than it says, or worse: what vhost-user devices
do with private memory hangs. So it is refused before anything runs, with the key that is in the way.
Invariants: of a VMM whose VMs cannot be saved at all the switch has no effect, and says so: Kata's files have
it for others than we do.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from hypervisors.base import HypervisorPlugin
from shim.config.schema import AgentConfig, FactoryConfig, Inactive, RuntimeConfig
from shim.config.source import Source

__all__ = ["check_factory"]


def check_factory(
    factory: FactoryConfig,
    runtime: RuntimeConfig,
    agent: AgentConfig,
    plugin: HypervisorPlugin[Any],
    section: Any,
    source: Source,
    hypervisor_name: str,
) -> tuple[list[str], list[Inactive]]:
    """With enable_template = true: the problems, and the switch itself if it has no effect."""
    own = source.table("hypervisor", hypervisor_name, "factory")
    table = own if "enable_template" in own.values else source.table("factory")
    place = f"{table.at('enable_template')}: [{table.name}] enable_template = true"
    ask = getattr(plugin, "why_no_template", None)
    if ask is None:
        locate = partial(table.locate, "enable_template")
        return [], [Inactive(table.name, "enable_template", True, False, locate)]
    reasons = [ask(section)]
    if runtime.on_shim_death == "keep":
        reasons.append('on_shim_death = "keep": another shim could not take its one connection over')
    if not agent.home_call:
        reasons.append("the guest is not ours: its agent does not listen on a port of virtio-serial")
    problems = [f"{place}: its VMs cannot begin with a template: {reason}" for reason in reasons if reason]
    if not factory.template_path.startswith("/"):
        problems.append(f"{table.at('template_path')}: [{table.name}] template_path is no absolute path")
    return problems, []
