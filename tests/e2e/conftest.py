"""Fixtures of the end-to-end tests: one containerd for all, local images, and a leak count.

`KATA_E2E_RUNTIME=io.containerd.runc.v2` (or `runc`) runs the same tests against runc, the reference that
the tests themselves are checked with. Tests of what only a VM has are marked `kata_only`.
`KATA_E2E_CONTAINERD=1.6|1.7|2` runs them under that containerd; without it, under the host's own.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from testing import leaks
from testing.api import Api, Task
from testing.containerd import KATA, PAUSE, RUNC, Containerd, Result, chosen_version
from testing.cri import NAMESPACE, Cri
from testing.guest import guest_files
from testing.images import busybox_image, layered_image, pause_image
from tests.e2e.vms import Boot, booting

_ALIASES = {"": KATA, "kata": KATA, "runc": RUNC}
RUNTIME = os.environ.get("KATA_E2E_RUNTIME", "")
RUNTIME = _ALIASES.get(RUNTIME, RUNTIME)
CONTAINERD = chosen_version()
HERE = Path(__file__).parent

BUSYBOX = "local/busybox:1"
CRI_BUSYBOX = "docker.io/local/busybox:1"
ALICE = "local/alice:1"
LAYERS = "local/layers:30"


@pytest.fixture
async def boot(tmp_path: Path) -> AsyncIterator[Boot]:
    """Boots VMs under QEMU, without a containerd; keywords change the section of the configuration."""
    async with booting(tmp_path) as boots:
        yield boots


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers of this directory."""
    config.addinivalue_line("markers", "kata_only: of what only a VM has; skipped against runc")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything here as e2e, and skip what runc cannot show."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            if RUNTIME != KATA and item.get_closest_marker("kata_only"):
                item.add_marker(pytest.mark.skip(reason=f"not with {RUNTIME}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show containerd's log, which is its shims' too, with what failed: it goes with the containerd."""
    report = yield
    arguments = getattr(item, "funcargs", {})
    daemon = arguments["cri"].containerd if "cri" in arguments else arguments.get("containerd")
    if report.failed and isinstance(daemon, Containerd):
        report.sections.append(("containerd's log", daemon.log_tail(80)))
    return report


@pytest.fixture(scope="session")
def runtime() -> str:
    """The runtime under test."""
    return RUNTIME


@pytest.fixture(scope="session")
def containerd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    """One private containerd with the test images, for the whole session."""
    if RUNTIME == KATA:
        missing = [str(path) for path in guest_files().values() if not path.exists()]
        if missing:
            pytest.fail(f"the guest is not built: {', '.join(missing)}; run `make guest`", pytrace=False)
    archives = tmp_path_factory.mktemp("images")
    busybox_image(archives / "busybox.tar", BUSYBOX)
    busybox_image(archives / "alice.tar", ALICE, user="alice")
    layered_image(archives / "layers.tar", LAYERS, layers=30)
    with Containerd(debug=True, version=CONTAINERD) as daemon:
        for archive in sorted(archives.iterdir()):
            daemon.ctr("image", "import", str(archive))
        yield daemon


@pytest.fixture(scope="session")
def cri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cri]:
    """The CRI plugin of one more private containerd, with a busybox and a pause image that is empty."""
    archives = tmp_path_factory.mktemp("cri-images")
    busybox_image(archives / "busybox.tar", CRI_BUSYBOX)
    pause_image(archives / "pause.tar", PAUSE)
    with Containerd(debug=True, version=CONTAINERD, namespace=NAMESPACE, cri=True) as daemon:
        for archive in sorted(archives.iterdir()):
            daemon.ctr("image", "import", str(archive))
        connection = Cri(daemon)
        for image in (CRI_BUSYBOX, PAUSE):
            connection.wait_for_image(image)
        yield connection
        connection.close()


@pytest.fixture
def run(containerd: Containerd) -> Callable[..., Result]:
    """`ctr run --rm` of a command in the busybox image under the tested runtime."""

    def _run(*command: str, image: str = BUSYBOX, **keywords: object) -> Result:
        return containerd.run(image, *command, runtime=RUNTIME, **keywords)  # type: ignore[arg-type]

    return _run


@pytest.fixture(scope="session")
def api(containerd: Containerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """containerd's gRPC API."""
    connection = Api(containerd.address, containerd.namespace, tmp_path_factory.mktemp("fifos"))
    yield connection
    connection.close()


@pytest.fixture
def create(containerd: Containerd, api: Api) -> Iterator[Callable[..., Task]]:
    """Create a container and its task (not started), with FIFOs of ours; removed after the test."""
    names: list[str] = []

    def _create(
        *command: str,
        image: str = BUSYBOX,
        terminal: bool = False,
        stdin: bool = True,
        options: tuple[str, ...] = (),
        annotations: Callable[[str], dict[str, str]] = lambda _: {},  # of its name
    ) -> Task:
        name = containerd.new_id("api")
        names.append(name)
        tty = ("--tty",) if terminal else ()
        containerd.ctr("container", "create", "--runtime", RUNTIME, *tty, *options, image, name)

        # `ctr container create` takes a `-c` of the command for its own flag, and 1.6 no annotations.
        def change(spec: dict[str, Any]) -> None:
            spec["process"].update(args=list(command))
            spec.setdefault("annotations", {}).update(annotations(name))

        api.patch_spec(name, change)
        return api.task(name, terminal=terminal, stdin=stdin)

    yield _create
    for name in names:
        containerd.remove(name)


@pytest.fixture(scope="module")
def sleeper(containerd: Containerd) -> Iterator[str]:
    """A container that only sleeps, for the execs of a module; its name."""
    name = containerd.new_id("sleeper")
    containerd.ctr("run", "--detach", "--runtime", RUNTIME, BUSYBOX, name, "sleep", "100000")
    yield name
    containerd.remove(name)


@pytest.fixture
def no_leaks(containerd: Containerd) -> Iterator[Callable[[], None]]:
    """Calling it (and leaving the test) fails if something is there that was not there before.

    On a machine of its own (CI) everything that looks like a shim, a VMM or their helpers counts;
    elsewhere only what carries the tag of this session's containerd.
    """

    def take() -> dict[str, set[str]]:
        if os.environ.get("CI"):
            return leaks.snapshot(root=str(containerd.root), ignore=[containerd.pid])
        sockets = [
            leaks.shim_socket(containerd.address, containerd.namespace, name) for name in containerd.ids
        ]
        return leaks.snapshot(
            tag=containerd.tag, root=str(containerd.root), sockets=sockets, ignore=[containerd.pid]
        )

    before = take()

    def check() -> None:
        left = leaks.settle(before, take)
        assert not left, "left behind:\n" + "\n".join(
            f"  {kind}: {item}" for kind, items in sorted(left.items()) for item in sorted(items)
        )

    yield check
    check()
