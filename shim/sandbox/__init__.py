"""One VM with its agent, and what its containers get from the host.

Enters: settings made of configuration and spec; a container's bundle; calls of its tasks.
Leaves: a hypervisor that runs, calls of Kata's agent, and after the end nothing on the host.
May import: resources, hooks, config, spec, state, protocols.
"""
