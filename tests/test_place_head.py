import pytest
import torch
from torch import Tensor, nn

from wtflow.features.fusion import Fusion, FusionParams, build_fusion
from wtflow.flow.solver import euler
from wtflow.flow.velocity import LocationNet, VelocityParams
from wtflow.place_head import PlaceHead
from wtflow.scoring.density import energy, units


def levels(count: int = 3) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        2: torch.randn(count, 6, 8, 8, generator=generator).half(),
        3: torch.randn(count, 7, 4, 4, generator=generator).half(),
    }


def head(stride: int, components: int) -> tuple[Fusion, LocationNet]:
    """Statistics of real covariance, weights and norms that are nothing special."""
    torch.manual_seed(0)
    params = FusionParams(levels=(2, 3), stride=stride, smooth=True, norm="whiten", components=components)
    fusion = build_fusion(params, levels(), (64, 64))
    fusion.learn_statistics([levels(40)])
    field = LocationNet(VelocityParams(kind="location", width=8, depth=2, norm="batch"), fusion.channels, fusion.size)
    for parameter in field.parameters():
        nn.init.normal_(parameter, std=0.3)
    return fusion, field.eval().requires_grad_(False)


@pytest.mark.parametrize("stride", [4, 8, 16], ids=["both enlarged", "one enlarged", "one averaged down"])
@pytest.mark.parametrize("components", [5, 13])
@pytest.mark.parametrize(("step", "t"), [(1.0, 0.5), (0.8, 0.0)])
def test_it_is_the_energy_of_one_euler_step_on_the_fused_features(
    stride: int, components: int, step: float, t: float
) -> None:
    fusion, field = head(stride, components)
    factor_CC = torch.rand(components, components)
    unit_CC = units(0.2 * (factor_CC @ factor_CC.T + torch.eye(components)))
    wanted = energy(euler(field, fusion(levels()), step, 1, t), unit_CC)
    found = PlaceHead(fusion, field, step, t, unit_CC)(levels())
    assert found.shape == wanted.shape == (3, 64 // stride, 64 // stride)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert wanted.std() > 0.2


def test_it_leaves_field_and_fusion_alone_and_keeps_the_weights_of_its_making() -> None:
    fusion, field = head(8, 13)
    before = {name: value.clone() for name, value in [*field.state_dict().items(), *fusion.state_dict().items()]}
    made = PlaceHead(fusion, field, 1.0, 0.5, units(torch.eye(13)))
    first = made(levels())
    after = {**field.state_dict(), **fusion.state_dict()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    nn.init.zeros_(field.leave.weight)
    assert torch.equal(made(levels()), first)
