import math
from typing import Literal

import pytest
import torch

from wtflow.errors import WTFlowError
from wtflow.scoring.density import ScoreParams, energy, pooled, scored, units, usual_products


def test_energy_is_half_the_mean_square_over_channels() -> None:
    y = torch.tensor([[[[0.0, 1.0]], [[0.0, 3.0]]]], dtype=torch.float64)  # 1 x 2 x 1 x 2
    assert energy(y, units(torch.eye(2, dtype=torch.float64))).tolist() == [[[0.0, 0.5 * (1 + 9) / 2]]]


def test_energy_measures_y_along_the_axes_and_by_the_length_of_what_is_usual() -> None:
    y = torch.tensor([1.0, 3.0], dtype=torch.float64)
    usual = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    wanted = 0.5 * y @ torch.linalg.inv(usual) @ y / 2
    assert energy(y[None, :, None, None], units(usual)).item() == pytest.approx(wanted.item())


def test_density_is_one_minus_the_proxy_and_keeps_the_order() -> None:
    e = torch.tensor([[[0.0, 1e-12, 0.5, 2.0]]], dtype=torch.float64)
    params = ScoreParams(kind="density", balance="none", top_fraction=0.1)
    wanted = [0.0, 1e-12, 1 - math.exp(-0.5), 1 - math.exp(-2.0)]
    assert scored(e, params)[0, 0].tolist() == pytest.approx(wanted, rel=1e-9)
    assert scored(e, ScoreParams(kind="energy", balance="none", top_fraction=0.1)) is e


@pytest.mark.parametrize(("fraction", "wanted"), [(0.01, 99.0), (0.03, 98.0), (0.5, 74.5), (1.0, 49.5)])
def test_top_mean_and_quantile_of_a_hundred_places(fraction: float, wanted: float) -> None:
    map_BYX = torch.randperm(100, generator=torch.Generator().manual_seed(0)).double().view(1, 10, 10)
    params = ScoreParams(kind="energy", balance="none", top_fraction=fraction)
    assert pooled(map_BYX, params).item() == pytest.approx(wanted, abs=1e-12)
    least = pooled(map_BYX, params.model_copy(update={"pool": "quantile"}))
    assert least.item() == 100 * (1 - fraction)


@pytest.mark.parametrize("pool", ["mean", "quantile"])
def test_the_score_is_made_of_at_least_one_place_of_each_image(pool: Literal["mean", "quantile"]) -> None:
    maps = torch.tensor([[[1.0, 2.0]], [[9.0, 3.0]]])
    assert pooled(maps, ScoreParams(kind="energy", balance="none", top_fraction=0.001, pool=pool)).tolist() == [2, 9]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01])
def test_a_share_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(WTFlowError, match=r"train\.score\.top_fraction"):
        ScoreParams.parse({"kind": "energy", "top_fraction": fraction}, "train.score")


def test_the_usual_is_a_mean_over_places_in_which_the_far_ones_count_more() -> None:
    x0 = torch.tensor([[[[1.0, 3.0]], [[1.0, 3.0]]]])  # two places, |x0|^2 1 and 9
    y = torch.tensor([[[[2.0, 1.0]], [[0.0, 1.0]]]])
    wanted = (1 * torch.tensor([[4.0, 0.0], [0.0, 0.0]]) + 9 * torch.ones(2, 2)) / 10
    found = usual_products([(x0, y), (x0, y)])
    torch.testing.assert_close(found, wanted.double() + 1e-3 * (2.2 / 2) * torch.eye(2).double())


def test_an_axis_along_which_nothing_is_left_keeps_a_thousandth_of_the_mean() -> None:
    y = torch.tensor([[[[2.0]], [[0.0]]]])
    usual = usual_products([(torch.ones_like(y), y)])
    assert usual.tolist() == [[pytest.approx(4.002), 0.0], [0.0, pytest.approx(0.002)]]
    assert units(usual).isfinite().all()
