import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.evaluation import ScoredImage, enlarged, evaluate_pixels, read_mask, read_regions
from tests.pipelines.evaluations import (
    LIMITS,
    SCORES,
    evaluation_of,
    png,
    scored_image,
    scored_images,
    square_mask,
)
from wtflow.data.masks import read_saturations
from wtflow.errors import WTFlowError
from wtflow.scoring.metrics import PixelMetrics, PixelResult, SaturatedRegion, auroc

KEYS = {
    "image_auroc", "image_ap", "image_f1", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_aupro_30",
    "pixel_aupro_05", "pixel_spro_05", "threshold",
    "target_fpr", "fpr", "tpr", "n_test_normal", "n_test_anomalous", "uncertain_above_threshold", "bundle_digest",
    "seed",
}  # fmt: skip


def test_headline_figures(tmp_path: Path) -> None:
    evaluation = evaluation_of(scored_images(tmp_path, masks=True), tmp_path)
    metrics, pixels = evaluation.metrics(), evaluation.pixels.result
    assert set(metrics) == KEYS
    assert metrics["image_f1"] == round(2 * 2 / (2 + 1 + 4), 6)
    assert metrics["image_auroc"] == 0.825  # 16 pairs in order, 1 tie, of 20
    assert (metrics["threshold"], metrics["target_fpr"]) == (0.9, 0.1)
    assert (metrics["fpr"], metrics["tpr"]) == (0.2, 0.5)
    assert (metrics["n_test_normal"], metrics["n_test_anomalous"]) == (5, 4)
    assert metrics["uncertain_above_threshold"] == 0.666667
    assert (metrics["bundle_digest"], metrics["seed"]) == ("b" * 64, 3)
    assert metrics["pixel_auroc"] == pytest.approx(pixels.pixel_auroc, abs=5e-7)
    assert metrics["pixel_ap"] == pytest.approx(pixels.pixel_ap, abs=5e-7)
    assert metrics["pixel_aupro_30"] == pytest.approx(pixels.aupro_30, abs=5e-7)
    assert metrics["pixel_aupro_05"] == pytest.approx(pixels.aupro_05, abs=5e-7)
    assert 0.5 < metrics["pixel_aupro_05"] < metrics["pixel_aupro_30"] < metrics["pixel_auroc"] < 1.0


def test_the_interval_of_the_auroc_draws_groups(tmp_path: Path) -> None:
    """All images of a kind in two groups leave chance fewer ways than each image for itself."""
    images = scored_images(tmp_path)
    alone = evaluation_of(images, tmp_path).auroc_interval()
    pairs = [replace(image, group=f"{image.label}{image.verdict.score > 0.35}") for image in images]
    grouped = evaluation_of(pairs, tmp_path).auroc_interval()
    assert alone is not None
    assert grouped is not None
    assert grouped != alone
    assert alone.low < 0.825 < alone.high
    normal = [image for image in images if image.label == "normal"]
    assert evaluation_of(normal, tmp_path).auroc_interval() is None
    assert evaluation_of(normal, tmp_path).at_chance() is None


@pytest.mark.parametrize(("shift", "at_chance"), [(-0.6, True), (0.0, True), (0.1, True), (0.9, False)])
def test_chance_is_told_where_the_interval_reaches_it(shift: float, at_chance: bool, tmp_path: Path) -> None:
    images = [
        scored_image(tmp_path, f"{label}/{number}.png", label, number / 10 + shift * (label == "anomalous"))
        for label in ("normal", "anomalous")
        for number in range(1, 13)
    ]
    evaluation = evaluation_of(images, tmp_path)
    assert evaluation.at_chance() == (evaluation.auroc_interval() if at_chance else None)


def test_uncertain_images_change_no_headline_figure(tmp_path: Path) -> None:
    images = scored_images(tmp_path, masks=True)
    with_them = evaluation_of(images, tmp_path).metrics()
    without = evaluation_of([image for image in images if image.label != "uncertain"], tmp_path).metrics()
    assert {key for key in KEYS if with_them[key] != without[key]} == {"uncertain_above_threshold"}
    assert without["uncertain_above_threshold"] is None


def test_what_the_data_do_not_define_is_none(tmp_path: Path) -> None:
    images = [image for image in scored_images(tmp_path) if image.label == "normal"]
    metrics = evaluation_of(images, tmp_path).metrics()
    undefined = {key for key, value in metrics.items() if value is None}
    assert undefined == {
        "image_auroc", "image_ap", "image_f1", "image_f1_max", "tpr", "uncertain_above_threshold",
        "pixel_auroc", "pixel_ap", "pixel_aupro_30", "pixel_aupro_05", "pixel_spro_05",
    }  # fmt: skip


def test_without_masks_there_are_no_pixel_figures(tmp_path: Path) -> None:
    pixels = evaluate_pixels(scored_images(tmp_path), tmp_path, (32, 32), LIMITS)
    assert pixels.result == PixelResult(None, None, None, None)
    assert (pixels.masked, pixels.left_out) == (0, 4)


def test_an_anomalous_image_without_a_usable_mask_is_left_out_of_the_pixel_figures(tmp_path: Path) -> None:
    images = scored_images(tmp_path, masks=True)
    before = evaluate_pixels(images, tmp_path, (32, 32), LIMITS)
    empty = Image.new("L", (40, 30))
    more = [
        *images,
        scored_image(tmp_path, "anomalous/none.png", "anomalous", 5.0, "crack"),
        scored_image(tmp_path, "anomalous/empty.png", "anomalous", 6.0, "crack", empty),
    ]
    after = evaluate_pixels(more, tmp_path, (32, 32), LIMITS)
    assert after.result == before.result
    assert (before.masked, before.left_out) == (4, 0)
    assert (after.masked, after.left_out) == (4, 2)


def test_pixel_figures_see_normal_images_and_no_uncertain_ones(tmp_path: Path) -> None:
    """Maps that are 1 everywhere: a normal one ties with the defect, an uncertain one does not matter."""
    defective = scored_image(tmp_path, "a.png", "anomalous", 1.0, "crack", square_mask())
    alone = evaluate_pixels([defective], tmp_path, (32, 32), LIMITS).result.pixel_auroc
    normal = scored_image(tmp_path, "n.png", "normal", 1.0)
    uncertain = scored_image(tmp_path, "u.png", "uncertain", 1.0)
    with_normal = evaluate_pixels([defective, normal], tmp_path, (32, 32), LIMITS).result.pixel_auroc
    with_uncertain = evaluate_pixels([defective, uncertain], tmp_path, (32, 32), LIMITS).result.pixel_auroc
    assert alone is not None
    assert with_normal is not None
    assert with_normal < alone == with_uncertain


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "I;16"])
def test_masks_of_any_mode_are_read_alike(tmp_path: Path, mode: str) -> None:
    white_65535 = Image.fromarray(np.asarray(square_mask()).astype(np.uint16) * 257)
    mask = white_65535 if mode == "I;16" else square_mask().convert(mode)
    (tmp_path / "mask.png").write_bytes(png(mask))
    expected = np.zeros((60, 80), dtype=bool)
    expected[:30, :40] = True
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", (60, 80), LIMITS), expected)


def test_a_mask_is_true_above_half(tmp_path: Path) -> None:
    levels = np.array([[0, 127, 128, 255]], dtype=np.uint8).repeat(16, axis=0).repeat(8, axis=1)
    (tmp_path / "mask.png").write_bytes(png(Image.fromarray(levels)))
    mask = read_mask(tmp_path / "mask.png", (16, 4), LIMITS)
    np.testing.assert_array_equal(mask, np.array([[False, False, True, True]]).repeat(16, axis=0))


def test_a_mask_is_resized_to_the_nearest_pixel(tmp_path: Path) -> None:
    """A line of one pixel in 32 is met by the middle of column 1 of 4; a mean over pixels would lose it."""
    levels = np.zeros((16, 32), dtype=np.uint8)
    levels[:, 12] = 255
    (tmp_path / "mask.png").write_bytes(png(Image.fromarray(levels)))
    mask = read_mask(tmp_path / "mask.png", (16, 4), LIMITS)
    np.testing.assert_array_equal(mask, np.array([[False, True, False, False]]).repeat(16, axis=0))


def test_a_coloured_mask_counts_by_its_brightest_channel(tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_bytes(png(Image.new("RGB", (20, 20), (255, 0, 0))))
    assert read_mask(tmp_path / "mask.png", (4, 4), LIMITS).all()


def test_a_missing_mask_is_named_with_the_remedy(tmp_path: Path) -> None:
    images = scored_images(tmp_path, masks=True)
    (tmp_path / "masks/anomalous/2.png").unlink()
    with pytest.raises(WTFlowError, match=r"masks/anomalous/2\.png.*dvc checkout"):
        evaluate_pixels(images, tmp_path, (32, 32), LIMITS)


def test_scores_and_counts_by_label(tmp_path: Path) -> None:
    evaluation = evaluation_of(scored_images(tmp_path), tmp_path)
    for label, scores in SCORES.items():
        assert sorted(evaluation.scores(label)) == scores
    assert [evaluation.flagged(label) for label in SCORES] == [1, 2, 2]
    assert auroc(evaluation.scores("normal"), evaluation.scores("anomalous")) == pytest.approx(0.825)


def loco(raw: Path, kinds: list[dict[str, object]] | None, score: float = 1.0) -> list[ScoredImage]:
    """An anomalous image whose map lights up in the upper left quarter, with two regions, and a normal one."""
    image = replace(scored_image(raw, "test/logical_anomalies/000.png", "anomalous", score), mask_path="masks/000")
    for number, (rows, columns, level) in enumerate(
        [(slice(0, 16), slice(0, 32), 255), (slice(24, 32), slice(0, 8), 254)]
    ):
        pixels = np.zeros((32, 64), dtype=np.uint8)
        pixels[rows, columns] = level
        (raw / "masks/000").mkdir(parents=True, exist_ok=True)
        (raw / f"masks/000/{number:03d}.png").write_bytes(png(Image.fromarray(pixels)))
    if kinds is not None:
        (raw / "defects_config.json").write_text(json.dumps(kinds))
    return [image, scored_image(raw, "test/good/000.png", "normal", 0.1)]


def kind(level: int, threshold: float, relative: bool) -> dict[str, object]:
    return {"pixel_value": level, "saturation_threshold": threshold, "relative_saturation": relative}


def test_masks_of_regions_are_united_for_pixel_figures_and_saturate_for_spro(tmp_path: Path) -> None:
    """By hand: at 32 x 64 the regions have 512 and 64 pixels. The map is flat with one bright quarter (align_corners: 4
    places over 64 columns), so scores fall from the left to the right; sPRO follows from its definition."""
    images = loco(tmp_path, [kind(255, 128, False), kind(254, 0.5, True)])
    found = evaluate_pixels(images, tmp_path, (32, 64), LIMITS)
    maps = [enlarged(image.verdict.anomaly_map, (32, 64)) for image in images]
    first, second = np.zeros((2, 32, 64), dtype=bool)
    first[:16, :32], second[24:32, :8] = True, True
    reference = PixelMetrics()
    reference.add_regions(maps[0], [SaturatedRegion(first, 128.0), SaturatedRegion(second, 32.0)])
    reference.add_regions(maps[1], [])
    united = PixelMetrics()
    united.add(maps[0], first | second)
    united.add(maps[1], np.zeros_like(first))
    assert found.spro_05 == reference.result().aupro_05
    assert found.result == united.result()
    assert found.spro_05 is not None
    assert found.result.aupro_05 is not None
    assert found.spro_05 > found.result.aupro_05
    assert (found.masked, found.left_out) == (1, 0)


def test_spro_is_the_mean_over_the_kinds_of_defect(tmp_path: Path) -> None:
    """One kind that is found and one that is not: each with the good images, not all regions together."""
    images = loco(tmp_path, None)
    anomalous = next(image for image in images if image.label == "anomalous")
    (good,) = (image for image in images if image.label == "normal")
    blind = replace(
        anomalous, defect="other", verdict=replace(anomalous.verdict, anomaly_map=np.zeros((4, 4), np.float32))
    )
    kinds = [[anomalous, anomalous], [blind]]
    alone = [evaluate_pixels([*one, good], tmp_path, (32, 64), LIMITS).spro_05 for one in kinds]
    together = evaluate_pixels([*kinds[0], *kinds[1], good], tmp_path, (32, 64), LIMITS).spro_05
    assert None not in alone
    assert alone[0] != alone[1]
    assert together == pytest.approx(np.mean([one for one in alone if one is not None]))


def test_a_saturation_is_the_same_share_at_every_resolution(tmp_path: Path) -> None:
    images = loco(tmp_path, [kind(255, 256, False), kind(254, 1000, False)])
    saturations = read_saturations(tmp_path)
    for size in ((32, 64), (16, 32)):
        first, second = read_regions(tmp_path, str(images[0].mask_path), size, LIMITS, saturations)
        assert first.saturation == pytest.approx(first.mask.sum() / 2)
        assert second.saturation == second.mask.sum() == 64 / (1024 / (size[0] * size[1] / 2))


def test_without_saturations_a_region_is_found_when_all_of_it_is(tmp_path: Path) -> None:
    images = loco(tmp_path, None)
    regions = read_regions(tmp_path, str(images[0].mask_path), (32, 64), LIMITS, {})
    assert [region.saturation for region in regions] == [512.0, 64.0]
    assert evaluate_pixels(images, tmp_path, (32, 64), LIMITS).spro_05 is not None


def test_a_line_without_regions_has_no_spro(tmp_path: Path) -> None:
    evaluation = evaluation_of(scored_images(tmp_path, masks=True), tmp_path)
    assert evaluation.pixels.spro_05 is None
    assert evaluation.metrics()["pixel_spro_05"] is None


def test_a_folder_of_masks_is_outlined_as_one(tmp_path: Path) -> None:
    loco(tmp_path, None)
    mask = read_mask(tmp_path / "masks/000", (32, 64), LIMITS)
    assert (mask[0, 0], mask[31, 0], mask[31, 20]) == (True, True, False)
