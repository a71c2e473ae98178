import pytest
import torch
from torch import nn

from wtflow.flow.fold import folded
from wtflow.flow.velocity import VelocityNet, VelocityParams, build_field

CASES = [("location", "batch"), ("unet", "batch"), ("unet", "group")]


def trained_looking(kind: str, norm: str) -> VelocityNet:
    """A field whose norms have seen data and whose places differ, in evaluation mode."""
    torch.manual_seed(0)
    field = build_field(VelocityParams.parse({"kind": kind, "width": 8, "depth": 2, "norm": norm}, "t"), 5, (8, 8))
    for parameter in field.parameters():
        nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        for _ in range(5):
            field.train()(torch.randn(6, 5, 8, 8) * 2 + 1, torch.rand(6))
    return field.eval()


@pytest.mark.parametrize(("kind", "norm"), CASES)
@pytest.mark.parametrize("t", [0.0, 0.5])
def test_the_folded_field_is_the_trained_one_at_its_time(kind: str, norm: str, t: float) -> None:
    field, x = trained_looking(kind, norm), torch.randn(3, 5, 8, 8)
    wanted = field(x, torch.full((3,), t))
    torch.testing.assert_close(folded(field, t)(x), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(folded(field, t)(x), field(x, torch.full((3,), 0.9)), atol=1e-3)


@pytest.mark.parametrize(("kind", "norm"), CASES)
def test_folding_leaves_the_field_alone(kind: str, norm: str) -> None:
    field = trained_looking(kind, norm)
    before = {name: value.clone() for name, value in field.state_dict().items()}
    folded(field, 0.5)
    assert all(torch.equal(before[name], value) for name, value in field.state_dict().items())


def test_batch_norms_are_gone() -> None:
    fixed = folded(trained_looking("unet", "batch"), 0.0)
    assert not [module for module in fixed.modules() if isinstance(module, nn.BatchNorm2d)]
