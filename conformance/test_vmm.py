"""The VMM that the command line names keeps the contract (`kata-ctl conformance NAME`)."""

from __future__ import annotations

from conformance.configured import configured
from conformance.contract import HypervisorContract
from conformance.plugin import chosen


class TestVmm(HypervisorContract):
    """As its configuration has it."""

    subject = configured(*chosen())
