import pytest
import torch

from wtflow.errors import WTFlowError
from wtflow.flow.coupling import COUPLINGS, Coupling, CouplingParams
from wtflow.flow.path import interpolate


@pytest.mark.parametrize("kind", COUPLINGS)
def test_constant_is_the_mean_product_of_data_and_noise(kind: str) -> None:
    """c = E<x0, x1> / d, by Monte Carlo over data on the shell ||x0||^2 = d."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(2000, 8, 4, 4, generator=generator)
    x1 = COUPLINGS[kind].draw(x0, generator)
    assert x1.shape == x0.shape
    assert (x0 * x1).mean().item() == pytest.approx(COUPLINGS[kind].c, abs=0.01)  # sd of the mean: 0.002


def test_independent_noise_is_standard_and_follows_its_generator() -> None:
    x0 = torch.full((500, 8, 4, 4), 5.0)
    draw = COUPLINGS["independent"].draw
    noise = draw(x0, torch.Generator().manual_seed(1))
    assert noise.mean().item() == pytest.approx(0.0, abs=0.02)
    assert noise.std().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(noise, draw(-x0, torch.Generator().manual_seed(1)))
    assert not torch.equal(noise, draw(x0, torch.Generator().manual_seed(2)))


def test_field_at_the_data_is_minus_x0() -> None:
    """v*(x, 0) = E[x1 - x0 | x_t = x] -> -(1 - c) x with c = 0: the slope of a regression on a Gaussian toy.

    In one dimension with x0 ~ N(0, s^2): E[x1 - x0 | x_t] = x_t (t - (1 - t) s^2) / ((1 - t)^2 s^2 + t^2).
    """
    generator = torch.Generator().manual_seed(0)
    s = 2.0
    x0 = s * torch.randn(400_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    x1 = COUPLINGS["independent"].draw(x0, generator).double()
    for t in (0.5, 0.02, 0.0):
        sample = interpolate(x0, x1, torch.full((len(x0),), t, dtype=torch.float64))
        slope = (sample.x_BCHW * sample.velocity_BCHW).mean() / sample.x_BCHW.square().mean()
        wanted = (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)
        assert slope.item() == pytest.approx(wanted, abs=0.01)  # sd: about 0.001
    assert wanted == -(1 - COUPLINGS["independent"].c)


def test_one_step_empties_the_well() -> None:
    for c in (0.0, 0.5, 0.75):
        coupling = Coupling(COUPLINGS["independent"].draw, c)
        assert 1.0 + coupling.step * -(1.0 - c) == 0.0


def test_an_unknown_coupling_is_refused() -> None:
    with pytest.raises(WTFlowError, match=r"train\.coupling\.kind"):
        CouplingParams.parse({"kind": "optimal"}, "train.coupling")
