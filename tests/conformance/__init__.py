"""What every VMM plugin promises the sandbox, as tests that it runs against itself (docs/hypervisor.md)."""
