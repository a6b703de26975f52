"""A running VM gets more vCPUs and memory, its guest uses them, and its shared files stay with it."""

from __future__ import annotations

import os

import pytest

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="virtiofsd needs root"), pytest.mark.kata_only]
