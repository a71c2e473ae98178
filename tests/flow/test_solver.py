import pytest
import torch

from wtflow.flow.solver import euler

X0 = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_constant_field_shifts_by_the_step(count: int) -> None:
    drift = torch.full_like(X0, 0.7)
    torch.testing.assert_close(euler(lambda x, t: drift, X0, 0.5, count), X0 + 0.35, rtol=0, atol=1e-14)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_linear_field_multiplies(count: int) -> None:
    """x' = -k x: each step multiplies by 1 - k step / count."""
    k, step = 0.8, 0.5
    wanted = X0 * (1 - k * step / count) ** count
    torch.testing.assert_close(euler(lambda x, t: -k * x, X0, step, count), wanted, rtol=0, atol=1e-14)


def test_many_steps_approach_the_exponential() -> None:
    wanted = X0 * torch.exp(torch.tensor(-1.0, dtype=torch.float64))
    error = [(euler(lambda x, t: -x, X0, 1.0, count) - wanted).abs().max().item() for count in (50, 100)]
    assert error[1] < 0.02
    assert error[0] / error[1] == pytest.approx(2.0, rel=0.05)  # first order


def test_the_one_step_of_the_ideal_field_ends_in_the_well() -> None:
    assert torch.equal(euler(lambda x, t: -x, X0, 1.0), torch.zeros_like(X0))


def test_times_begin_at_zero_and_keep_the_precision_of_the_data() -> None:
    times = []

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times.append(t)
        return x

    euler(field, X0, 1.0, 3)
    assert all(t.shape == (3,) and t.dtype == torch.float64 for t in times)
    assert [t[0].item() for t in times] == [0.0, 1 / 3, 2 / 3]


@pytest.mark.parametrize("count", [1, 4])
def test_a_start_moves_the_times_and_the_first_point(count: int) -> None:
    asked = []

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        asked.append((x, t))
        return (1 + t).view(-1, 1, 1, 1).expand_as(x)

    y = euler(field, X0, 0.5, count, start=0.2)
    wanted = [0.2 + 0.8 * index / count for index in range(count)]
    assert [t.unique().item() for _, t in asked] == pytest.approx(wanted, abs=1e-15)
    torch.testing.assert_close(asked[0][0], 0.8 * X0, rtol=0, atol=1e-15)  # the mean of the path's points there
    torch.testing.assert_close(y, X0 + 0.5 * (1 + sum(wanted) / count), rtol=0, atol=1e-14)


def test_a_linear_field_in_time_by_hand() -> None:
    """x' = t over a step of size 1 from t = 0: (0 + 1/2) / 2 in two steps; from 0.5: (0.5 + 0.75) / 2."""
    field = lambda x, t: t.view(-1, 1, 1, 1).expand_as(x)  # noqa: E731
    torch.testing.assert_close(euler(field, X0, 1.0, 2), X0 + 0.25, rtol=0, atol=1e-15)
    torch.testing.assert_close(euler(field, X0, 1.0, 2, start=0.5), X0 + 0.625, rtol=0, atol=1e-15)
