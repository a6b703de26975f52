"""`python -m ctl`, for a checkout that is not installed."""

from __future__ import annotations

import sys

from ctl.main import main

sys.exit(main())
