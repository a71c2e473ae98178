import base64
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.gallery import OUTLINE, colour_scale, galleries, outlined
from pipelines.report import report
from tests.pipelines.evaluations import evaluation_of, photograph, scored_image, scored_images
from wtflow.artefact import sha256_bytes
from wtflow.errors import DigestError, WTFlowError


def picture(uri: str) -> Image.Image:
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(BytesIO(base64.b64decode(data, validate=True))).convert("RGB")


def paths(raw: Path, size: int) -> list[list[str]]:
    return [
        [card.image.path for card in gallery.cards]
        for gallery in galleries(evaluation_of(scored_images(raw), raw), raw, size)
    ]


def test_the_hardest_images_come_first(tmp_path: Path) -> None:
    normal, missed, _ = paths(tmp_path, 2)
    assert normal == ["normal/4.png", "normal/3.png"]
    assert missed == ["anomalous/0.png", "anomalous/1.png"]


def test_the_other_anomalous_images_are_at_even_steps(tmp_path: Path) -> None:
    images = [scored_image(tmp_path, f"{number}.png", "anomalous", 0.1 * number) for number in range(14)]
    missed, others = galleries(evaluation_of(images, tmp_path), tmp_path, 4)
    assert [card.image.path for card in missed.cards] == [f"{number}.png" for number in range(4)]
    assert [card.image.path for card in others.cards] == ["6.png", "11.png"]  # of the ten from 4 to 13


def test_a_gallery_larger_than_the_line_shows_every_image_once(tmp_path: Path) -> None:
    assert [len(set(shown)) for shown in paths(tmp_path, 50)] == [5, 4]


def test_a_gallery_of_none_reads_no_picture(tmp_path: Path) -> None:
    evaluation = evaluation_of(scored_images(tmp_path), tmp_path)
    for image in evaluation.images:
        (tmp_path / image.path).unlink()
    assert galleries(evaluation, tmp_path, 0) == []


def test_equal_scores_are_ordered_by_image_id(tmp_path: Path) -> None:
    images = [scored_image(tmp_path, f"{number}.png", "normal", 0.5) for number in range(5)]
    shown = galleries(evaluation_of(images, tmp_path), tmp_path, 5)[0].cards
    assert [card.image.image_id for card in shown] == sorted(image.image_id for image in images)


def test_photograph_and_heat_map_are_of_one_size_and_large_ones_are_reduced(tmp_path: Path) -> None:
    small = scored_image(tmp_path, "small.png", "normal", 0.3)
    data = photograph(7, width=900, height=600)
    (tmp_path / "large.png").write_bytes(data)
    large = replace(small, path="large.png", image_id=sha256_bytes(data))
    for image, size in ((small, (40, 30)), (large, (320, 213))):
        card = galleries(evaluation_of([image], tmp_path), tmp_path, 1)[0].cards[0]
        assert picture(card.photograph).size == picture(card.heat).size == size


def test_a_photograph_that_is_not_the_scored_one_is_refused(tmp_path: Path) -> None:
    evaluation = evaluation_of([scored_image(tmp_path, "n.png", "normal", 0.2)], tmp_path)
    (tmp_path / "n.png").write_bytes(photograph(8))
    with pytest.raises(DigestError, match=r"n\.png.*not the image that was scored"):
        galleries(evaluation, tmp_path, 1)


def test_a_mask_is_outlined_on_the_heat_map_alone(tmp_path: Path) -> None:
    evaluation = evaluation_of(scored_images(tmp_path, masks=True), tmp_path)
    normal, anomalous = galleries(evaluation, tmp_path, 6)
    assert all(card.outlined for card in anomalous.cards)
    assert not any(card.outlined for card in normal.cards)


def test_the_outline_follows_the_border_of_the_mask() -> None:
    mask = np.zeros((20, 20), dtype=bool)
    mask[5:15, 5:15] = True
    drawn = (np.asarray(outlined(Image.new("RGB", (20, 20)), mask)) == OUTLINE).all(axis=2)
    assert drawn[4, 8]
    assert not drawn[5:15, 5:15].any()  # what is marked stays to be seen
    assert not drawn[:4].any()


def test_pictures_far_wider_than_high_stand_one_above_the_other(tmp_path: Path) -> None:
    one = scored_image(tmp_path, "one.png", "normal", 0.3)
    for width, flat in ((174, False), (176, True), (40, False)):
        data = photograph(7, width, height=100)
        (tmp_path / "one.png").write_bytes(data)
        evaluation = evaluation_of([replace(one, image_id=sha256_bytes(data))], tmp_path)
        assert galleries(evaluation, tmp_path, 1)[0].cards[0].flat == flat
        assert ('<div class="pair flat">' in report(evaluation, tmp_path, 1)) == flat


def test_a_missing_photograph_is_named_with_the_remedy(tmp_path: Path) -> None:
    evaluation = evaluation_of(scored_images(tmp_path), tmp_path)
    (tmp_path / "normal/4.png").unlink()
    with pytest.raises(WTFlowError, match=r"normal/4\.png.*dvc checkout"):
        galleries(evaluation, tmp_path, 6)


def test_the_colour_scale_runs_from_blue_to_red() -> None:
    strip = np.asarray(picture(colour_scale(0.5))).astype(int)
    assert strip[6, 0, 2] > strip[6, 0, 0] + 30
    assert strip[6, -1, 0] > strip[6, -1, 2] + 100
