import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from wtflow.errors import WTFlowError
from wtflow.features.fusion import Fusion, FusionParams, build_fusion


def levels(count: int = 3) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        2: torch.randn(count, 2, 8, 8, generator=generator).half(),
        3: torch.randn(count, 3, 4, 4, generator=generator).half(),
    }


def fusion(used: tuple[int, ...] = (2, 3), stride: int = 16, smooth: bool = False, norm: str = "layer") -> Fusion:
    params = FusionParams.parse(
        {"levels": used, "stride": stride, "smooth": smooth, "norm": norm, "components": 4}, "tests"
    )
    return build_fusion(params, levels(), (64, 64))


def test_finer_levels_are_averaged_down_coarser_ones_enlarged() -> None:
    given = levels()
    down = fusion(stride=16).fuse(given)
    assert down.shape == (3, 5, 4, 4)
    torch.testing.assert_close(down[:, :2], F.avg_pool2d(given[2].float(), 2))
    assert torch.equal(down[:, 2:], given[3].float())
    up = fusion(stride=8).fuse(given)
    assert up.shape == (3, 5, 8, 8)
    assert torch.equal(up[:, :2], given[2].float())
    torch.testing.assert_close(up[:, 2:, ::7, ::7], given[3].float()[:, :, ::3, ::3])


def test_maps_that_differ_only_in_height_are_brought_to_one_size() -> None:
    """250 x 256 pixels: timm's stride 16 gives 16 x 16 places, the fusion 15 x 16."""
    params = FusionParams(levels=(2, 3), stride=16, smooth=False, norm="layer", components=4)
    given = {2: torch.randn(1, 2, 32, 32).half(), 3: torch.randn(1, 3, 16, 16).half()}
    assert build_fusion(params, given, (250, 256)).fuse(given).shape == (1, 5, 15, 16)


def test_smoothing_is_the_mean_of_three_by_three() -> None:
    given = levels()
    smooth = fusion((3,), smooth=True).fuse(given)
    map_HW = given[3][0, 0].float()
    assert smooth[0, 0, 1, 1].item() == pytest.approx(map_HW[:3, :3].mean().item(), abs=1e-6)
    assert smooth[0, 0, 0, 0].item() == pytest.approx(map_HW[:2, :2].mean().item(), abs=1e-6)  # the edge adds no zeros


def test_layer_norm_puts_each_image_on_the_shell() -> None:
    x0 = fusion(norm="layer")(levels()).double()
    d = x0[0].numel()
    torch.testing.assert_close(
        x0.flatten(1).square().sum(1), torch.full((3,), d, dtype=torch.float64), rtol=1e-4, atol=0
    )
    assert x0.flatten(1).mean(1).abs().max() < 1e-6


def test_channel_statistics_are_those_of_all_places_whatever_the_batches() -> None:
    given = levels(6)
    whole, pieces = fusion(norm="channel"), fusion(norm="channel")
    whole.learn_statistics([given])
    pieces.learn_statistics([{level: maps[a:b] for level, maps in given.items()} for a, b in ((0, 1), (1, 6))])
    torch.testing.assert_close(whole.mean_D11, pieces.mean_D11)
    torch.testing.assert_close(whole.std_D11, pieces.std_D11)
    x0 = whole(given).transpose(0, 1).flatten(1)
    torch.testing.assert_close(x0.mean(1), torch.zeros(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(x0.std(1, unbiased=False), torch.ones(5), rtol=0, atol=1e-4)


def correlated(count: int = 40) -> dict[int, torch.Tensor]:
    """Two levels whose channels depend on each other."""
    given = levels(count)
    given[3] = given[3] + 2 * given[2].float().mean(dim=(2, 3))[:, :1, None, None]
    given[3][:, 1] += 3 * given[3][:, 0] + 1
    return {level: maps.half() for level, maps in given.items()}


def test_whitening_leaves_components_of_mean_0_and_covariance_near_the_identity() -> None:
    given, one = correlated(), fusion(norm="whiten", stride=16)
    one.learn_statistics([given])
    x0 = one(given)
    assert x0.shape == (40, 4, 4, 4)
    x_CN = x0.transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(x_CN.mean(1), torch.zeros(4).double(), rtol=0, atol=1e-5)
    covariance = x_CN @ x_CN.T / x_CN.shape[1]
    torch.testing.assert_close(covariance - covariance.diagonal().diag(), torch.zeros(4, 4).double(), rtol=0, atol=1e-5)
    # the ridge leaves lambda / (lambda + 0.01): the more of its variance, the larger the component
    assert (covariance.diagonal() < 1).all()
    assert covariance.diagonal()[-1] == covariance.diagonal().max() > 0.99


def test_whitening_takes_an_image_s_own_brightness_and_contrast_away() -> None:
    given, one = correlated(), fusion(norm="whiten")
    one.learn_statistics([given])
    other = {level: (maps.float() * 1.5 + 0.25).half() for level, maps in given.items()}
    torch.testing.assert_close(one(other), one(given), rtol=0, atol=0.05)


def test_more_components_than_channels_are_all_of_them() -> None:
    params = FusionParams(levels=(2, 3), stride=16, smooth=False, norm="whiten", components=99)
    one = build_fusion(params, levels(), (64, 64))
    assert (one.inputs, one.channels) == (5, 5)
    assert fusion(norm="layer").channels == 5  # the setting is of `whiten` alone


@pytest.mark.parametrize("norm", ["channel", "whiten"])
def test_a_dead_channel_stays_finite(norm: str) -> None:
    given = levels()
    given[3][:, 1] = 0
    one = fusion(norm=norm)
    one.learn_statistics([given])
    assert one(given).isfinite().all()


def test_a_level_that_was_not_extracted_is_named() -> None:
    with pytest.raises(WTFlowError, match=r"\[4\] were not extracted, only \[2, 3\]"):
        fusion((3, 4))


def test_a_stride_beyond_the_image_is_refused() -> None:
    with pytest.raises(WTFlowError, match=r"train\.fusion\.stride: 33 .* 64 x 32 pixels\. Choose at most 32"):
        build_fusion(fusion(stride=33).params, levels(), (64, 32))


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(("before", "after"), [((32, 32), (32, 32)), ((16, 12), (32, 30)), ((31, 32), (15, 16))])
def test_maps_are_smoothed_and_brought_to_size_as_torch_does_with_channels_first(
    before: tuple[int, int], after: tuple[int, int], smooth: bool
) -> None:
    map_BCHW = torch.randn(2, 3, *before, generator=torch.Generator().manual_seed(0))
    wanted = map_BCHW.double()
    if smooth:
        wanted = F.avg_pool2d(wanted, 3, 1, 1, count_include_pad=False)
    if before > after:
        wanted = F.adaptive_avg_pool2d(wanted, after)
    elif before < after:
        wanted = F.interpolate(wanted, after, mode="bilinear", align_corners=False)
    params = FusionParams(levels=(2,), stride=8, smooth=smooth, norm="layer", components=3)
    found = Fusion(params, 3, after).fuse({2: map_BCHW})
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=5e-6)
