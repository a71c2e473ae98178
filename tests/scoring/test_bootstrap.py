"""Coverage, groups and strata of the bootstrap."""

import numpy as np
import pytest
from numpy.typing import NDArray

from wtflow.scoring import bootstrap as module
from wtflow.scoring.bootstrap import bootstrap, clopper_pearson
from wtflow.scoring.metrics import auroc

Scores = NDArray[np.float64]


def alone(scores: list[float] | Scores, name: str) -> tuple[Scores, list[str]]:
    """Each image in a group of its own."""
    return np.array(scores, dtype=np.float64), [f"{name}{number}" for number in range(len(scores))]


@pytest.mark.slow
def test_the_interval_covers_the_true_auroc_about_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Normals N(0, 1), anomalies N(1, 1): the true AUROC is 0.7602. 200 draws of 100 and 80 images."""
    monkeypatch.setattr(module, "RESAMPLES", 200)
    rng, inside = np.random.default_rng(5), 0
    for _ in range(200):
        interval = bootstrap(auroc, alone(rng.normal(size=100), "n"), alone(rng.normal(1.0, size=80), "a"))
        assert interval is not None
        inside += interval.low <= 0.7602 <= interval.high
    assert 0.90 < inside / 200 < 0.99


def test_groups_of_copies_are_as_uncertain_as_one_image_each() -> None:
    """Each image four times: for images drawn one by one the interval would be half as wide."""
    rng = np.random.default_rng(0)
    normal, anomalous = alone(rng.normal(size=40), "n"), alone(rng.normal(1.0, size=30), "a")
    copies = [(np.tile(scores, 4), groups * 4) for scores, groups in (normal, anomalous)]
    loose = bootstrap(auroc, *(alone(scores, name) for (scores, _), name in zip(copies, "na", strict=True)))
    single, grouped = bootstrap(auroc, normal, anomalous), bootstrap(auroc, *copies)
    assert single is not None
    assert grouped is not None
    assert loose is not None
    assert grouped == pytest.approx(single, abs=1e-12)
    assert loose.high - loose.low < 0.6 * (single.high - single.low)


def test_images_of_one_group_stay_together_and_so_do_their_labels() -> None:
    """One image of each kind a group: a resample has them in pairs. Alone, each kind keeps its number."""
    sizes = set[tuple[int, int]]()

    def size(normal: Scores, anomalous: Scores) -> float:
        assert sorted(normal) == sorted(anomalous - 100)
        sizes.add((normal.size, anomalous.size))
        return 0.5

    scores, groups = np.arange(8.0), [f"part{number}" for number in range(8)]
    bootstrap(size, (scores, groups), (scores + 100, groups))
    assert sizes == {(8, 8)}


def test_both_labels_are_in_every_resample() -> None:
    """A group of both kinds, one normal group, one anomalous: never fewer than two images of a kind."""
    least = 99

    def smaller(normal: Scores, anomalous: Scores) -> float:
        nonlocal least
        least = min(least, normal.size, anomalous.size)
        return 0.0

    bootstrap(smaller, (np.arange(3.0), ["x", "n", "n"]), (np.arange(2.0), ["x", "a"]))
    assert least == 2


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    rng = np.random.default_rng(0)
    normal, anomalous = alone(rng.normal(size=20), "n"), alone(rng.normal(1.0, size=20), "a")
    first = bootstrap(auroc, normal, anomalous, seed=1)
    assert first == bootstrap(auroc, normal, anomalous, seed=1)
    assert first != bootstrap(auroc, normal, anomalous, seed=2)


def test_a_figure_that_is_not_defined_has_no_interval() -> None:
    assert bootstrap(auroc, alone([], "n"), alone([1.0], "a")) is None
    assert bootstrap(auroc, alone([1.0], "n"), alone([], "a")) is None


def test_a_perfect_separation_has_an_interval_without_width() -> None:
    assert bootstrap(auroc, alone([0.0, 1.0], "n"), alone([2.0, 3.0], "a")) == (1.0, 1.0)


def test_clopper_pearson_in_closed_form() -> None:
    assert clopper_pearson(0, 0) is None
    none, every = clopper_pearson(0, 20), clopper_pearson(20, 20)
    assert none is not None
    assert every is not None
    assert (none.low, none.high) == pytest.approx((0.0, 1 - 0.025 ** (1 / 20)))
    assert (every.low, every.high) == pytest.approx((0.025 ** (1 / 20), 1.0))
