"""What a sandbox takes from the host: files, disks, devices, room, network.

Enters: parts of a spec or of the configuration, a hypervisor, the undo log.
Leaves: mounts, disks, cards and the agent's messages for them; everything recorded before it is taken.
May import: config, spec, state, protocols.
"""
