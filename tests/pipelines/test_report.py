import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipelines.evaluation import Evaluation
from pipelines.report import defects, expected_fpr, percent, rates, report
from tests.pipelines.evaluations import CALIBRATION, evaluation_of, scored_image, scored_images


class Page(HTMLParser):
    """Text and picture sources of a page; fails on tags that are left open."""

    VOID = frozenset({"meta", "img", "link", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.open: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).replace("\xa0", " ").split())


def page(evaluation: Evaluation, raw: Path, gallery_size: int = 6) -> Page:
    return Page(report(evaluation, raw, gallery_size))


def test_the_page_says_what_was_measured(tmp_path: Path) -> None:
    text = page(evaluation_of(scored_images(tmp_path, masks=True), tmp_path), tmp_path).text
    assert "Of 5 normal test images the model flags 1; of 4 anomalous ones it finds 2." in text
    assert "uncertain 3 1 2 66.7 %" in text
    low, high = evaluation_of(scored_images(tmp_path), tmp_path).auroc_interval() or (0, 0)
    assert f"0.825 95 % interval {low:.3f} to {high:.3f};" in text
    assert "(bootstrap, 9 groups)" in text
    assert "An oracle: it has seen the answers." in text
    assert "b" * 64 in text
    assert "d" * 32 + ".dir" in text
    assert "normal/4.png" in text
    assert "crack 3 1 33.3 %" in text
    assert "A green line is the outline" in text
    assert "pixel_aupro_05" in text


def test_the_page_holds_all_that_it_shows(tmp_path: Path) -> None:
    shown = page(evaluation_of(scored_images(tmp_path, masks=True), tmp_path), tmp_path, gallery_size=2)
    assert "script" not in shown.tags
    assert len(shown.sources) == 2 + 1 + 2 * (2 + 2 + 1)  # charts, colour scale, photograph and heat map a card
    assert all(source.startswith("data:image/") for source in shown.sources)


def test_the_same_evaluation_gives_the_same_page(tmp_path: Path) -> None:
    evaluation = evaluation_of(scored_images(tmp_path, masks=True), tmp_path)
    assert report(evaluation, tmp_path, 6) == report(evaluation, tmp_path, 6)


def test_without_masks_the_page_says_so(tmp_path: Path) -> None:
    text = page(evaluation_of(scored_images(tmp_path), tmp_path), tmp_path).text
    assert "no anomalous image of this line has a mask" in text
    assert "pixel_auroc" not in text
    assert "green line" not in text


def test_images_left_out_of_the_pixel_figures_are_counted(tmp_path: Path) -> None:
    extra = scored_image(tmp_path, "unmarked.png", "anomalous", 1.1, "crack")
    text = page(evaluation_of([*scored_images(tmp_path, masks=True), extra], tmp_path), tmp_path).text
    assert "4 anomalous images have a mask. 1 have none" in text


@pytest.mark.parametrize("label", ["normal", "anomalous", "uncertain"])
def test_a_line_with_one_label_alone_has_a_page(tmp_path: Path, label: str) -> None:
    images = [image for image in scored_images(tmp_path) if image.label == label]
    text = page(evaluation_of(images, tmp_path), tmp_path).text
    assert "nan" not in re.split(r"\W+", text.lower())
    assert "None" not in text.replace("None of these images", "")
    assert (label == "anomalous") != ("There is no anomalous one" in text)


def test_names_are_text_not_markup(tmp_path: Path) -> None:
    image = scored_image(tmp_path, "<b>&amp;.png", "anomalous", 1.1, "<script>alert(1)</script>")
    shown = page(evaluation_of([*scored_images(tmp_path), image], tmp_path), tmp_path)
    assert "script" not in shown.tags
    assert "<b>&amp;.png" in shown.text


def test_defects_are_listed_hardest_first_when_there_are_several(tmp_path: Path) -> None:
    rows = defects(evaluation_of(scored_images(tmp_path), tmp_path))
    assert [(row.name, row.images, row.flagged) for row in rows] == [("crack", 3, 1), ("dent", 1, 1)]
    assert rows[1].auroc == 1.0
    images = [image for image in scored_images(tmp_path) if image.defect != "dent"]
    assert defects(evaluation_of(images, tmp_path)) == []


def test_the_expected_rate_covers_what_chance_does() -> None:
    """Calibration and test scores drawn alike, 4000 times: the measured FPR falls inside in at least 95 %."""
    generator = np.random.default_rng(0)
    expected = expected_fpr(CALIBRATION, 60)
    assert expected is not None
    fpr = []
    for _ in range(4000):
        calibration = replace(CALIBRATION, scores=np.sort(generator.random(len(CALIBRATION.scores))))
        fpr.append(np.mean(generator.random(60) > calibration.threshold))
    inside = (np.array(fpr) >= expected.low) & (np.array(fpr) <= expected.high)
    assert 0.94 < inside.mean() < 0.98
    assert expected.low < np.mean(fpr) < expected.high


def test_more_false_alarms_than_chance_explains_are_said_aloud(tmp_path: Path) -> None:
    expected = expected_fpr(CALIBRATION, 40)
    assert expected is not None
    warning, in_keeping = "It was more than chance explains.", "The measured share lies in that range."
    for flagged, said, unsaid in ((30, warning, in_keeping), (4, in_keeping, warning)):
        assert (flagged / 40 > expected.high) == (said == warning)
        scores = [2.0] * flagged + [0.1] * (40 - flagged)
        images = [scored_image(tmp_path, f"{n}.png", "normal", score) for n, score in enumerate(scores)]
        text = page(evaluation_of(images, tmp_path), tmp_path, gallery_size=0).text
        assert said in text
        assert unsaid not in text


def test_a_band_for_review_is_shown_when_the_line_has_one(tmp_path: Path) -> None:
    evaluation = evaluation_of(scored_images(tmp_path), tmp_path)
    assert "to review" not in page(evaluation, tmp_path).text
    calibration = replace(CALIBRATION, review_fpr=0.2)  # thresholds 0.8 and 0.9
    images = [
        replace(one, verdict=replace(one.verdict, needs_review=calibration.needs_review(one.verdict.score)))
        for one in evaluation.images
    ]
    banded = replace(evaluation, images=images, bundle=replace(evaluation.bundle, calibration=calibration))
    text = page(banded, tmp_path).text
    assert "anomalous 4 1 1 2 50.0 %" in text  # 0.3 passes, 0.85 to review
    assert "scores above 0.8000 that are not flagged. At most 20.0 %" in text
    assert "to review score 0.8500" in text


def chance_level(raw: Path, shift: float) -> Evaluation:
    """Twelve normal and twelve anomalous images, the scores of these `shift` higher."""
    images = [
        scored_image(raw, f"{label}/{number}.png", label, number / 10 + shift * (label == "anomalous"))
        for label in ("normal", "anomalous")
        for number in range(1, 13)
    ]
    return evaluation_of(images, raw)


def test_a_model_no_better_than_chance_is_called_so_in_the_lead(tmp_path: Path) -> None:
    said = "no better than chance, as far as these 24 images tell. Image AUROC is 0.5"
    assert said in page(chance_level(tmp_path, 0.0), tmp_path, 0).text
    assert "no better than chance" not in page(chance_level(tmp_path, 0.9), tmp_path, 0).text


def test_other_rates_flag_what_their_p_values_say(tmp_path: Path) -> None:
    evaluation = evaluation_of(scored_images(tmp_path), tmp_path)
    found = rates(evaluation)
    assert [rate.target_fpr for rate in found] == [0.01, 0.02, 0.05, 0.1, 0.2]
    for rate in found:
        for label, count in (("normal", rate.normal), ("anomalous", rate.anomalous)):
            p_values = [image.verdict.p_value for image in evaluation.labelled(label)]
            flagged = sum(p_value <= rate.target_fpr for p_value in p_values)
            assert (count and (count.images, count.flagged)) == (
                (len(p_values), flagged) if rate.needed <= 39 else None
            )
    assert [(rate.normal is None) for rate in found] == [True, True, False, False, False]  # of 39 to calibrate


def test_the_table_of_rates_marks_the_one_in_use_and_those_that_cannot_be(tmp_path: Path) -> None:
    evaluation = evaluation_of(scored_images(tmp_path), tmp_path)
    text = page(evaluation, tmp_path, 0).text
    assert "1.0 % – – 99 not possible: there are 39" in text
    assert "10.0 % 1 of 5, 20.0 % 2 of 4, 50.0 % 9 in use" in text
    assert (
        "from the 39 normal calibration images alone; this table is to weigh missed defects against false alarms"
        in text
    )
    calibration = replace(CALIBRATION, target_fpr=0.3)
    asked = replace(evaluation, bundle=replace(evaluation.bundle, calibration=calibration))
    assert [rate.target_fpr for rate in rates(asked)][-1] == 0.3
    assert re.search(r"30\.0 % \d of 5, \S+ % \d of 4, \S+ % 3 in use", page(asked, tmp_path, 0).text)


def test_percent() -> None:
    assert percent(0.0523) == "5.2\N{NO-BREAK SPACE}%"
    assert percent(None) == "–"
