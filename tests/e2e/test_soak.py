"""Lives in parallel with faults, in two namespaces with the same ids: the small edition of `make soak`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from testing.containerd import Containerd, chosen_version
from testing.images import busybox_image
from tests.stress.soak import IMAGE, NAMESPACES, Soak

pytestmark = [pytest.mark.kata_only, pytest.mark.slow]

Make = Callable[[int, int, str], Soak]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """A soak by (faults, seed, image) on a containerd of its own: faults are for nobody else."""
    archive = tmp_path_factory.mktemp("images") / "busybox.tar"
    busybox_image(archive, IMAGE)
    patient = {"agent.kata": {"create_container_timeout": 120}}
    with Containerd(version=chosen_version(), overrides=patient) as own:
        for namespace in NAMESPACES:
            own.ctr("--namespace", namespace, "image", "import", str(archive))

        def soak(faults: int, seed: int, image: str) -> Soak:
            return Soak(own, image=image, faults=faults, parallel=3, seed=seed, say=print)

        yield soak


def test_a_few_faults_end_nobody_elses_lives(make: Make) -> None:
    soak = make(6, 1, IMAGE)
    planned = {fault for fault, _, _ in soak._plan if fault}
    assert len(planned) >= 4, "the seed plans many kinds of faults"

    tally = soak.run()

    assert tally.wrong == []
    assert tally.faults.total() == 6
    assert tally.exits >= 6


def test_what_goes_wrong_is_told(make: Make) -> None:
    """The soak's own judgement: a bystander that cannot live is a broken promise."""
    soak = make(1, 1, "local/none:1")
    soak._plan = [("", 0, 0.0)]

    (wrong,) = soak.run().wrong

    assert "a bystander failed" in wrong
    assert "local/none:1" in wrong
