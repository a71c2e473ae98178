"""The networks are timm's own, with random weights and statistics: what is folded must not depend on the weights."""

import pytest
import timm
import torch
from torch import Tensor, nn

from wtflow.features.lean import lean


def network(name: str, levels: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    made = timm.create_model(name, features_only=True, out_indices=levels, pretrained=False)
    for part in made.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            for value in (part.bias, part.running_mean):
                nn.init.normal_(value, std=0.2)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    return made.eval().requires_grad_(False)


def closeness(one: nn.Module, other: nn.Module, size: tuple[int, int]) -> float:
    """Largest difference, as a share of the largest value."""
    x_B3YX = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    pairs = zip(one(x_B3YX), other(x_B3YX), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (50, 75)], ids=["square", "wide", "odd on the way"])
@pytest.mark.parametrize(
    ("name", "levels"), [("tf_efficientnet_lite0", (2, 3)), ("resnet18", (2, 3)), ("mobilenetv3_small_050", (2, 3))]
)
def test_it_answers_as_the_network_does(name: str, levels: tuple[int, ...], size: tuple[int, int]) -> None:
    full = network(name, levels)
    before = {key: value.clone() for key, value in full.state_dict().items()}
    light = lean(full, size)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in light.modules())
    assert closeness(full, light, size) < 1e-5
    after = full.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("name", ["edgenext_xx_small", "densenet121", "ghostnet_050", "vit_tiny_patch16_224"])
def test_networks_of_other_builds_answer_as_before(name: str) -> None:
    """One that reads the weights of its convolutions, two whose norms follow other modules, one without any."""
    full = network(name, (1, 2))
    assert closeness(full, lean(full, (224, 224)), (224, 224)) < 1e-5


class NormFirst(nn.Module):
    """Lists a convolution before a norm, and runs them the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        nn.init.constant_(self.norm.running_mean, 1.0)

    def forward(self, x_B3YX: Tensor) -> list[Tensor]:
        return [self.conv(self.norm(x_B3YX))]


def test_a_network_that_runs_in_another_order_than_it_lists_is_left_as_it_is() -> None:
    full = NormFirst().eval().requires_grad_(False)
    light = lean(full, (8, 8))
    assert light is not full
    assert closeness(full, light, (8, 8)) == 0
