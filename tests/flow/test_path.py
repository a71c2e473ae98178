import math

import pytest
import torch

from wtflow.errors import WTFlowError
from wtflow.flow.path import TimeParams, interpolate, sample_times, uniform_times


def times(kind: str, count: int = 100_000, seed: int = 3, **changes: float) -> torch.Tensor:
    settings = {"kind": kind, "location": -1.0, "scale": 0.5, "power": 3.0} | changes
    return sample_times(count, TimeParams.parse(settings, "tests"), torch.Generator().manual_seed(seed))


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x0, x1 = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x0, x1


def test_data_at_zero_noise_at_one_and_the_middle_between() -> None:
    x0, x1 = pair()
    for t, wanted in ((0.0, x0), (1.0, x1), (0.25, 0.75 * x0 + 0.25 * x1)):
        sample = interpolate(x0, x1, torch.full((3,), t, dtype=torch.float64))
        torch.testing.assert_close(sample.x_BCHW, wanted, rtol=0, atol=1e-15)


def test_each_image_has_its_own_time() -> None:
    x0, x1 = pair()
    sample = interpolate(x0, x1, torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64))
    torch.testing.assert_close(sample.x_BCHW, torch.stack([x0[0], x1[1], (x0[2] + x1[2]) / 2]))


def test_velocity_is_the_derivative_of_the_path() -> None:
    x0, x1 = pair(1)
    t = torch.tensor([0.0, 0.3, 0.99], dtype=torch.float64)
    _, derivative = torch.func.jvp(lambda t: interpolate(x0, x1, t).x_BCHW, (t,), (torch.ones_like(t),))
    torch.testing.assert_close(interpolate(x0, x1, t).velocity_BCHW, derivative, rtol=0, atol=1e-14)


def test_times_are_uniform_and_repeatable() -> None:
    t = uniform_times(100_000, torch.Generator().manual_seed(3))
    assert 0 <= t.min() < 1e-3
    assert 1 - 1e-3 < t.max() < 1
    assert t.mean().item() == pytest.approx(0.5, abs=5e-3)
    assert t.var().item() == pytest.approx(1 / 12, abs=2e-3)
    assert torch.equal(t, uniform_times(100_000, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("kind", ["uniform", "logit-normal", "singular"])
def test_times_lie_on_the_path_and_follow_the_generator(kind: str) -> None:
    t = times(kind)
    assert t.shape == (100_000,)
    assert t.min() >= 0
    assert t.max() <= 1
    assert torch.equal(t, times(kind))
    assert not torch.equal(t, times(kind, seed=4))


def test_uniform_is_the_uniform_of_before() -> None:
    assert torch.equal(times("uniform"), uniform_times(100_000, torch.Generator().manual_seed(3)))
    assert torch.equal(times("singular", power=1.0), times("uniform"))


def test_the_logit_of_a_logit_normal_time_is_normal() -> None:
    z = times("logit-normal").double().logit()
    assert z.mean().item() == pytest.approx(-1.0, abs=0.01)
    assert z.std().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("power", [0.5, 2.0, 4.0])
def test_singular_times_crowd_at_the_data(power: float) -> None:
    """P(t < q) = q^(1/p), E[t] = 1 / (1 + p)."""
    t = times("singular", power=power).double()
    for q in (0.01, 0.1, 0.5):
        assert (t < q).double().mean().item() == pytest.approx(q ** (1 / power), abs=0.006)
    assert (t < 2**-power).double().mean().item() == pytest.approx(0.5, abs=0.006)
    assert t.mean().item() == pytest.approx(1 / (1 + power), abs=0.005)


@pytest.mark.parametrize(
    "change",
    [{"kind": "cosine"}, {"scale": 0.0}, {"power": -1.0}, {"location": math.inf}],
    ids=lambda one: next(iter(one)),
)
def test_wrong_settings_of_time_are_named(change: dict[str, object]) -> None:
    settings = {"kind": "uniform", "location": 0.0, "scale": 1.0, "power": 2.0} | change
    with pytest.raises(WTFlowError, match=rf"train\.time\.{next(iter(change))}"):
        TimeParams.parse(settings, "train.time")
