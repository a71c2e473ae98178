import math
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa
import pytest
import torch
from torch import Tensor

from tests.tiny_line import train_params, trained
from wtflow.batches import Batch, BatchParams, PlaceBatches, build_batches, shares
from wtflow.data.shards import FeatureShards
from wtflow.errors import WTFlowError
from wtflow.features.fusion import Fusion
from wtflow.training import start

CPU = torch.device("cpu")


def params(**changes: object) -> BatchParams:
    return train_params().batches.model_copy(update={"kind": "places", **changes})


@pytest.fixture
def fusion(tiny_fit: FeatureShards) -> Fusion:
    return start(tiny_fit, train_params()).scorer.fusion


def everything(shards: FeatureShards, fusion: Fusion) -> Tensor:
    """x0 at all places of all training images, [image, place, channel], in half precision."""
    x0_BCHW = fusion(shards.batch(shards.rows(split="train")))
    return x0_BCHW.flatten(2).transpose(1, 2).half()


def same(one: Batch, other: Batch) -> bool:
    assert one.place_B is not None
    assert other.place_B is not None
    return torch.equal(one.x0_BCHW, other.x0_BCHW) and torch.equal(one.place_B, other.place_B)


def test_a_sample_is_what_an_image_has_at_that_place(tiny_fit: FeatureShards, fusion: Fusion) -> None:
    x0_INC, rows = everything(tiny_fit, fusion), tiny_fit.rows(split="train")
    for batch in build_batches(params(), tiny_fit, fusion, CPU, seed=0).epoch(0):
        assert batch.place_B is not None
        assert batch.x0_BCHW.shape == (64, fusion.channels, 1, 1)
        image_B = torch.tensor([rows.index(row) for row in batch.row_B.tolist()])
        assert torch.equal(batch.x0_BCHW[:, :, 0, 0].half(), x0_INC[image_B, batch.place_B])


def test_epochs_differ_and_can_be_had_again_in_any_order(tiny_fit: FeatureShards, fusion: Fusion) -> None:
    batches = build_batches(params(), tiny_fit, fusion, CPU, seed=3)
    later, first = list(batches.epoch(1)), list(batches.epoch(0))
    assert len(first) == batches.steps == 5
    again = build_batches(params(), tiny_fit, fusion, CPU, seed=3)
    assert all(same(*pair) for pair in zip(first, again.epoch(0), strict=True))
    assert all(same(*pair) for pair in zip(later, again.epoch(1), strict=True))
    assert not same(first[0], later[0])
    other = build_batches(params(), tiny_fit, fusion, CPU, seed=4)
    assert not same(first[0], next(iter(other.epoch(0))))


@pytest.mark.parametrize("rarity", [0.0, 1.0, 2.0])
def test_places_are_drawn_as_often_as_their_rarity_says(tiny_fit: FeatureShards, fusion: Fusion, rarity: float) -> None:
    """Mean of |x0|^2 over many draws against its mean under the wanted shares."""
    batches = build_batches(params(rarity=rarity, places=4096), tiny_fit, fusion, CPU, seed=0)
    drawn_M = torch.cat([batch.x0_BCHW.square().mean(dim=(1, 2, 3)) for batch in batches.epoch(0)]).double()
    square_N = everything(tiny_fit, fusion).float().square().mean(dim=2).flatten().double()
    weight_N = square_N**rarity
    mean = (weight_N * square_N).sum() / weight_N.sum()
    deviation = ((weight_N * (square_N - mean) ** 2).sum() / weight_N.sum()).sqrt()
    assert abs(drawn_M.mean() - mean) < 4 * deviation / len(drawn_M) ** 0.5


def test_shares_by_hand() -> None:
    assert shares(torch.tensor([1.0, 3.0]), 1.0).tolist() == [0.25, 0.75]
    assert shares(torch.tensor([1.0, 3.0]), 2.0).tolist() == [0.1, 0.9]
    assert shares(torch.tensor([0.0, 3.0]), 0.0).tolist() == [0.5, 0.5]
    assert shares(torch.zeros(2), 1.0).tolist() == [0.5, 0.5]


def test_a_small_pool_holds_as_many_different_places_of_every_image(tiny_fit: FeatureShards, fusion: Fusion) -> None:
    images = len(tiny_fit.rows(split="train"))
    batches = build_batches(params(pool=5 * images + 3), tiny_fit, fusion, CPU, seed=0)
    assert isinstance(batches, PlaceBatches)
    place_IK = batches.place_N.view(images, 5)
    assert all(len(set(places)) == 5 for places in place_IK.tolist())
    x0_INC = everything(tiny_fit, fusion)
    expected = x0_INC.gather(1, place_IK[:, :, None].expand(-1, -1, x0_INC.shape[2]))
    assert torch.equal(batches.pool_NC.view(images, 5, -1), expected)


def test_a_small_line_gets_fewer_steps(tiny_fit: FeatureShards, fusion: Fusion) -> None:
    images = len(tiny_fit.rows(split="train"))
    small = params(pool=3 * images, places=16, steps=100, passes=2.0)
    batches = build_batches(small, tiny_fit, fusion, CPU, seed=0)
    assert batches.steps == math.ceil(2 * 3 * images / 16) == len(list(batches.epoch(0))) < 100
    assert build_batches(small.model_copy(update={"steps": 2}), tiny_fit, fusion, CPU, seed=0).steps == 2


def test_a_field_learns_from_places_what_it_is_asked_on_maps(tiny_fit: FeatureShards) -> None:
    changes = {"velocity": {"kind": "location", "width": 32}, "batches": {"kind": "places"}}
    state = trained(tiny_fit, train_params(epochs=8, **changes))
    assert state.history[-1].loss < 0.85 * state.history[0].loss
    assert state.scorer.field.get_parameter("place").abs().sum(dim=1).gt(0).all()


def test_features_that_are_not_finite_are_named(tiny_fit: FeatureShards, fusion: Fusion) -> None:
    row = tiny_fit.rows(split="train")[2]

    class Spoilt(FeatureShards):
        def batch(self, rows: Sequence[int]) -> dict[int, Tensor]:
            levels = super().batch(rows)
            if row in rows:
                levels[2][list(rows).index(row), 0, 0, 0] = torch.inf
            return levels

    spoilt = Spoilt(tiny_fit.folder, tiny_fit.header, tiny_fit.index)
    with pytest.raises(WTFlowError, match="not finite") as raised:
        build_batches(params(), spoilt, fusion, CPU, seed=0)
    assert str(raised.value).splitlines()[1:] == [f"  {tiny_fit.index['image_id'][row]}  {tiny_fit.index['path'][row]}"]


def test_a_unet_cannot_learn_from_single_places() -> None:
    with pytest.raises(WTFlowError, match=r"batches\.kind images"):
        train_params(batches={"kind": "places"}, velocity={"kind": "unet"})


def test_whole_maps_have_no_place(tiny_fit: FeatureShards, fusion: Fusion) -> None:
    batch = next(iter(build_batches(params(kind="images"), tiny_fit, fusion, CPU, seed=0).epoch(0)))
    assert batch.place_B is None
    assert batch.x0_BCHW.shape == (8, fusion.channels, *fusion.size)


@pytest.mark.parametrize("kind", ["images", "places"])
def test_copies_are_trained_on_as_well(kind: str, tiny_fit: FeatureShards, fusion: Fusion) -> None:
    splits = ["copy" if split == "calibrate" else split for split in tiny_fit.index["split"].to_pylist()]
    column = tiny_fit.index.schema.get_field_index("split")
    both = replace(tiny_fit, index=tiny_fit.index.set_column(column, "split", pa.array(splits)))
    assert set(splits) == {"copy", "train"}
    batches = build_batches(params(kind=kind, steps=1000, passes=50.0), both, fusion, CPU, seed=0)
    seen = torch.cat([batch.row_B for batch in batches.epoch(0)])
    assert set(seen.tolist()) == set(range(len(both)))
