"""The names of Linux's capabilities, as both ends of the agent's protocol know them, and their numbers.

Why here: the messages carry them as texts, and crun leaves out in silence what it does not know.
Source: capabilities(7) of Linux 6.1, the guest's. Later kernels have added none so far.
"""

from __future__ import annotations

__all__ = ["CAPABILITIES", "NUMBERS"]

_NAMES = """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
    NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT
    SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE
    AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ
    PERFMON BPF CHECKPOINT_RESTORE
"""

NUMBERS = {"CAP_" + name: number for number, name in enumerate(_NAMES.split())}
"""`CAP_CHOWN` is 0, and so on."""

CAPABILITIES = frozenset(NUMBERS)
"""`CAP_AUDIT_CONTROL` and so on."""
