import torch

from wtflow.flow.loss import matching_loss
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
