"""The streams of a process, between containerd's ends and the guest.

Enters: paths and URLs of FIFOs, files, loggers and streams; a connection per stream, or the agent's calls.
Leaves: bytes, none lost, in bounded buffers; an end that is said once.
May import: protocols.
"""
