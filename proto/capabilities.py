"""The names of Linux's capabilities, as both ends of the agent's protocol know them.

Why here: the messages carry them as texts, and crun leaves out in silence what it does not know.
Source: capabilities(7) of Linux 6.1, the guest's. Later kernels have added none so far.
"""

from __future__ import annotations

__all__ = ["CAPABILITIES"]

_NAMES = """
    AUDIT_CONTROL AUDIT_READ AUDIT_WRITE BLOCK_SUSPEND BPF CHECKPOINT_RESTORE CHOWN DAC_OVERRIDE
    DAC_READ_SEARCH FOWNER FSETID IPC_LOCK IPC_OWNER KILL LEASE LINUX_IMMUTABLE MAC_ADMIN MAC_OVERRIDE
    MKNOD NET_ADMIN NET_BIND_SERVICE NET_BROADCAST NET_RAW PERFMON SETFCAP SETGID SETPCAP SETUID SYS_ADMIN
    SYS_BOOT SYS_CHROOT SYSLOG SYS_MODULE SYS_NICE SYS_PACCT SYS_PTRACE SYS_RAWIO SYS_RESOURCE SYS_TIME
    SYS_TTY_CONFIG WAKE_ALARM
"""

CAPABILITIES = frozenset("CAP_" + name for name in _NAMES.split())
"""`CAP_AUDIT_CONTROL` and so on."""
