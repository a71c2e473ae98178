import hashlib
import json
import multiprocessing
import shutil
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_line import PREPARE, extract_params
from wtflow.data.images import ImageLimits, decode, preprocess
from wtflow.data.shards import FORMAT, FeatureShards
from wtflow.errors import WTFlowError
from wtflow.features.augment import AugmentParams, varied
from wtflow.features.backbone import build_backbone
from wtflow.features.cache import FeatureCache, Place, Shelf, fill
from wtflow.features.upkeep import remove_waste

PIXELS = "012bb7359ee2128e2ca8de37ade64da98823831844e8e1f1d611d945f86bd638"
"""SHA-256 over what `decode` and `preprocess` make of the tiny line's photographs at 48 x 56."""
COPIES = "d7ca2c398f2902397717108abc51b0350131446ac7c87e2b0cd85cf67bca5ebf"
"""The same for a copy of each, as `varied` makes them."""


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return FeatureCache(tmp_path / "cache").shelf_of("abc", {"name": "network", "levels": [2], "image_size": [8, 8]})


def maps(*values: float) -> dict[str, torch.Tensor]:
    return {"level2": torch.stack([torch.full((2, 3, 3), value, dtype=torch.float16) for value in values])}


def test_the_pixels_are_those_that_the_cache_has_features_of(tiny_raw: Path) -> None:
    """A cached image is not decoded again: other pixels need another key."""
    total, copies = hashlib.sha256(), hashlib.sha256()
    for path in sorted((tiny_raw / "images").iterdir()):
        picture = decode(path.read_bytes(), ImageLimits.parse(PREPARE["limits"], "tests"))
        total.update(np.ascontiguousarray(preprocess(picture, (48, 56))).tobytes())
        copy = varied(picture, {"image_id": f"{path.name}~0"}, AugmentParams())
        copies.update(np.ascontiguousarray(preprocess(copy, (48, 56))).tobytes())
    assert (total.hexdigest(), copies.hexdigest(), FORMAT) == (PIXELS, COPIES, 2), (
        "decoder, resizer or copies (or Pillow) give other pixels: raise FORMAT of wtflow.data.shards, note it here"
    )


def test_images_are_found_gathered_and_named_by_their_bytes(shelf: Shelf) -> None:
    one, other = shelf.add(maps(1, 2), ["a", "b"], "note"), shelf.add(maps(3), ["c"], "note")
    assert shelf.find(["a", "c", "z"]) == {"a": Place(one, 0), "c": Place(other, 0)}
    gathered = shelf.reader()([Place(other, 0), Place(one, 1)])["level2"]
    assert gathered[:, 0, 0, 0].tolist() == [3, 2]
    assert gathered.dtype == torch.float16
    assert hashlib.sha256(shelf.file(one).read_bytes()).hexdigest() == one
    assert (shelf.rows(one), shelf.note(one)) == (2, "note")
    assert shelf.add(maps(1, 2), ["a", "b"], "note") == one


def test_the_shelf_is_the_backbones(tmp_path: Path) -> None:
    backbone = build_backbone(extract_params().backbone)
    cache = FeatureCache(tmp_path / "cache")
    shelf = cache.shelf(backbone)
    assert shelf.folder.name == f"{FORMAT}-{backbone.digest}"
    assert shelf.backbone_digest == backbone.digest
    assert shelf.backbone == backbone.params.model_dump(mode="json")
    assert cache.shelves() == [shelf]


@pytest.mark.parametrize("damage", ["bit", "gone", "note", "half a note"])
def test_what_is_damaged_is_not_found(damage: str, shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    shard, whole = shelf.add(maps(1, 2), ["a", "b"], ""), shelf.add(maps(3), ["c"], "")
    path, note = shelf.file(shard), shelf.folder / f"{shard}.json"
    if damage == "bit":
        path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    elif damage == "gone":
        path.unlink()
    elif damage == "note":
        note.write_text(json.dumps({"images": ["b", "a"], "digest": json.loads(note.read_text())["digest"]}))
    else:
        note.write_text(note.read_text()[:30])
    assert shelf.find(["a", "b", "c"]) == {"c": Place(whole, 0)}
    assert (str(path) in caplog.text) == (damage in ("bit", "gone"))
    assert shelf.add(maps(1, 2), ["a", "b"], "") == shard
    assert len(shelf.find(["a", "b", "c"])) == 3


def test_a_shard_that_another_run_mends_meanwhile_is_not_taken_from_it(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shelf.add(maps(1), ["a"], "")
    shelf.file(shard).write_bytes(b"damaged")
    whole = Shelf.whole

    def mended_at_once(self: Shelf, shard: str) -> bool:
        before = whole(self, shard)
        assert self.add(maps(1), ["a"], "") == shard
        return before

    monkeypatch.setattr(Shelf, "whole", mended_at_once)
    assert shelf.find(["a"]) == {}
    assert whole(shelf, shard)
    assert shelf.reader()([Place(shard, 0)])["level2"].unique().tolist() == [1]


def test_what_a_damaged_shard_held_is_found_where_it_was_computed_again(shelf: Shelf) -> None:
    """Together with other images, so in a shard of another name; what is removed later is the damaged one."""
    shard = shelf.add(maps(1, 2), ["a", "b"], "")
    shelf.file(shard).write_bytes(b"damaged")
    assert shelf.find(["a", "b"]) == {}
    others = [shelf.add(maps(1, value), ["a", str(value)], "") for value in range(3, 7)]
    assert shelf.find(["a"])["a"].shard == min(others)
    remove_waste(shelf, [])
    assert not shelf.file(shard).exists()


def test_features_that_are_there_are_taken_over_if_their_bytes_are_right(
    tiny_features: Path, tiny_fit: FeatureShards, tmp_path: Path
) -> None:
    features = Path(shutil.copytree(tiny_features / "data/features", tmp_path / "features"))
    part = features / "tiny/fit/part-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\x01")
    (features / "tiny/test/index.json").write_text("half")
    shelf = FeatureCache(tmp_path / "cache").shelf(build_backbone(extract_params().backbone))
    image_ids = tiny_fit.index["image_id"].to_pylist()
    assert fill(shelf, features, image_ids[:1]) == 1
    assert set(shelf.find(image_ids)) == set(image_ids[:8])  # a partition comes as a whole
    assert fill(shelf, features) == len(image_ids) - 16
    assert fill(shelf, features) == 0
    found = shelf.find(image_ids)
    assert set(found) == {*image_ids[:8], *image_ids[16:]}
    last = shelf.reader()([found[image_ids[-1]]])
    assert torch.equal(last["level3"][0], tiny_fit.batch([len(image_ids) - 1])[3][0])
    other = FeatureCache(tmp_path / "cache").shelf_of("of other weights", {})
    assert fill(other, features) == 0


def _hold(folder: Path, held: Event, leave: Event) -> None:
    with FeatureCache(folder).held():
        held.set()
        leave.wait(600)


def test_nothing_is_removed_while_a_run_holds_it(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache")
    context = multiprocessing.get_context("spawn")
    held, leave = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(cache.folder, held, leave))
    process.start()
    try:
        assert held.wait(300)
        with pytest.raises(WTFlowError, match="a run uses it"), cache.alone():
            pass
        with cache.held():  # another run may
            pass
        process.kill()  # which lets go
        process.join(60)
        with cache.alone():
            pass
    finally:
        process.kill()


@pytest.mark.parametrize("name", ["shard.tmp-12345678", ".tmpOBGrUT"], ids=["draft", "draft of safetensors"])
def test_what_killed_runs_left_is_swept_by_the_first_who_comes_alone(shelf: Shelf, tmp_path: Path, name: str) -> None:
    cache = FeatureCache(tmp_path / "cache")
    left = shelf.folder / name
    left.write_bytes(b"half")
    with cache.held():
        assert not left.exists()
        left.write_bytes(b"half")
        with cache.held():
            assert left.exists()  # it may be the other's
    with cache.alone():
        assert not left.exists()
