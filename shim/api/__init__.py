"""containerd's services: messages in, messages out.

Enters: requests of `containerd.task.v2`/`v3.Task` and `containerd.runtime.sandbox.v1.Sandbox`.
Leaves: their answers; errors carry containerd's codes. What a call means is said below.
May import: tasks, sandbox, resources, stdio, spec, state, protocols.
"""
