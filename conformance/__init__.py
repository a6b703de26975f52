"""What every VMM's driver promises the sandbox, as tests that ask the guest (docs/add-a-vmm.md).

Invariants: importable without pytest (`kata-ctl conformance` says that it is missing); no test is in need of
this repository, so that a package of somebody else's runs them where kata-shim is installed.
"""
