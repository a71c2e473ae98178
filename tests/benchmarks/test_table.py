from pathlib import Path
from typing import Any

import pytest

from benchmarks.contest.table import claims, markdown, picture, summary
from benchmarks.product_lines import TILE
from wtflow.errors import WTFlowError


def row(method: str, line: str, seed: int, image_auroc: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method, "line": line, "seed": seed, "image_auroc": image_auroc, "budget": "one pass",
        "ours": method.startswith("wtflow"), "compared": method != "sketch", "fpr": 0.05, "fpr_interval": [0.0, 0.1],
        "backbone_ms": 30.0, "head_ms": 3.0, "image_ms": 33.0, "model_bytes": 4_000_000, "train_cpu_seconds": 60.0,
        "tpr": 0.7, **more,
    }  # fmt: skip


FOUND = [
    row("wtflow-default", "a", 0, 0.90),
    row("wtflow-default", "a", 1, 0.92, fpr=0.2),
    row("wtflow-default", TILE, 0, 0.80, aupro_30=0.6),
    row("padim", "a", 0, 0.93),
    row("padim", TILE, 0, 0.70, aupro_30=0.5),
    row("fastflow", "a", 0, 0.80),
    row("fastflow", TILE, 0, 0.79, aupro_30=0.7),
    row("sketch", "a", 0, 0.99),
    row("sketch", TILE, 0, 0.99, aupro_30=0.9),
]


def test_the_mean_of_a_method_is_over_lines_of_means_over_seeds() -> None:
    of = {(one["method"], one["line"]): one for one in summary(FOUND)}
    assert of["wtflow-default", "a"]["image_auroc"] == pytest.approx(0.91)
    assert of["wtflow-default", "a"]["image_auroc_sd"] == pytest.approx(0.0141, abs=1e-4)
    assert of["wtflow-default", "a"]["image_auroc_by_seed"] == [0.90, 0.92]
    assert of["wtflow-default", "mean"]["image_auroc"] == pytest.approx(0.855)
    assert of["wtflow-default", "mean"]["aupro_30"] == pytest.approx(0.6)


def test_claims_are_made_against_the_best_compared_peer() -> None:
    found = [(claim.value, claim.holds) for claim in claims(summary(FOUND))]
    assert found == [
        (0.04, True),  # .855 - .815
        (-0.02, False),  # padim on a
        (0.1, True),
        (1, False),  # the second seed's share of false alarms
        (0.01, False),  # on the tile: .80 - .79
        (-0.1, False),  # fastflow's AUPRO
    ]


def test_means_over_other_lines_are_not_compared() -> None:
    for rows in (FOUND[:-1][:3] + FOUND[3:4], [*FOUND[:2], *FOUND[3:5]]):  # a peer without the tile; ours without it
        with pytest.raises(WTFlowError, match="padim and wtflow-default were not measured on the same lines"):
            claims(summary(rows))


def test_a_preset_is_told_against_the_default_once_it_has_all_lines() -> None:
    half = [*FOUND, row("wtflow-edge", "a", 0, 0.91)]
    assert len(claims(summary(half))) == 6
    made = claims(summary([*half, row("wtflow-edge", TILE, 0, 0.79, aupro_30=0.6)]))
    edge = next(claim for claim in made if "edge" in claim.claim)
    assert (edge.value, edge.holds) == (-0.005, True)  # .850 - .855


def test_the_markdown_has_a_row_a_method_and_leaves_out_what_is_not_known() -> None:
    lines = markdown(summary([*FOUND, row("late", "a", 0, 0.5)])).splitlines()
    assert len(lines) == 2 + 5
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| wtflow-default | 0.910 ± 0.014 | 0.800 | 0.855 | 0.600 |")
    assert lines[-1].startswith("| late | 0.500 |  |  |  |")


def test_the_picture_is_one(tmp_path: Path) -> None:
    picture(summary(FOUND), tmp_path / "new" / "accuracy.png")
    assert (tmp_path / "new" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("missing", ["wtflow", "padim"])
def test_without_ours_or_without_a_peer_nothing_is_claimed(missing: str) -> None:
    left = [one for one in FOUND if one["ours"] != (missing == "wtflow")]
    with pytest.raises(WTFlowError, match="Type: make bench NAME=accuracy"):
        claims(summary(left))
