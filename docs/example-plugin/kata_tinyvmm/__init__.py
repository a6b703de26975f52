"""An example of a VMM plugin for kata-shim: QEMU, driven by its arguments and nothing else."""
