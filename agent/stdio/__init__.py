"""The streams of processes in the guest: connections to the host, and pumps between them and the pipes."""
