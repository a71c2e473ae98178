from io import BytesIO

import matplotlib
import numpy as np
from PIL import Image

from pipelines.charts import histogram, roc_curve

GENERATOR = np.random.default_rng(0)
SCORES = {
    "normal": GENERATOR.gamma(4.0, 0.1, 60),
    "anomalous": GENERATOR.gamma(9.0, 0.1, 40),
    "uncertain": np.array([]),
}


def pixels(png: bytes) -> np.ndarray:
    with Image.open(BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))


def drawn(png: bytes, colour: tuple[int, int, int]) -> bool:
    """Whether a pixel of about this colour is in the picture."""
    return bool((np.abs(pixels(png).astype(int) - colour).max(axis=2) < 12).any())


def test_the_same_numbers_give_the_same_bytes_whatever_the_users_settings() -> None:
    point = (0.1, 0.8)
    first = histogram(SCORES, 0.7), roc_curve(SCORES["normal"], SCORES["anomalous"], point, 0.05)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.dpi": 30}):
        second = histogram(SCORES, 0.7), roc_curve(SCORES["normal"], SCORES["anomalous"], point, 0.05)
    assert first == second
    assert not any(name in png for png in first for name in (b"Software", b"Creation", b"matplotlib"))


def test_other_numbers_give_another_picture() -> None:
    assert histogram(SCORES, 0.7) != histogram(SCORES, 0.8)
    curves = [roc_curve(SCORES["normal"], SCORES["anomalous"], (0.1, tpr), 0.05) for tpr in (0.8, 0.9)]
    assert curves[0] != curves[1]


def test_only_labels_with_images_have_a_panel() -> None:
    anomalous, uncertain = (190, 64, 56), (194, 143, 65)  # the labels' colours, let through a little
    both, normal = histogram(SCORES, 0.7), histogram({"normal": SCORES["normal"]}, 0.7)
    assert pixels(both).shape[0] > pixels(normal).shape[0]
    assert drawn(both, anomalous)
    assert not drawn(both, uncertain)
    assert not drawn(normal, anomalous)
    assert drawn(histogram(SCORES | {"uncertain": np.array([0.5])}, 0.7), uncertain)


def test_histogram_and_curve_are_as_high_in_columns_of_three_to_two() -> None:
    curve = pixels(roc_curve(SCORES["normal"], SCORES["anomalous"], (0.1, 0.8), 0.05))
    for uncertain in ([], [0.5]):
        shown = pixels(histogram(SCORES | {"uncertain": np.array(uncertain)}, 0.7))
        assert shown.shape[:2] == (curve.shape[0], curve.shape[1] * 3 // 2)


def test_scores_that_cannot_be_binned_evenly() -> None:
    for scores in ([0.5, 0.5], [0.0, 1e6], [1e-3, 1e6], [-3.0, 2.0]):
        assert pixels(histogram({"normal": np.array(scores)}, 0.5)).std() > 0
