"""The evaluation report of a line: one HTML file with its pictures inside, to be read offline or mailed."""

from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
from scipy import stats

from pipelines.charts import histogram, roc_curve
from pipelines.evaluation import Evaluation
from pipelines.false_alarms import holds, images_needed
from pipelines.gallery import colour_scale, data_uri, galleries
from wtflow.scoring.bootstrap import Interval, clopper_pearson
from wtflow.scoring.calibration import Calibration, conformal_rank
from wtflow.scoring.metrics import auroc

TEMPLATE = Path(__file__).with_name("report.html.j2")
LABELS = ("normal", "anomalous", "uncertain")
CONFIDENCE = 0.95
RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
"""False-alarm rates to compare with the one in use."""


@dataclass(frozen=True)
class Count:
    """How many images of a label or kind of defect there are, and how many of them were flagged."""

    name: str
    images: int
    flagged: int
    review: int = 0
    """Put to a person: not flagged, but near it."""
    auroc: float | None = None
    """Of these images against the normal ones."""

    @property
    def share(self) -> float | None:
        """Flagged over all; None if there are none."""
        return self.flagged / self.images if self.images else None


@dataclass(frozen=True)
class Rate:
    """What another false-alarm rate would do to the test images."""

    target_fpr: float
    needed: int
    """Calibration images that it needs."""
    normal: Count | None
    """None, as `anomalous`, if the calibration images at hand cannot hold the rate."""
    anomalous: Count | None


def rates(evaluation: Evaluation) -> list[Rate]:
    """`RATES` and the one in use, ascending. A rate flags the images whose p-value is not above it."""
    calibration = evaluation.bundle.calibration
    found = []
    for rate in sorted({*RATES, calibration.target_fpr}):
        counts: list[Count | None] = [None, None]
        if holds(len(calibration.scores), rate):
            threshold = replace(calibration, target_fpr=rate).threshold
            counts = [
                Count(label, len(scores), int((scores > threshold).sum()))
                for label in ("normal", "anomalous")
                for scores in (evaluation.scores(label),)
            ]
        found.append(Rate(rate, images_needed(rate), *counts))
    return found


def expected_fpr(calibration: Calibration, images: int) -> Interval | None:
    """Where the FPR on `images` new normal images may fall if they are like the calibration normals.

    The threshold is the k-th smallest of n calibration scores, itself drawn by chance: its false-alarm rate follows
    Beta(n + 1 - k, k), and so the number flagged is beta-binomial. None if there are no images.
    """
    if not images:
        return None
    n = len(calibration.scores)
    k = conformal_rank(n, calibration.target_fpr)
    low, high = stats.betabinom(images, n + 1 - k, k).interval(CONFIDENCE)
    return Interval(float(low) / images, float(high) / images)


def report(evaluation: Evaluation, raw: Path, gallery_size: int) -> str:
    """The page. `raw` is the folder that the manifest's paths start from."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, figure=figure, counted=counted)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    counts = {label: count(evaluation, label) for label in LABELS}
    return template.render(
        evaluation=evaluation,
        metrics=evaluation.metrics(),
        counts=counts,
        expected=expected_fpr(evaluation.bundle.calibration, counts["normal"].images),
        fpr_interval=clopper_pearson(counts["normal"].flagged, counts["normal"].images),
        tpr_interval=clopper_pearson(counts["anomalous"].flagged, counts["anomalous"].images),
        auroc_interval=evaluation.auroc_interval(),
        at_chance=evaluation.at_chance(),
        rates=rates(evaluation),
        groups=len({image.group for image in evaluation.images if image.label != "uncertain"}),
        defects=defects(evaluation),
        histogram=histogram_uri(evaluation),
        roc=roc_uri(evaluation),
        colours=colour_scale(evaluation.bundle.calibration.pixel_threshold),
        galleries=galleries(evaluation, raw, gallery_size),
    )


def count(evaluation: Evaluation, label: str) -> Count:
    """The images of one label."""
    images = evaluation.labelled(label)
    review = sum(image.verdict.needs_review for image in images)
    return Count(label, len(images), evaluation.flagged(label), review)


def defects(evaluation: Evaluation) -> list[Count]:
    """A count for each kind of defect, the hardest to find first; empty when the line knows only one kind."""
    anomalous, normal = evaluation.labelled("anomalous"), evaluation.scores("normal")
    kinds = sorted({image.defect for image in anomalous})
    counts = []
    for kind in kinds if len(kinds) > 1 else ():
        verdicts = [image.verdict for image in anomalous if image.defect == kind]
        flagged, area = sum(v.is_anomalous for v in verdicts), auroc(normal, [v.score for v in verdicts])
        counts.append(Count(kind, len(verdicts), flagged, auroc=area))
    return sorted(counts, key=lambda count: (count.share or 0.0, count.name))


def histogram_uri(evaluation: Evaluation) -> str:
    """The histogram of all labels that occur."""
    scores = {label: evaluation.scores(label) for label in LABELS}
    return data_uri("image/png", histogram(scores, evaluation.bundle.calibration.threshold))


def roc_uri(evaluation: Evaluation) -> str | None:
    """The ROC curve; None unless there are both normal and anomalous images."""
    fpr, tpr = evaluation.flagged_share("normal"), evaluation.flagged_share("anomalous")
    if fpr is None or tpr is None:
        return None
    scores = evaluation.scores("normal"), evaluation.scores("anomalous")
    return data_uri("image/png", roc_curve(*scores, (fpr, tpr), evaluation.bundle.calibration.target_fpr))


def percent(share: float | None) -> str:
    """0.0523 -> 5.2 %; a dash for None."""
    return "–" if share is None else f"{share:.1%}".replace("%", "\N{NO-BREAK SPACE}%")


def counted(count: Count | None) -> str:
    """4 of 136, 2.9 %; a dash for None, or if there are no images."""
    return f"{count.flagged} of {count.images}, {percent(count.share)}" if count and count.images else "–"


def figure(value: float | None, digits: int = 3) -> str:
    """A number to `digits` decimals; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"
