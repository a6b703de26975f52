"""VM templates: a VM that has booted once, kept in memory, which others begin with in the place of a boot.

Enters: a configuration.
Leaves: the directory of a template that fits it, or the reason why the VM boots instead (docs/templates.md).
May import: sandbox, resources, config, state, protocols.
"""
