"""Couplings against brute force, and their constants and fields against theory on Gaussian data."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from wtflow.errors import WTFlowError
from wtflow.flow.coupling import COUPLINGS, CouplingParams, build_coupling, constant, location_worst, step_size
from wtflow.flow.path import interpolate

KINDS = ("independent", "location-wt", "batch-wt", "sign-wt", "antipode", "sink", "batch-ot")
CHANNELS, CANDIDATES = 8, 8


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(kind: str, x0: Tensor, seed: int = 1, candidates: int = CANDIDATES) -> Tensor:
    return build_coupling(CouplingParams(kind=kind, candidates=candidates)).draw(x0, seeded(seed))


def gaussian(images: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(images, *shape, generator=seeded(seed), dtype=torch.float64)


def expected_maximum(count: int) -> float:
    """m_K: mean of the highest of `count` standard normals, by numerical integration."""
    x = np.linspace(-10, 10, 20001)
    return float(np.trapezoid(x * count * stats.norm.pdf(x) * stats.norm.cdf(x) ** (count - 1), x))


def location_theory(channels: int, candidates: int) -> float:
    """c on Gaussian data: -m_K E|x0| / C, |x0| at a place being chi-distributed."""
    return -expected_maximum(candidates) * float(stats.chi.mean(channels)) / channels


def test_every_kind_can_be_asked_for() -> None:
    assert set(KINDS) == {*COUPLINGS, "location-wt"}
    with pytest.raises(WTFlowError, match=r"train\.coupling\.kind"):
        CouplingParams.parse({"kind": "optimal", "candidates": 8}, "train.coupling")
    with pytest.raises(WTFlowError, match=r"train\.coupling\.candidates"):
        CouplingParams.parse({"kind": "location-wt", "candidates": 0}, "train.coupling")


@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_has_the_shape_and_precision_of_the_data_and_follows_its_generator(kind: str) -> None:
    for x0 in (gaussian(5, 4, 3, 2), gaussian(5, 4, 3, 2).float()):
        before = x0.clone()
        x1 = draw(kind, x0)
        assert (x1.shape, x1.dtype) == (x0.shape, x0.dtype)
        assert torch.equal(x1, draw(kind, x0))
        assert torch.equal(x1, draw(kind, x0, seed=2)) == (kind in ("antipode", "sink"))
        assert torch.equal(x0, before)


def test_independent_noise_knows_nothing_of_the_data() -> None:
    x0 = torch.full((500, 8, 4, 4), 5.0)
    noise = draw("independent", x0)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.02)
    assert noise.std().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(noise, draw("independent", -x0))


@pytest.mark.parametrize(("kind", "sense"), [("batch-wt", 1), ("batch-ot", -1)])
def test_an_assignment_is_the_best_of_all_permutations(kind: str, sense: int) -> None:
    for seed in range(5):
        x0 = gaussian(6, 3, 2, 2, seed=seed)
        noise = draw("independent", x0, seed=seed + 100)
        x1 = draw(kind, x0, seed=seed + 100)
        costs = [(x0 - noise[list(order)]).square().sum().item() for order in permutations(range(6))]
        assert (x0 - x1).square().sum().item() == pytest.approx(sense * max(sense * cost for cost in costs), rel=1e-12)
        # every noise is used once: the marginal is that of the independent draw
        assert torch.equal(x1.flatten(1).sort(dim=0).values, noise.flatten(1).sort(dim=0).values)


def test_each_place_takes_the_worst_of_its_candidates() -> None:
    x0, candidates = gaussian(2, 3, 2, 4), 5
    generator = seeded(9)
    noise = [torch.randn(x0.shape, generator=generator, dtype=x0.dtype) for _ in range(candidates)]
    x1 = location_worst(x0, seeded(9), candidates)
    for image in range(2):
        for row in range(2):
            for column in range(4):
                at = (image, slice(None), row, column)
                wanted = min((one[at] for one in noise), key=lambda vector: float(vector @ x0[at]))
                assert torch.equal(x1[at], wanted)


def test_one_candidate_is_independent_noise() -> None:
    x0 = gaussian(2, 3, 2, 4)
    assert torch.equal(draw("location-wt", x0, candidates=1), draw("independent", x0))


def test_sign_worst_keeps_the_sizes_and_opposes_the_signs() -> None:
    x0 = gaussian(3, 4, 2, 2)
    x0[0, 0] = 0.0
    x1 = draw("sign-wt", x0)
    assert torch.equal(x1.abs(), draw("independent", x0).abs())
    assert ((x0 * x1) < 0).sum() == x0.numel() - 4
    assert (x1 != 0).all()  # where x0 is 0 as well


def test_antipode_and_sink() -> None:
    x0 = gaussian(3, 4, 2, 2)
    assert torch.equal(draw("antipode", x0), -x0)
    assert torch.equal(draw("sink", x0), torch.zeros_like(x0))


@pytest.mark.parametrize("kind", KINDS)
def test_the_constant_is_that_of_theory(kind: str) -> None:
    """On Gaussian data; the measured ones by Monte Carlo over 2 million numbers, sd about 0.001."""
    theory = {
        "independent": 0.0,
        "location-wt": location_theory(64, CANDIDATES),  # -0.177; the bound is -sqrt(2 ln K / C) = -0.255
        "sign-wt": -2 / math.pi,
        "antipode": -1.0,
        "sink": 0.0,
    }
    coupling = build_coupling(CouplingParams(kind=kind, candidates=CANDIDATES))
    batches = gaussian(2000, 64, 4, 4).split(8)
    c = constant(coupling, batches, seeded(1))
    assert c == constant(coupling, batches, seeded(1))
    if kind in theory:
        assert c == pytest.approx(theory[kind], abs=0.003)
    else:  # eight images: small, of the right sign, and shrinking with d
        assert 0.01 < c * {"batch-ot": 1, "batch-wt": -1}[kind] < 0.06
    if coupling.c is not None:
        assert c == coupling.c
        x0 = torch.cat(batches)
        assert ((x0 * coupling.draw(x0, seeded(2))).mean() / x0.square().mean()).item() == pytest.approx(c, abs=0.003)


@pytest.mark.parametrize("candidates", [2, 8, 64])
@pytest.mark.parametrize("channels", [16, 256])
def test_location_worst_grows_like_the_root_of_the_logarithm(channels: int, candidates: int) -> None:
    coupling = build_coupling(CouplingParams(kind="location-wt", candidates=candidates))
    c = constant(coupling, gaussian(400_000 // channels // 16, channels, 4, 4).split(50), seeded(1))
    assert c == pytest.approx(location_theory(channels, candidates), rel=0.05)
    assert 0.4 < -c / math.sqrt(2 * math.log(candidates) / channels) < 1.0


def test_sign_worst_on_data_of_two_values() -> None:
    """On +-s: c = -E|z| / s, with the norm of the data and not d below the line."""
    for scale in (0.5, 3.0):
        batches = (scale * gaussian(2000, 8, 4, 4).sign()).split(100)
        c = constant(COUPLINGS["sign-wt"], batches, seeded(1))
        assert c == pytest.approx(-math.sqrt(2 / math.pi) / scale, rel=0.01)


def test_location_worst_noise_is_nearly_standard() -> None:
    """Only its part along x0 is changed, one of C directions: variance 1 + (E[max^2] - 1) / C."""
    x0 = gaussian(4000, 64, 2, 2)
    x1 = draw("location-wt", x0)
    x = np.linspace(-10, 10, 20001)
    square = np.trapezoid(x**2 * CANDIDATES * stats.norm.pdf(x) * stats.norm.cdf(x) ** (CANDIDATES - 1), x)
    assert x1.mean().item() == pytest.approx(0.0, abs=0.005)
    assert x1.var().item() == pytest.approx(1 + (square - 1) / 64, abs=0.006)  # 1.022
    assert stats.kstest(x1.flatten()[:100_000].numpy(), "norm").statistic < 0.012
    across = x1 - (x1 * x0).sum(1, keepdim=True) / x0.square().sum(1, keepdim=True) * x0
    assert (across.square().sum() / (63 * 4 * 4000)).item() == pytest.approx(1.0, abs=0.006)


@pytest.mark.parametrize("kind", ["independent", "location-wt", "sign-wt"])
def test_the_field_at_one_data_point(kind: str) -> None:
    """v*(x0, 0) = E[x1 | x0] - x0, over 40,000 draws for one x0."""
    x0 = gaussian(1, CHANNELS, 2, 2)
    x0 = x0 / x0.norm(dim=1, keepdim=True) * math.sqrt(CHANNELS)  # every place on its shell
    c = -expected_maximum(CANDIDATES) / math.sqrt(CHANNELS)
    wanted = {
        "independent": -x0,
        "location-wt": -(1 - c) * x0,
        "sign-wt": -x0 - math.sqrt(2 / math.pi) * x0.sign(),  # not along x0
    }[kind]
    many = x0.expand(40_000, -1, -1, -1)
    sample = interpolate(many, draw(kind, many), torch.zeros(len(many), dtype=torch.float64))
    torch.testing.assert_close(sample.velocity_BCHW.mean(0, keepdim=True), wanted, rtol=0, atol=0.025)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_linear_field_at_the_data_is_minus_one_minus_c(kind: str) -> None:
    """Least squares for v = A x0 at t = 0 on Gaussian data: A = -(1 - c) I, and the step empties the well."""
    coupling = build_coupling(CouplingParams(kind=kind, candidates=CANDIDATES))
    batches = gaussian(40_000, CHANNELS, 1, 1).split(20)
    c = constant(coupling, batches, seeded(1))
    generator = seeded(1)
    times = torch.zeros(20, dtype=torch.float64)
    velocity = torch.cat([interpolate(x0, coupling.draw(x0, generator), times).velocity_BCHW for x0 in batches])
    x0, velocity = torch.cat(batches).flatten(1), velocity.flatten(1)
    matrix = torch.linalg.lstsq(x0, velocity).solution
    identity = torch.eye(CHANNELS, dtype=torch.float64)
    torch.testing.assert_close(matrix, -(1 - c) * identity, rtol=0, atol=0.02)
    assert (step_size(c) * matrix + identity).abs().max() < 0.02
    left = (x0 * (x0 + step_size(c) * velocity)).sum() / x0.square().sum()
    assert left.item() == pytest.approx(0.0, abs=1e-12 if coupling.c is None else 0.01)


def test_field_along_the_whole_path_of_independent_noise() -> None:
    """In one dimension with x0 ~ N(0, s^2): E[x1 - x0 | x_t] = x_t (t - (1 - t) s^2) / ((1 - t)^2 s^2 + t^2)."""
    s = 2.0
    x0 = s * gaussian(400_000, 1, 1, 1)
    x1 = draw("independent", x0)
    for t in (0.5, 0.02, 0.0):
        sample = interpolate(x0, x1, torch.full((len(x0),), t, dtype=torch.float64))
        slope = (sample.x_BCHW * sample.velocity_BCHW).mean() / sample.x_BCHW.square().mean()
        wanted = (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)
        assert slope.item() == pytest.approx(wanted, abs=0.01)  # sd: about 0.001


@pytest.mark.parametrize("c", [-1.0, -0.6, 0.0, 0.5, 0.75])
def test_one_step_empties_the_well(c: float) -> None:
    assert 1.0 - step_size(c) * (1.0 - c) == pytest.approx(0.0, abs=1e-15)
