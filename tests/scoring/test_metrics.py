"""Image metrics against scikit-learn, pixel metrics against slow references and closed forms."""

import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from benchmarks.metrics import exact, pixels
from tests.scoring.test_histogram import PATIENT, few_bins, rounded_to_bins
from wtflow.errors import WTFlowError
from wtflow.scoring.metrics import (
    PixelMetrics,
    PixelResult,
    SaturatedRegion,
    auroc,
    average_precision,
    f1_max,
    roc,
    saturation_area,
)

FEW_VALUES = st.sampled_from([0.0, 0.1, 0.5, 0.5 + 1e-12, 1.0, 7.0, 1e6])  # ties, near ties, a heavy tail
SCORES = st.lists(st.one_of(FEW_VALUES, st.floats(-1e6, 1e6)), min_size=1, max_size=30)
Pixels = list[tuple[NDArray[np.float32], NDArray[np.bool_]]]


def labelled(normal: list[float], anomalous: list[float]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    return np.repeat([0, 1], [len(normal), len(anomalous)]), np.array(normal + anomalous)


@PATIENT
@given(SCORES, SCORES)
def test_auroc_equals_sklearn(normal: list[float], anomalous: list[float]) -> None:
    assert auroc(normal, anomalous) == pytest.approx(roc_auc_score(*labelled(normal, anomalous)), abs=1e-12)


@PATIENT
@given(SCORES, SCORES)
def test_average_precision_equals_sklearn(normal: list[float], anomalous: list[float]) -> None:
    expected = average_precision_score(*labelled(normal, anomalous))
    assert average_precision(normal, anomalous) == pytest.approx(expected, abs=1e-12)


@PATIENT
@given(SCORES, SCORES)
def test_f1_max_is_the_best_of_all_thresholds_and_is_reached_at_its_own(
    normal: list[float], anomalous: list[float]
) -> None:
    precision, recall, _ = precision_recall_curve(*labelled(normal, anomalous))
    best = f1_max(normal, anomalous)
    assert best is not None
    called = precision + recall > 0
    harmonic = 2 * precision[called] * recall[called] / (precision[called] + recall[called])
    assert best.f1 == pytest.approx(harmonic.max(), abs=1e-12)
    hits = sum(score >= best.threshold for score in anomalous)
    false_alarms = sum(score >= best.threshold for score in normal)
    assert best.f1 == pytest.approx(2 * hits / (hits + false_alarms + len(anomalous)), abs=1e-12)


def test_ties_count_half() -> None:
    assert auroc([1.0, 2.0], [2.0, 2.0]) == 0.75
    assert auroc([3.0], [3.0]) == 0.5


def test_float32_scores_that_differ_by_one_bit_are_not_a_tie() -> None:
    low = np.float32(0.1)
    high = np.nextafter(low, np.float32(1))
    assert auroc(np.array([low]), np.array([high])) == 1.0
    assert auroc(np.array([high]), np.array([low])) == 0.0


def test_images_of_one_kind_alone() -> None:
    assert auroc([], [1.0]) is None
    assert auroc([1.0], []) is None
    assert average_precision([1.0], []) is None
    assert f1_max([1.0], []) is None
    assert average_precision([], [1.0, 2.0]) == 1.0
    assert f1_max([], [1.0, 2.0]) == (1.0, 1.0)


@PATIENT
@given(SCORES, SCORES)
def test_roc_encloses_the_auroc_and_runs_from_corner_to_corner(normal: list[float], anomalous: list[float]) -> None:
    fpr, tpr = roc(normal, anomalous)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(fpr) >= 0).all()
    assert np.trapezoid(tpr, fpr) == pytest.approx(auroc(normal, anomalous), abs=1e-12)


def test_roc_needs_both_kinds() -> None:
    with pytest.raises(WTFlowError, match="at least one"):
        roc([], [1.0])
    with pytest.raises(WTFlowError, match="at least one"):
        roc([1.0], [])


def test_nan_is_refused() -> None:
    with pytest.raises(WTFlowError, match="NaN"):
        auroc([0.0, math.nan], [1.0])
    with pytest.raises(WTFlowError, match="NaN"):
        PixelMetrics().add(np.full((2, 2), np.nan), np.zeros((2, 2), dtype=bool))


def reference_regions(mask: NDArray[np.bool_]) -> list[set[tuple[int, int]]]:
    """8-connected components by flood fill."""
    left = {(int(row), int(column)) for row, column in np.argwhere(mask)}
    regions = []
    while left:
        front, region = [left.pop()], set[tuple[int, int]]()
        while front:
            row, column = front.pop()
            region.add((row, column))
            around = {(row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)} & left
            left -= around
            front.extend(around)
        regions.append(region)
    return regions


Regions = list[tuple[NDArray[np.float32], float]]
"""Scores of a region's pixels, and its saturation in pixels."""


def reference_area(regions: Regions, normal: NDArray[np.float32], limit: float) -> float:
    """Area under mean sPRO as it is defined: everything anew for each distinct score, then trapezoids by hand."""
    points = [(0.0, 0.0)]
    for threshold in np.unique(np.concatenate([normal, *(scores for scores, _ in regions)]))[::-1]:
        share = np.mean([min(np.sum(scores >= threshold) / saturation, 1.0) for scores, saturation in regions])
        points.append((float(np.mean(normal >= threshold)), float(share)))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x1 <= limit:
            area += (x1 - x0) * (y0 + y1) / 2
        else:
            y_limit = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            area += (limit - x0) * (y0 + y_limit) / 2
            break
    return area / limit


def reference_aupro(images: Pixels, limit: float) -> float:
    """AUPRO: sPRO of connected regions that saturate at their area."""
    components = [
        np.array([scores[place] for place in region]) for scores, mask in images for region in reference_regions(mask)
    ]
    normal = np.concatenate([scores[~mask] for scores, mask in images])
    return reference_area([(scores, scores.size) for scores in components], normal, limit)


def measured(images: Pixels) -> PixelResult:
    metrics = PixelMetrics()
    for scores, mask in images:
        metrics.add(scores, mask)
    return metrics.result()


def assert_is_the_reference(images: Pixels) -> None:
    result = measured(images)
    assert result.aupro_30 == pytest.approx(reference_aupro(images, 0.30), abs=1e-9)
    assert result.aupro_05 == pytest.approx(reference_aupro(images, 0.05), abs=1e-9)
    truth = np.concatenate([mask.ravel() for _, mask in images])
    scores = np.concatenate([scores.ravel() for scores, _ in images])
    assert result.pixel_auroc == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)
    assert result.pixel_ap == pytest.approx(average_precision_score(truth, scores), abs=1e-9)


@st.composite
def pictures(draw: st.DrawFn) -> Pixels:
    """One to three images of one size, with sparse or dense masks, and scores in [0, 1.3] with many ties or few."""
    rows, columns = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    density, levels = draw(st.sampled_from([0.1, 0.4])), draw(st.sampled_from([2, 5, 10_000]))
    images: Pixels = []
    for _ in range(draw(st.integers(1, 3))):
        mask = generator.random((rows, columns)) < density
        scores = (generator.integers(levels, size=(rows, columns)) / levels + 0.3 * mask).astype(np.float32)
        images.append((scores, mask))
    mask = images[0][1]
    mask[0, 0], mask[-1, -1] = True, False
    return images


def changed(images: Pixels, change: Callable[[NDArray[np.float32]], NDArray[np.floating]]) -> Pixels:
    return [(change(scores).astype(np.float32), mask) for scores, mask in images]


@PATIENT
@given(pictures())
def test_pixel_figures_of_scores_that_lie_together_are_exact(images: Pixels) -> None:
    assert_is_the_reference(changed(images, lambda scores: 1 + scores / 50))


@few_bins()
@PATIENT
@given(pictures(), st.sampled_from([0.0, 0.5, 20.0, 60.0]))
def test_pixel_figures_are_those_of_scores_rounded_to_bins(images: Pixels, spread: float) -> None:
    """Spread 20: the highest score is e^26 times the lowest."""
    if spread:
        images = changed(images, lambda scores: np.exp(spread * scores))
    rounded = rounded_to_bins(np.stack([scores for scores, _ in images]))
    binned = [(scores, mask) for scores, (_, mask) in zip(rounded, images, strict=True)]
    assert_is_the_reference(binned)
    assert astuple(measured(images)) == pytest.approx(astuple(measured(binned)), abs=1e-12)


@pytest.mark.parametrize("spread", [0.05, 0.5, 4.0])
def test_pixel_figures_of_a_megapixel_are_within_a_hundred_thousandth(spread: float) -> None:
    images = list(pixels(16, spread))
    assert astuple(measured(images)) == pytest.approx(exact(images), abs=1e-5)


def test_the_exact_way_of_the_benchmark_is_the_reference() -> None:
    images = [(scores[::8, ::8], mask[::8, ::8]) for scores, mask in pixels(4, 0.5)]
    figures = exact(images)
    truth, scores = (np.concatenate([image[part].ravel() for image in images]) for part in (1, 0))
    by_sklearn = roc_auc_score(truth, scores), average_precision_score(truth, scores)
    by_hand = reference_aupro(images, 0.30), reference_aupro(images, 0.05)
    assert figures == pytest.approx((*by_sklearn, *by_hand), abs=1e-9)


def accumulated(images: Pixels) -> PixelMetrics:
    metrics = PixelMetrics()
    for scores, mask in images:
        metrics.add(scores, mask)
    return metrics


@few_bins()
@PATIENT
@given(pictures(), pictures(), st.randoms(), st.sampled_from([0.0, 0.5, 20.0]))
def test_parts_add_up_in_any_order(first: Pixels, second: Pixels, random: Random, spread: float) -> None:
    size = tuple(min(a, b) for a, b in zip(first[0][0].shape, second[0][0].shape, strict=True))
    images = [(scores[: size[0], : size[1]], mask[: size[0], : size[1]]) for scores, mask in first + second]
    images = changed(images, lambda scores: np.exp(spread * scores))
    parts = [accumulated([image]) for image in images] + [PixelMetrics()]
    random.shuffle(parts)
    middle = random.randrange(len(parts))
    total = sum(parts[:middle], PixelMetrics()) + sum(parts[middle:], PixelMetrics())
    whole = measured(images)
    if whole.pixel_auroc is None:
        assert total.result() == whole
    else:
        assert astuple(total.result()) == pytest.approx(astuple(whole), abs=1e-12)


@pytest.mark.slow
def test_parts_from_other_processes_add_up() -> None:
    images = list(pixels(6, 0.5))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as workers:
        parts = list(workers.map(accumulated, [images[:2], images[2:4], images[4:]]))
    assert astuple(sum(parts, PixelMetrics()).result()) == pytest.approx(astuple(measured(images)), abs=1e-12)


def test_adding_leaves_the_parts_alone() -> None:
    scores, mask = canvas()
    mask[0] = True
    scores[0, :5] = 1.0
    part, other = accumulated([(scores, mask)]), accumulated([(1e6 * scores - 1, ~mask)])
    before = part.result(), other.result()
    assert (part + other).result() not in before
    assert (part.result(), other.result()) == before


def test_parts_of_two_resolutions_do_not_add() -> None:
    parts = [accumulated([canvas(side)]) for side in (10, 12)]
    with pytest.raises(WTFlowError, match="resize first"):
        parts[0] + parts[1]


def test_memory_does_not_grow_with_pixels_or_range() -> None:
    metrics = accumulated(list(pixels(4, 12.0)))
    assert metrics._histogram.weights.nbytes <= 3 * 8 * 2**20


def canvas(side: int = 10) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    return np.zeros((side, side), dtype=np.float32), np.zeros((side, side), dtype=bool)


def test_a_perfect_map_has_one_everywhere() -> None:
    scores, mask = canvas()
    mask[2:4, 2:5] = True
    scores[mask] = 1.0
    assert astuple(measured([(scores, mask)])) == pytest.approx((1.0, 1.0, 1.0, 1.0))


def test_a_constant_map_runs_along_the_diagonal() -> None:
    scores, mask = canvas()
    mask[0, :5] = True
    result = measured([(scores, mask)])
    assert result.pixel_auroc == 0.5
    assert result.aupro_30 == pytest.approx(0.30 / 2)
    assert result.aupro_05 == pytest.approx(0.05 / 2)


def test_a_region_missed_wholly_takes_its_share_whatever_its_size() -> None:
    """1 pixel found before any false alarm, 25 pixels never found before FPR 1: PRO = 1/2 up to the end."""
    scores, mask = canvas()
    mask[0, 0] = mask[5:, 5:] = True
    scores[0, 0], scores[5:, 5:] = 2.0, -1.0
    result = measured([(scores, mask)])
    assert result.aupro_30 == pytest.approx(0.5)
    assert result.aupro_05 == pytest.approx(0.5)
    assert result.pixel_auroc == pytest.approx(1 / 26)


def test_the_curve_is_cut_inside_a_tie_by_linear_interpolation() -> None:
    """40 % of the normal pixels tie with the whole region: PRO rises as FPR / 0.4, to 3/4 at 0.30."""
    scores, mask = np.zeros((11, 10), dtype=np.float32), np.zeros((11, 10), dtype=bool)
    mask[10] = True
    scores[10], scores[:4] = 1.0, 1.0
    result = measured([(scores, mask)])
    assert result.aupro_30 == pytest.approx(0.75 / 2)
    assert result.aupro_05 == pytest.approx(0.125 / 2)


def test_the_mean_is_over_the_regions_of_the_line_not_over_images() -> None:
    """Three regions found in one image, one missed in another: 3/4, where the mean of image means is 1/2."""
    found, mask_found = canvas()
    mask_found[[0, 4, 8], 0] = True
    found[mask_found] = 1.0
    missed, mask_missed = canvas()
    mask_missed[0, 0] = True
    missed[0, 0] = -1.0
    assert measured([(found, mask_found), (missed, mask_missed)]).aupro_30 == pytest.approx(0.75)


def test_pixels_that_touch_at_a_corner_are_one_region() -> None:
    """Diagonal neighbours are one region, half found; beside a missed one that makes (1/2 + 0) / 2."""
    scores, mask = canvas()
    mask[0, 0] = mask[1, 1] = mask[8, 8] = True
    scores[0, 0], scores[1, 1], scores[8, 8] = 1.0, -1.0, -1.0
    assert measured([(scores, mask)]).aupro_30 == pytest.approx(0.25)


def test_good_images_count_in_the_false_positive_rate() -> None:
    """10 of 190 normal pixels lie above the region, all in a good image: PRO is 0 to FPR 10/190, then 1."""
    scores, mask = canvas()
    mask[0] = True
    scores[0] = 1.0
    good, empty = canvas()
    good[0] = 2.0
    assert measured([(scores, mask), (good, empty)]).aupro_30 == pytest.approx(1 - (10 / 190) / 0.30)


def test_float_ties_are_merged_across_images() -> None:
    """The same float32 value in two images is one threshold, in whatever order the images came."""
    defective, mask = canvas()
    mask[0] = True
    defective[0] = np.float32(0.1)
    good, empty = canvas()
    good[:] = 0.1  # rounds to the same float32
    first, second = measured([(defective, mask), (good, empty)]), measured([(good, empty), (defective, mask)])
    assert first == second
    assert first.pixel_auroc == pytest.approx((90 + 100 / 2) / 190)


def test_infinite_scores_are_scores() -> None:
    scores, mask = canvas()
    mask[0] = True
    scores[0] = np.inf
    assert astuple(measured([(scores, mask)])) == pytest.approx((1.0, 1.0, 1.0, 1.0))


def test_undefined_pixel_figures_are_none() -> None:
    scores, mask = canvas()
    nothing = PixelResult(None, None, None, None)
    assert measured([]) == nothing
    assert measured([(scores, mask)]) == nothing
    assert measured([(scores, ~mask)]) == nothing


def test_shapes_and_types_are_checked() -> None:
    scores, mask = canvas()
    metrics = PixelMetrics()
    with pytest.raises(WTFlowError, match="one shape"):
        metrics.add(scores, mask[:5])
    with pytest.raises(WTFlowError, match="bool"):
        metrics.add(scores, mask.astype(np.uint8))
    metrics.add(scores, mask)
    with pytest.raises(WTFlowError, match="resize first"):
        metrics.add(*canvas(side=12))


@PATIENT
@given(pictures(), st.integers(0, 2**32 - 1))
def test_saturated_regions_equal_the_reference(images: Pixels, seed: int) -> None:
    """One to three masks an image, overlapping and not connected, each with its own saturation."""
    generator, metrics = np.random.default_rng(seed), PixelMetrics()
    regions, normal = list[tuple[NDArray[np.float32], float]](), []
    for scores, _ in changed(images, lambda scores: 1 + scores / 50):
        masks = [generator.random(scores.shape) < 0.3 for _ in range(generator.integers(1, 4))]
        for mask in masks:
            mask[0, 0], mask[-1, -1] = True, False
        saturations = [saturation_area(int(mask.sum()), generator.uniform(0.1, 1.0), True) for mask in masks]
        metrics.add_regions(scores, [SaturatedRegion(*pair) for pair in zip(masks, saturations, strict=True)])
        regions += [(scores[mask], saturation) for mask, saturation in zip(masks, saturations, strict=True)]
        normal.append(scores[~np.any(masks, axis=0)])
    assert metrics.result().aupro_05 == pytest.approx(reference_area(regions, np.concatenate(normal), 0.05), abs=1e-9)
    assert metrics.result().aupro_30 == pytest.approx(reference_area(regions, np.concatenate(normal), 0.30), abs=1e-9)


def test_a_saturated_region_is_covered_when_enough_of_it_is_found() -> None:
    """A logical anomaly of 50 pixels that saturates at 10: finding 10 of them is as good as all, 5 are half."""
    for found, covered in ((5, 0.5), (10, 1.0), (50, 1.0)):
        scores, mask = canvas()
        mask[5:] = True
        scores[5:] = -1.0
        scores[mask] = np.where(np.arange(50) < found, 1.0, -1.0)
        metrics = PixelMetrics()
        metrics.add_regions(scores, [SaturatedRegion(mask, 10)])
        assert metrics.result().aupro_05 == pytest.approx(covered)


def test_regions_that_saturate_at_their_area_are_the_components_of_a_mask() -> None:
    scores, mask = next(image for image in pixels(2, 0.5) if image[1].any())
    parts = [np.zeros_like(mask) for _ in reference_regions(mask)]
    for part, region in zip(parts, reference_regions(mask), strict=True):
        part[tuple(np.array(sorted(region)).T)] = True
    metrics = PixelMetrics()
    metrics.add_regions(scores, [SaturatedRegion(part, int(part.sum())) for part in parts])
    assert astuple(metrics.result()) == pytest.approx(astuple(measured([(scores, mask)])), abs=1e-12)


def test_an_image_without_regions_is_a_good_one() -> None:
    scores, mask = canvas()
    mask[0] = True
    scores[0] = 1.0
    good = np.full_like(scores, 2.0)
    ours, theirs = PixelMetrics(), PixelMetrics()
    for metrics in (ours, theirs):
        metrics.add(scores, mask)
    ours.add_regions(good, [])
    theirs.add(good, np.zeros_like(mask))
    assert ours.result() == theirs.result()


def test_saturations_of_both_kinds() -> None:
    assert saturation_area(400, 0.5, relative=True) == 200
    assert saturation_area(11, 0.5, relative=True) == 5
    assert saturation_area(1, 0.5, relative=True) == 1
    assert saturation_area(400, 300, relative=False) == 300
    assert saturation_area(400, 1000, relative=False) == 400


@pytest.mark.parametrize("saturation", [0, -1, 11])
def test_a_saturation_outside_the_region_is_refused_and_nothing_is_counted(saturation: float) -> None:
    scores, mask = canvas()
    mask[0] = True
    metrics = accumulated([(scores, mask)])
    before = metrics.result()
    with pytest.raises(WTFlowError, match=r"10 pixels cannot saturate.*saturation_area"):
        metrics.add_regions(scores, [SaturatedRegion(mask, saturation)])
    assert metrics.result() == before
