import shutil
from pathlib import Path

import pytest
import torch

from tests.features.test_cache import maps
from tests.tiny_line import LINE
from wtflow.artefact import read_json, write_json
from wtflow.data.shards import FeatureShards
from wtflow.errors import WTFlowError
from wtflow.features.cache import FeatureCache, Shelf
from wtflow.features.upkeep import (
    Fault,
    faults,
    fill_from,
    holdings,
    images_in_use,
    remove_waste,
    shelves_of,
    waste,
)

SETTINGS = {"name": "network", "levels": [2], "image_size": [8, 8]}


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


@pytest.fixture
def shelf(cache: FeatureCache) -> Shelf:
    return cache.shelf_of("abc", SETTINGS)


def values(shelf: Shelf, image_ids: list[str]) -> dict[str, float]:
    """What was kept for each image that is found."""
    places, gather = shelf.find(image_ids), shelf.reader()
    return {one: float(gather([places[one]])["level2"][0, 0, 0, 0]) for one in places}


def test_a_shelf_is_counted(cache: FeatureCache, shelf: Shelf) -> None:
    shelf.add(maps(1, 2), ["a", "b"], "")
    shard = shelf.add(maps(2, 3), ["b", "c"], "")
    (shelf.folder.parents[1] / "other name").hardlink_to(shelf.file(shard))
    (one,) = holdings(cache)
    assert (one.backbone, one.digest, one.levels, one.image_size) == ("network", "abc", [2], [8, 8])
    assert (one.shards, one.images) == (2, 3)
    assert one.linked_bytes == shelf.file(shard).stat().st_size
    assert one.bytes == sum(path.stat().st_size for path in shelf.folder.iterdir())


def test_every_damaged_file_is_named(shelf: Shelf) -> None:
    shards = [shelf.add(maps(value), [str(value)], "") for value in range(5)]
    assert list(faults(shelf)) == []
    paths = [shelf.file(shard) for shard in shards]
    notes = [path.with_suffix(".json") for path in paths]
    paths[0].write_bytes(paths[0].read_bytes()[:-1] + b"\x01")
    paths[1].unlink()
    notes[2].unlink()
    notes[3].write_text("{}")
    assert {(fault.path, fault.what) for fault in faults(shelf)} == {
        (paths[0], "not the bytes that were written"),
        (notes[1], "its shard is missing"),
        (paths[2], "its note is missing"),
        (notes[3], "not the note that was written"),
    }
    assert isinstance(next(faults(shelf)), Fault)


def test_unused_shards_go_and_mostly_unused_ones_are_packed(shelf: Shelf) -> None:
    unused = shelf.add(maps(1, 2), ["a", "b"], "")
    mostly = [shelf.add(maps(*range(at, at + 4)), [f"m{value}" for value in range(at, at + 4)], "") for at in (0, 4)]
    half = shelf.add(maps(8, 9), ["h8", "h9"], "")
    orphan = shelf.add(maps(7), ["o"], "")
    (shelf.folder / f"{orphan}.json").unlink()
    used = {"m1", "m6", "h9"}
    found = waste(shelf, used)
    assert {(one.shard, tuple(one.used), one.images) for one in found} == {
        (unused, (), 2),
        (mostly[0], ("m1",), 4),
        (mostly[1], ("m6",), 4),
    }
    assert sum(one.bytes for one in found) == sum(shelf.file(one.shard).stat().st_size for one in found)
    before = values(shelf, sorted(used))
    remove_waste(shelf, found)
    assert values(shelf, sorted(used)) == before == {"m1": 1, "m6": 6, "h9": 9}
    assert len(list(shelf.folder.glob("*.safetensors"))) == 2
    assert shelf.file(half).exists()
    assert list(faults(shelf)) == []
    assert waste(shelf, used) == []


def test_a_copy_is_used_while_its_photograph_is(shelf: Shelf) -> None:
    both = shelf.add(maps(1, 2, 3, 4), ["a", "a~1", "b", "b~1"], "")
    shelf.add(maps(5, 6), ["c~1", "c~2"], "")
    assert [(one.used, one.images) for one in waste(shelf, {"a", "b"})] == [([], 2)]
    assert {one.shard: one.used for one in waste(shelf, {"c"})} == {both: []}


def test_a_note_without_its_shard_is_waste(shelf: Shelf) -> None:
    shard = shelf.add(maps(1), ["a"], "")
    shelf.file(shard).unlink()
    (found,) = waste(shelf, set())
    assert (found.images, found.bytes) == (1, 0)
    remove_waste(shelf, [found])
    assert list(shelf.contents()) == []


def test_a_second_copy_is_waste(shelf: Shelf) -> None:
    """Two runs at once may have computed the same."""
    shelf.add(maps(1, 2), ["a", "b"], "one")
    shelf.add(maps(1, 2), ["a", "b"], "other")
    (found,) = waste(shelf, {"a", "b"})
    remove_waste(shelf, [found])
    assert values(shelf, ["a", "b"]) == {"a": 1, "b": 2}


def test_a_damaged_shard_is_not_packed_under_a_new_name(shelf: Shelf) -> None:
    shard = shelf.add(maps(1, 2, 3), ["a", "b", "c"], "")
    shelf.file(shard).write_bytes(shelf.file(shard).read_bytes()[:-1] + b"\x01")
    remove_waste(shelf, waste(shelf, {"c"}))
    assert values(shelf, ["a", "b", "c"]) == {}
    assert list(shelf.folder.glob("*.safetensors")) == []


def test_images_of_all_manifests_are_in_use(tiny_features: Path, tmp_path: Path) -> None:
    prepared = tiny_features / "data/prepared"
    used = images_in_use([prepared])
    assert len(used) == 60
    with pytest.raises(WTFlowError, match="would count as unused"):
        images_in_use([prepared, tmp_path])
    shutil.copytree(prepared / LINE, tmp_path / "prepared/other")
    assert images_in_use([prepared, tmp_path / "prepared"]) == used


def test_a_backbone_is_named_by_its_first_digits(cache: FeatureCache) -> None:
    one, other = cache.shelf_of("abc1", SETTINGS), cache.shelf_of("abd2", SETTINGS)
    assert shelves_of(cache, "abc") == [one]
    assert shelves_of(cache, "abd2") == [other]
    for wrong in ("ab", "x"):
        with pytest.raises(WTFlowError, match="Known: abc1, abd2"):
            shelves_of(cache, wrong)


def test_no_digit_names_no_backbone(cache: FeatureCache, shelf: Shelf) -> None:
    with pytest.raises(WTFlowError, match="--drop: no digest given"):
        shelves_of(cache, "")


@pytest.mark.parametrize("settings", [[], {}, SETTINGS | {"image_size": 8}])
def test_damaged_settings_of_a_backbone_are_named(cache: FeatureCache, shelf: Shelf, settings: object) -> None:
    write_json(shelf.folder / "backbone.json", settings)
    with pytest.raises(WTFlowError, match=rf"{shelf.folder}/backbone\.json: not the settings .* Remove this file"):
        holdings(cache)


def test_pulled_features_fill_an_empty_cache(
    tiny_features: Path, tiny_test: FeatureShards, cache: FeatureCache
) -> None:
    assert fill_from(cache, tiny_features / "data/features") == 60
    (shelf,) = cache.shelves()
    assert shelf.backbone_digest == tiny_test.header["backbone_digest"]
    assert list(faults(shelf)) == []
    place = shelf.find(tiny_test.index["image_id"].to_pylist()[:1])
    gathered = shelf.reader()(list(place.values()))
    assert torch.equal(gathered["level2"], tiny_test.batch([0])[2])
    assert fill_from(cache, tiny_features / "data/features") == 0


@pytest.mark.parametrize("change", [None, {"backbone": None}, {"backbone": {}}])
def test_a_damaged_header_of_pulled_features_is_named(
    change: dict[str, object] | None, tiny_features: Path, cache: FeatureCache, tmp_path: Path
) -> None:
    index = tmp_path / LINE / "fit/index.json"
    header = read_json(tiny_features / "data/features" / LINE / "fit/index.json")
    write_json(index, [] if change is None else header | change)
    with pytest.raises(WTFlowError, match=rf"{index}: not the header of features\. Fetch the features again"):
        fill_from(cache, tmp_path)
    assert not cache.folder.exists()


@pytest.mark.parametrize("digest", ["x/../../../outside", "0" * 63, None])
def test_pulled_features_cannot_name_a_folder_of_their_own(
    digest: str | None, tiny_features: Path, cache: FeatureCache, tmp_path: Path
) -> None:
    features = Path(shutil.copytree(tiny_features / "data/features", tmp_path / "features"))
    index = features / LINE / "fit/index.json"
    write_json(index, read_json(index) | {"backbone_digest": digest})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(WTFlowError, match=rf"{index}: backbone_digest .* Fetch the features again"):
        fill_from(cache, features)
    assert sorted(tmp_path.iterdir()) == before
