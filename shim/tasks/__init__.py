"""Containers and processes as containerd knows them: states, exits, events, statistics.

Enters: calls for a container or an exec, by id; exits that the guest tells; the death of the VM.
Leaves: calls of a `Sandbox` (`shim.protocols`), events for containerd, each exit once.
May import: stdio, state, protocols.
"""
