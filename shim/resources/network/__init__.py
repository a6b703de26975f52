"""The pod's network: from the links of its network namespace to cards of the VM. See docs/network.md."""
