"""The contract of `hypervisors.base.Hypervisor`, as tests; docs/hypervisor.md says the same in words.

A plugin's module has a class `TestX(HypervisorContract)` with `subject = Subject(...)`, and pytest does the
rest. What a VMM can do is not asked of its driver, but of the guest, of /proc and of the files behind it.
"""

from __future__ import annotations

from conformance.ends import EndsContract
from conformance.in_guest import GuestContract
from conformance.life import LifeContract

__all__ = ["HypervisorContract"]


class HypervisorContract(GuestContract, EndsContract, LifeContract):
    """All of it: `life`, then `ends`, then what one VM and its guest are asked (`in_guest`)."""
