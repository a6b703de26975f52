"""pytest's side of the suite: which VMM is under test, and the VM that a class of tests shares.

What: `--hypervisor NAME` and `--hypervisor-config FILE` choose the subject of `conformance.test_vmm`;
`kata-ctl conformance` gives them. Whoever has a `Subject` of his own needs only the plugin itself:
`-p conformance.plugin`, or `pytest_plugins` in a conftest.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

if TYPE_CHECKING:
    from conformance.in_guest import Booted

pytest.register_assert_rewrite("conformance.life", "conformance.ends", "conformance.in_guest")

__all__ = ["chosen", "guest", "pytest_addoption", "pytest_configure"]

_options: dict[str, str] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `pytest --pyargs conformance` is about."""
    group = parser.getgroup("conformance", "a VMM and its contract (conformance)")
    group.addoption("--hypervisor", metavar="NAME", default="", help="the plugin that is tried")
    group.addoption(
        "--hypervisor-config", metavar="FILE", default="", help="its configuration; default: the shim's"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Remember what was asked for: modules of tests see no command line."""
    _options["name"] = config.getoption("--hypervisor")
    _options["file"] = config.getoption("--hypervisor-config")


def chosen() -> tuple[str, str]:
    """Name and file of the command line. Raises pytest.UsageError without a name."""
    if not _options.get("name"):
        raise pytest.UsageError(
            "say which VMM is tried: `kata-ctl conformance NAME`, or -p conformance.plugin --hypervisor NAME"
        )
    return _options["name"], _options["file"]


@pytest_asyncio.fixture(scope="class", loop_scope="class")
async def guest(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Booted]:
    """The VM that the tests of a class share; of its `subject`."""
    from conformance.in_guest import booted

    made = await booted(request.cls.subject, tmp_path_factory.mktemp("guest"))
    yield made
    made.manager.close()
    await made.world.close()
