"""Where KVM is real, `kata-ctl check` finds it useful: a vCPU runs the loop about as fast as the host."""

from __future__ import annotations

import pytest

from ctl.vcpu import LIMIT, judge, measure


@pytest.mark.benchhost(ci=True)
def test_a_vcpu_of_a_real_kvm_runs() -> None:
    measured = measure()
    useful, text = judge(measured)
    assert useful, (text, measured, LIMIT)
    assert "/dev/kvm works: a loop on a vCPU takes" in text
