import pytest
import torch

from wtflow.flow.path import interpolate, uniform_times


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
