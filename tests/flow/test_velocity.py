import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from wtflow.artefact import save_tensors
from wtflow.errors import WTFlowError
from wtflow.flow.velocity import LocationNet, MiniUnet, VelocityParams, build_field, time_embedding

NORMS = ("batch", "group")


def params(width: int = 8, norm: str = "batch", kind: str = "unet") -> VelocityParams:
    return VelocityParams.parse({"kind": kind, "width": width, "depth": 2, "norm": norm}, "train.velocity")


def network(norm: str = "batch", channels: int = 5, width: int = 8) -> MiniUnet:
    torch.manual_seed(0)
    return MiniUnet(params(width, norm), channels)


def location(size: tuple[int, int] = (4, 6)) -> LocationNet:
    """With places that differ, as they do once it has been trained."""
    torch.manual_seed(0)
    net = LocationNet(params(kind="location"), 5, size)
    nn.init.normal_(net.place)
    return net


def test_time_embedding_by_hand() -> None:
    t = torch.tensor([0.0, 0.5], dtype=torch.float64)
    rates = [10000.0 ** (-i / 3) for i in range(4)]  # width 8: i = 0 .. 3, width / 2 - 1 = 3
    wanted = [
        [math.sin(1000 * time * rate) for rate in rates] + [math.cos(1000 * time * rate) for rate in rates]
        for time in t.tolist()
    ]
    torch.testing.assert_close(time_embedding(t, 8), torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-4)
    assert time_embedding(t, 8)[0].tolist() == [0.0] * 4 + [1.0] * 4


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", [(4, 4), (8, 12), (16, 16)])
def test_a_velocity_has_the_shape_of_its_point(norm: str, size: tuple[int, int]) -> None:
    assert network(norm)(torch.randn(2, 5, *size), torch.rand(2)).shape == (2, 5, *size)


@pytest.mark.parametrize("norm", NORMS)
def test_a_gradient_reaches_every_parameter(norm: str) -> None:
    net = network(norm)
    net(torch.randn(4, 5, 8, 8), torch.rand(4)).square().sum().backward()
    without = [name for name, value in net.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


@pytest.mark.parametrize("norm", NORMS)
def test_one_image_in_training_and_evaluation(norm: str) -> None:
    net, x, t = network(norm), torch.randn(1, 5, 8, 8), torch.rand(1)
    trained = net.train()(x, t)
    evaluated = net.eval()(x, t)
    assert trained.isfinite().all()
    assert evaluated.isfinite().all()
    assert torch.equal(trained, evaluated) == (norm == "group")  # batch statistics are not the running ones


@pytest.mark.parametrize("norm", NORMS)
def test_evaluation_sees_each_image_by_itself(norm: str) -> None:
    net = network(norm).eval()
    x, t = torch.randn(3, 5, 8, 8), torch.rand(3)
    alone = torch.cat([net(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(net(x, t), alone, rtol=0, atol=1e-5)


def test_time_changes_the_velocity() -> None:
    net, x = network().eval(), torch.randn(1, 5, 8, 8)
    assert not torch.allclose(net(x, torch.tensor([0.0])), net(x, torch.tensor([0.7])))


def test_weights_survive_a_file(tmp_path: Path) -> None:
    net = network().eval()
    save_tensors(tmp_path / "field.safetensors", net.state_dict())
    other = MiniUnet(params(), 5).eval()
    other.load_state_dict(load_file(tmp_path / "field.safetensors"))
    x, t = torch.randn(2, 5, 8, 8), torch.rand(2)
    assert torch.equal(net(x, t), other(x, t))


@pytest.mark.parametrize("size", [(6, 8), (8, 6), (7, 7)])
def test_sizes_that_do_not_halve_twice_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(WTFlowError, match=f"{size[0]} x {size[1]} places"):
        network()(torch.randn(1, 5, *size), torch.rand(1))


@pytest.mark.parametrize("width", [0, -2, 7])
def test_a_width_that_is_not_even_is_refused(width: int) -> None:
    with pytest.raises(WTFlowError, match=r"train\.velocity\.width"):
        params(width)


def test_the_paper_s_network_has_763_million_parameters() -> None:
    with torch.device("meta"):
        net = MiniUnet(params(768), 1024)
    assert sum(value.numel() for value in net.parameters()) / 1e6 == pytest.approx(763, abs=1)


def test_a_place_sees_itself_alone_and_knows_where_it_is() -> None:
    net, x, t = location().eval(), torch.randn(1, 5, 1, 1).expand(1, 5, 4, 6).clone(), torch.tensor([0.3])
    before = net(x, t)
    assert before.shape == x.shape
    assert before.flatten(2).std(dim=2).min() > 0  # the same vector everywhere, another answer at each place
    x[0, :, 1, 2] += 1
    changed = (net(x, t) - before).abs().sum(dim=1)[0] > 0
    assert changed.nonzero().tolist() == [[1, 2]]


def test_the_location_net_uses_time_and_trains_every_parameter() -> None:
    net, x = location(), torch.randn(3, 5, 4, 6)
    assert not torch.allclose(net(x, torch.zeros(3)), net(x, torch.full((3,), 0.7)))
    net(x, torch.rand(3)).square().sum().backward()
    assert [name for name, value in net.named_parameters() if value.grad is None or not value.grad.any()] == []


def test_the_setting_chooses_the_network() -> None:
    assert isinstance(build_field(params(kind="location"), 5, (4, 4)), LocationNet)
    assert isinstance(build_field(params(kind="unet"), 5, (4, 4)), MiniUnet)
