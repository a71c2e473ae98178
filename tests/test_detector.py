from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.tiny_line import scores, write_overflowing
from wtflow.bundle import load_bundle
from wtflow.data.images import decode
from wtflow.data.shards import FeatureShards
from wtflow.detector import Detector
from wtflow.errors import ImageError, WTFlowError


@pytest.fixture(scope="module")
def detector(tiny_bundle: Path) -> Detector:
    return load_bundle(tiny_bundle).detector()


@pytest.fixture(scope="module")
def pictures(tiny_raw: Path, tiny_test: FeatureShards, detector: Detector) -> list[Image.Image]:
    paths = tiny_test.index["path"].to_pylist()
    return [decode((tiny_raw / path).read_bytes(), detector.limits) for path in paths]


def test_a_photograph_and_its_cached_features_get_one_verdict(
    detector: Detector, pictures: list[Image.Image], tiny_test: FeatureShards
) -> None:
    cached = detector.verdicts_of_features(tiny_test.batch(range(len(tiny_test))))
    fresh = [detector.verdicts([picture])[0] for picture in pictures]
    assert len(fresh) == len(tiny_test) > 10
    np.testing.assert_allclose(scores(fresh), scores(cached), rtol=0, atol=1e-5)
    assert np.ptp(scores(fresh)) > 0.01  # the scores do differ from each other
    for one, other in zip(fresh, cached, strict=True):
        np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, rtol=1e-3, atol=1e-3)


def test_five_together_score_as_alone(detector: Detector, pictures: list[Image.Image]) -> None:
    alone = [detector.verdicts([picture])[0] for picture in pictures[:5]]
    np.testing.assert_allclose(scores(detector.verdicts(pictures[:5])), scores(alone), rtol=0, atol=1e-6)


def test_order_goes_with_the_pictures(detector: Detector, pictures: list[Image.Image]) -> None:
    forth, back = detector.verdicts(pictures[:4]), detector.verdicts(pictures[:4][::-1])
    np.testing.assert_allclose(scores(forth), scores(back)[::-1], rtol=0, atol=1e-6)


def test_the_decision_is_the_threshold_and_the_p_value(detector: Detector, pictures: list[Image.Image]) -> None:
    verdicts = detector.verdicts(pictures)
    assert {verdict.is_anomalous for verdict in verdicts} == {True, False}
    for verdict in verdicts:
        assert verdict.threshold == detector.calibration.threshold
        assert verdict.is_anomalous == (verdict.score > verdict.threshold)
        assert verdict.is_anomalous == (verdict.p_value <= detector.calibration.target_fpr)


def test_maps_are_energies_of_the_places(detector: Detector, pictures: list[Image.Image]) -> None:
    verdict = detector.verdicts(pictures[:1])[0]
    assert verdict.anomaly_map.shape == (8, 8)
    assert verdict.anomaly_map.dtype == np.float32
    assert verdict.anomaly_map.min() >= 0
    assert verdict.score <= verdict.anomaly_map.max() + 1e-6  # a mean of interpolated places


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_score_that_is_no_number_is_no_verdict(detector: Detector, tiny_test: FeatureShards, value: float) -> None:
    levels = tiny_test.batch([0])
    next(iter(levels.values()))[0, 0, 0, 0] = value
    with pytest.raises(WTFlowError, match="score is not finite"):
        detector.verdicts_of_features(levels)


def test_a_picture_without_a_score_takes_no_other_down(
    tiny_bundle: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    odd = write_overflowing(tiny_bundle, pictures[:4], tmp_path / "odd")
    detector = load_bundle(tmp_path / "odd").detector()
    with pytest.raises(ImageError, match="score is not finite"):
        detector.verdicts(pictures[:4])
    answers = detector.answers(pictures[:4])
    assert isinstance(answers[odd], ImageError)
    assert answers.pop(odd).reason == "not_an_image"
    others = [picture for place, picture in enumerate(pictures[:4]) if place != odd]
    np.testing.assert_allclose(scores(answers), scores(detector.verdicts(others)), rtol=1e-6)


def test_no_pictures_no_verdicts(detector: Detector) -> None:
    assert detector.verdicts([]) == detector.answers([]) == []
