"""The program: `start`, the daemon, `delete`; one process per pod.

Enters: containerd's command line and the bundle in its working directory; signals; the end of children.
Leaves: the shim's address on stdout, a process that serves on it, and nothing of a pod whose shim died.
May import: runtime, tasks, resources, hooks, state, protocols.
"""
