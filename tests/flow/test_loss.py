import pytest
import torch

from wtflow.errors import WTFlowError
from wtflow.flow.loss import LossParams, matching_loss, time_weight
from wtflow.flow.path import interpolate


def test_the_true_velocity_has_no_loss() -> None:
    x0, x1 = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)
    sample = interpolate(x0, x1, torch.rand(3, dtype=torch.float64))
    assert torch.equal(matching_loss(lambda x, t: x1 - x0, sample), torch.zeros(3, dtype=torch.float64))


def test_mean_square_of_each_image_by_itself() -> None:
    x0 = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    sample = interpolate(x0, x0, torch.tensor([0.25, 0.5], dtype=torch.float64))
    off = torch.tensor([1.0, 3.0], dtype=torch.float64).view(2, 1, 1, 1)
    loss = matching_loss(lambda x, t: x + off, sample)
    assert torch.equal(loss, torch.tensor([1.0, 9.0], dtype=torch.float64))


def test_the_field_is_asked_at_the_sample() -> None:
    x0, x1 = torch.randn(2, 2, 2, 4, 4)
    sample = interpolate(x0, x1, torch.tensor([0.1, 0.9]))
    asked = []

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append((x, t))
        return torch.zeros_like(x)

    loss = matching_loss(field, sample)
    assert len(asked) == 1
    assert asked[0][0] is sample.x_BCHW
    assert asked[0][1] is sample.t_B
    torch.testing.assert_close(loss, (x1 - x0).square().mean(dim=(1, 2, 3)))


T = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
"""The middles of a fine division of [0, 1]."""


@pytest.mark.parametrize("weight", ["uniform", "near-data", "far-from-data"])
@pytest.mark.parametrize("scale", [0.02, 0.5, 3.0])
def test_the_mean_weight_over_the_path_is_one(weight: str, scale: float) -> None:
    weights = time_weight(T, LossParams.parse({"weight": weight, "scale": scale}, "tests"))
    assert weights.mean().item() == pytest.approx(1.0, abs=1e-6)
    assert (weights >= 0).all()


def test_the_uniform_weight_is_one_at_every_time() -> None:
    assert torch.equal(time_weight(T, LossParams(weight="uniform", scale=0.1)), torch.ones_like(T))


@pytest.mark.parametrize("tau", [0.05, 0.3])
def test_weights_by_hand(tau: float) -> None:
    """At tau the weight near the data is half of that at 0; the other begins at 0 and is half of its limit."""
    t = torch.tensor([0.0, tau, 1e6], dtype=torch.float64)
    near = time_weight(t, LossParams(weight="near-data", scale=tau))
    far = time_weight(t, LossParams(weight="far-from-data", scale=tau))
    assert (near / near[0]).tolist() == pytest.approx([1.0, 0.5, 0.0], abs=1e-9)
    assert (far / far[2]).tolist() == pytest.approx([0.0, 0.5, 1.0], abs=1e-9)


def test_far_from_the_data_an_error_of_the_data_is_bounded() -> None:
    """An error e in x0 = x_t - t v is e / t in v: weight (e / t)^2 = const e^2 / (t^2 + tau^2)."""
    tau, e = 0.1, 0.7
    counted = time_weight(T, LossParams(weight="far-from-data", scale=tau)) * (e / T) ** 2
    wanted = e**2 / (T**2 + tau**2)
    ratio = counted / wanted
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-6, atol=0)


@pytest.mark.parametrize("change", [{"weight": "snr"}, {"scale": 0.0}], ids=lambda one: next(iter(one)))
def test_wrong_settings_of_the_loss_are_named(change: dict[str, object]) -> None:
    with pytest.raises(WTFlowError, match=rf"train\.loss\.{next(iter(change))}"):
        LossParams.parse({"weight": "uniform", "scale": 0.1} | change, "train.loss")
