import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_line import LINE, PREPARE, extract_params, facts
from wtflow.artefact import sha256_bytes, write_json
from wtflow.data.images import ImageLimits
from wtflow.data.manifest import Manifest, read_rejected
from wtflow.data.shards import FeatureShards
from wtflow.errors import WTFlowError
from wtflow.features.augment import source_of, with_copies
from wtflow.features.backbone import Backbone, build_backbone
from wtflow.features.cache import FeatureCache
from wtflow.features.extract import Extraction, Job, Partition, Rows, Timing, compute_here, extract, partitions

LIMITS = ImageLimits.parse(PREPARE["limits"], "tests")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return build_backbone(extract_params().backbone)


@pytest.fixture(scope="module")
def manifest(tiny_features: Path) -> Manifest:
    return Manifest.read(tiny_features / "data/prepared" / LINE / "manifest.parquet")


@pytest.fixture
def raw(tiny_raw: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_raw, tmp_path / "raw"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


def run(
    manifest: Manifest, raw: Path, folder: Path, cache: FeatureCache, backbone: Backbone, **changes: Any
) -> Extraction:
    """The fit output."""
    rows = manifest.rows("train", "calibrate")
    return extract(rows, folder, Job(raw, cache, backbone, extract_params(**changes), LIMITS), facts(manifest))


def many_rows(images: int) -> list[dict[str, Any]]:
    """Made up, in the order of a manifest."""
    return [{"image_id": one} for one in sorted(sha256_bytes(str(number).encode()) for number in range(images))]


def counts(done: Extraction) -> tuple[int, int, int]:
    """Images computed, taken from the cache, rejected."""
    return done.timing.images, done.timing.cached, done.timing.rejected


def test_what_is_in_the_cache_is_not_computed_and_the_bytes_are_the_same(
    manifest: Manifest, tiny_raw: Path, tiny_fit: FeatureShards, tmp_path: Path, cache: FeatureCache, backbone: Backbone
) -> None:
    heard: list[Timing] = []
    rows = manifest.rows("train", "calibrate")
    job = Job(tiny_raw, cache, backbone, extract_params(), LIMITS)
    first = extract(rows, tmp_path / "fit", job, facts(manifest), on_timing=heard.append)
    assert counts(first) == (len(rows), 0, 0)
    assert sum(one.images for one in heard) == len(rows)
    assert min(first.timing.read, first.timing.decode, first.timing.infer, first.timing.write) > 0
    assert contents(tmp_path / "fit") == contents(tiny_fit.folder)
    again = run(manifest, tmp_path / "no photographs are needed", tmp_path / "again", cache, backbone)
    assert counts(again) == (0, len(rows), 0)
    assert contents(tmp_path / "again") == contents(tiny_fit.folder)


def test_whole_partitions_cost_no_second_copy(
    manifest: Manifest, tiny_raw: Path, tmp_path: Path, cache: FeatureCache, backbone: Backbone
) -> None:
    run(manifest, tiny_raw, tmp_path / "fit", cache, backbone)
    shards = {path.stat().st_ino for path in cache.folder.glob("*/*.safetensors")}
    parts = {path.stat().st_ino for path in (tmp_path / "fit").glob("part-*")}
    assert parts == shards  # where the file system has no reflink


def test_added_images_alone_are_computed(
    manifest: Manifest, tiny_raw: Path, tiny_fit: FeatureShards, tmp_path: Path, cache: FeatureCache, backbone: Backbone
) -> None:
    """Three of them, each in another partition."""
    rows = manifest.rows("train", "calibrate")
    added = {rows[place]["path"] for place in (1, 12, 21)}
    job = Job(tiny_raw, cache, backbone, extract_params(), LIMITS)
    extract([row for row in rows if row["path"] not in added], tmp_path / "before", job, facts(manifest))
    computed: list[list[str]] = []

    def heard(job: Job, groups: list[Rows]) -> Any:
        computed.extend([row["path"] for row in group] for group in groups)
        return compute_here(job, groups)

    done = extract(rows, tmp_path / "fit", job, facts(manifest), heard)  # type: ignore[arg-type]
    assert counts(done) == (3, len(rows) - 3, 0)
    assert [set(group) for group in computed] == [added]
    assert contents(tmp_path / "fit") == contents(tiny_fit.folder)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_partitions_are_the_rows_in_order_and_none_is_larger_than_asked_for(size: int) -> None:
    rows = many_rows(1000)
    pieces = partitions(rows, size)
    assert [row for piece in pieces for row in piece] == rows
    assert {len(piece) for piece in pieces} <= set(range(1, size + 1))
    assert partitions([], size) == []


def test_an_image_more_or_less_changes_its_own_partition_and_hardly_another() -> None:
    """So that a line that grows every night does not have all its features written and stored anew."""
    rows = many_rows(10_000)
    before = set(map(str, partitions(rows, 64)))
    # 28: the mean of what a cut in 32 and a limit of 64 leave
    assert len(before) == pytest.approx(10_000 / 28, rel=0.15)
    for place in range(7, 10_000, 500):
        after = set(map(str, partitions(rows[:place] + rows[place + 1 :], 64)))
        assert len(before - after) <= 3
    grown = {str(piece) for piece in partitions(many_rows(10_010), 64)}
    assert len(grown - before) <= 20


def test_copies_of_training_images_are_features_of_their_own(
    manifest: Manifest, tiny_raw: Path, tiny_fit: FeatureShards, tmp_path: Path, cache: FeatureCache, backbone: Backbone
) -> None:
    params = extract_params(augment={"below": 1000, "copies": 2})
    photographs = manifest.rows("train", "calibrate")
    rows = with_copies(photographs, params.augment)
    job = Job(tiny_raw, cache, backbone, params, LIMITS)
    trained = len(tiny_fit.rows(split="train"))
    assert counts(extract(rows, tmp_path / "fit", job, facts(manifest))) == (len(photographs) + 2 * trained, 0, 0)
    shards = FeatureShards.open(tmp_path / "fit")
    assert (len(shards.rows(split="copy")), len(shards.training_rows())) == (2 * trained, 3 * trained)
    assert tiny_fit.training_rows() == tiny_fit.rows(split="train")
    first = shards.training_rows()[:3]
    photograph, *copies = (shards.batch([row])[2] for row in first)
    assert torch.equal(photograph, tiny_fit.batch(tiny_fit.rows(split="train")[:1])[2])
    assert {source_of(shards.index["image_id"][row].as_py()) for row in first} == {
        tiny_fit.index["image_id"][tiny_fit.rows(split="train")[0]].as_py()
    }
    away = [(copy.float() - photograph.float()).square().mean().sqrt().item() for copy in copies]
    assert all(0.01 < one < photograph.float().std().item() for one in away)  # another picture, of the same part
    again = extract(rows, tmp_path / "again", job, facts(manifest))
    assert counts(again) == (0, len(rows), 0)
    assert contents(tmp_path / "again") == contents(tmp_path / "fit")


@pytest.mark.parametrize("cached", ["nothing", "photographs", "copies"])
def test_a_photograph_that_is_lost_is_left_out_with_its_copies_whichever_of_them_were_cached(
    cached: str, manifest: Manifest, tiny_raw: Path, raw: Path, tmp_path: Path, cache: FeatureCache, backbone: Backbone
) -> None:
    params = extract_params(augment={"below": 1000, "copies": 2})
    photographs = manifest.rows("train", "calibrate")
    rows = with_copies(photographs, params.augment)
    before = {"nothing": [], "photographs": photographs, "copies": [row for row in rows if row["split"] == "copy"]}
    if before[cached]:
        job = Job(tiny_raw, cache, backbone, params, LIMITS)
        extract(before[cached], tmp_path / "before", job, facts(manifest))
    lost = manifest.rows("train")[3]["path"]
    (raw / lost).unlink()
    done = extract(rows, tmp_path / "fit", Job(raw, cache, backbone, params, LIMITS), facts(manifest))
    assert [one["path"] for one in done.rejected.to_pylist()] == [lost]
    shards = FeatureShards.open(tmp_path / "fit")
    assert shards.index["path"].to_pylist() == [row["path"] for row in rows if row["path"] != lost]
    fresh = Job(raw, FeatureCache(tmp_path / "other"), backbone, params, LIMITS)
    extract(rows, tmp_path / "fresh", fresh, facts(manifest))
    assert contents(tmp_path / "fit") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("changes", [{"partition_size": 5}, {"batch_size": 3}])
def test_other_sizes_compute_nothing_and_give_the_bytes_of_a_fresh_run(
    changes: dict[str, int], manifest: Manifest, tiny_raw: Path, tmp_path: Path, cache: FeatureCache, backbone: Backbone
) -> None:
    run(manifest, tiny_raw, tmp_path / "first", cache, backbone)
    done = run(manifest, tiny_raw, tmp_path / "fit", cache, backbone, **changes)
    assert done.timing.images == 0
    run(manifest, tiny_raw, tmp_path / "fresh", FeatureCache(tmp_path / "other"), backbone, **changes)
    assert contents(tmp_path / "fit") == contents(tmp_path / "fresh")


def test_another_split_folder_and_line_compute_nothing(
    manifest: Manifest, raw: Path, tmp_path: Path, cache: FeatureCache, backbone: Backbone
) -> None:
    run(manifest, raw, tmp_path / "fit", cache, backbone)
    rows = [row | {"split": "test", "line": "other", "path": f"moved/{row['path']}"} for row in manifest.rows("train")]
    job = Job(raw, cache, backbone, extract_params(), LIMITS)
    done = extract(rows, tmp_path / "test", job, facts(manifest))
    assert counts(done) == (0, len(rows), 0)
    index = FeatureShards.open(tmp_path / "test").index
    assert index["line"].to_pylist() == ["other"] * len(rows)


def test_other_weights_levels_and_image_sizes_are_not_mixed_in(
    manifest: Manifest, tiny_raw: Path, tiny_fit: FeatureShards, tmp_path: Path, cache: FeatureCache, backbone: Backbone
) -> None:
    run(manifest, tiny_raw, tmp_path / "fit", cache, backbone)
    weights = {name: value.clone() for name, value in backbone.network.state_dict().items()}
    weights["conv_stem.weight"] *= 1.01
    rows = len(tiny_fit)
    for number, (params, given) in enumerate(
        [
            (backbone.params, weights),
            (backbone.params.model_copy(update={"levels": (2,)}), None),
            (backbone.params.model_copy(update={"image_size": (64, 96)}), None),
        ]
    ):
        done = run(manifest, tiny_raw, tmp_path / str(number), cache, build_backbone(params, given))
        assert counts(done) == (rows, 0, 0)
        assert FeatureShards.open(tmp_path / str(number)).digest != tiny_fit.digest


def test_a_damaged_shard_is_computed_again(
    manifest: Manifest, tiny_raw: Path, tiny_fit: FeatureShards, tmp_path: Path, cache: FeatureCache, backbone: Backbone
) -> None:
    run(manifest, tiny_raw, tmp_path / "fit", cache, backbone)
    shard = max(cache.folder.glob("*/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()  # the output keeps its own
    shard.write_bytes(data)
    done = run(manifest, tiny_raw, tmp_path / "fit", cache, backbone)
    assert 0 < done.timing.images <= 8
    assert done.timing.cached == len(tiny_fit) - done.timing.images
    assert contents(tmp_path / "fit") == contents(tiny_fit.folder)


def test_damaged_images_are_counted_named_and_taken_again_when_restored(
    manifest: Manifest,
    tiny_raw: Path,
    raw: Path,
    tiny_fit: FeatureShards,
    tmp_path: Path,
    cache: FeatureCache,
    backbone: Backbone,
) -> None:
    rows = manifest.rows("train", "calibrate")
    gone, changed, cut = rows[0], rows[9], rows[-1]
    (raw / gone["path"]).unlink()
    data = bytearray((raw / changed["path"]).read_bytes())
    data[-20] ^= 1
    (raw / changed["path"]).write_bytes(bytes(data))
    (raw / cut["path"]).write_bytes((raw / cut["path"]).read_bytes()[:500])
    folder = tmp_path / "fit"
    done = run(manifest, raw, folder, cache, backbone)
    rejected, shards = done.rejected.to_pylist(), FeatureShards.open(folder)
    assert {one["path"]: one["reason"] for one in rejected} == {
        gone["path"]: "unreadable",
        changed["path"]: "changed",
        cut["path"]: "changed",
    }
    recorded = read_rejected(folder / "rejected.parquet").to_pylist()  # prepare's columns, or it would not open
    assert recorded == rejected == sorted(rejected, key=lambda one: one["path"])
    assert {one["line"] for one in recorded} == {LINE}
    assert shards.header["rejected"] == len(recorded)
    kept, left_out = set(shards.index["path"].to_pylist()), {one["path"] for one in recorded}
    assert (kept & left_out, kept | left_out) == (set(), {row["path"] for row in rows})
    assert counts(done) == (len(shards), 0, 3)
    row = shards.index["image_id"].to_pylist().index(rows[10]["image_id"])
    assert torch.equal(shards.batch([row])[3], tiny_fit.batch([10])[3])  # its neighbour moved up, with its features

    bytes_before = contents(folder)
    assert counts(run(manifest, raw, folder, cache, backbone)) == (0, len(rows) - 3, 3)
    assert contents(folder) == bytes_before

    done = run(manifest, tiny_raw, folder, cache, backbone)
    assert done.rejected.to_pylist() == read_rejected(folder / "rejected.parquet").to_pylist() == []
    assert counts(done) == (3, len(rows) - 3, 0)
    assert contents(folder) == contents(tiny_fit.folder)


def test_an_image_that_no_longer_decodes_is_rejected_with_the_reason(
    manifest: Manifest, tiny_raw: Path, tmp_path: Path, cache: FeatureCache, backbone: Backbone
) -> None:
    """Its bytes are those of the manifest, but limits have become narrower since."""
    job = Job(tiny_raw, cache, backbone, extract_params(), LIMITS.model_copy(update={"min_side": 301}))
    with pytest.raises(WTFlowError, match="none of 3 images could be read"):
        extract(manifest.rows("train")[:3], tmp_path / "none", job, facts(manifest))
    assert not (tmp_path / "none" / "index.json").exists()


def test_a_partition_with_nothing_in_it_is_no_obstacle(
    manifest: Manifest, raw: Path, tmp_path: Path, cache: FeatureCache, backbone: Backbone
) -> None:
    rows = manifest.rows("train", "calibrate")
    for row in rows[8:16]:
        (raw / row["path"]).unlink()
    done = run(manifest, raw, tmp_path / "fit", cache, backbone)
    shards = FeatureShards.open(tmp_path / "fit")
    assert (done.rejected.num_rows, len(shards)) == (8, len(rows) - 8)
    assert len(shards.batch(range(len(shards)))[3]) == len(shards)


def test_images_that_a_place_of_work_lost_are_missed(
    manifest: Manifest, tiny_raw: Path, tmp_path: Path, cache: FeatureCache, backbone: Backbone
) -> None:
    def forgetful(job: Job, groups: Any) -> Any:
        return compute_here(job, groups[1:])

    job = Job(tiny_raw, cache, backbone, extract_params(), LIMITS)
    with pytest.raises(WTFlowError, match="neither computed nor rejected, of 8"):
        extract(manifest.rows("train"), tmp_path / "fit", job, facts(manifest), forgetful)


def test_features_beyond_float16_are_refused(
    manifest: Manifest, tiny_raw: Path, tmp_path: Path, cache: FeatureCache, backbone: Backbone
) -> None:
    weights = {name: value.clone() for name, value in backbone.network.state_dict().items()}
    last = [name for name in weights if name.endswith("bn3.weight")][-1]
    weights[last] *= 1e9
    with pytest.raises(WTFlowError, match="beyond float16's 65504"):
        run(manifest, tiny_raw, tmp_path / "fit", cache, build_backbone(backbone.params, weights))
    assert list(cache.folder.glob("*/*.safetensors")) == []


WORKER = """
import resource, sys, time
from pathlib import Path
import torch
from tests.tiny_line import PREPARE, extract_params, facts
from wtflow.data.images import ImageLimits
from wtflow.data.manifest import Manifest
from wtflow.features import extract as module
from wtflow.features.backbone import build_backbone
from wtflow.features.cache import FeatureCache

torch.set_num_threads(1)
manifest, raw, folder, mode = Manifest.read(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
params, limits = extract_params(), ImageLimits.parse(PREPARE["limits"], "tests")
decode, keep = module.decode, module._keep


def slowly(data, limits):
    time.sleep(0.1)
    return decode(data, limits)


def on_a_disk_with_room_for_one(job, group, pictures):
    kept.append(group)
    if len(kept) == 2:  # too small for the shard of even one image: whatever is written after this one is refused too
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
    return keep(job, group, pictures)


def on_timing(timing):
    print("images", timing.images, flush=True)


kept = []
module.decode = slowly
if mode == "small-disk":
    module._keep = on_a_disk_with_room_for_one
job = module.Job(raw, FeatureCache(folder.with_name("cache")), build_backbone(params.backbone), params, limits)
try:
    module.extract(manifest.rows("train", "calibrate"), folder, job, facts(manifest), on_timing=on_timing)
except OSError as error:
    sys.exit(f"OSError {error.errno}")
"""


def worker(tiny_features: Path, folder: Path, mode: str) -> subprocess.Popen[str]:
    arguments = [str(tiny_features / "data/prepared" / LINE / "manifest.parquet")]
    arguments += [str(tiny_features / "data/raw" / LINE), str(folder), mode]
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_run_killed_inside_a_partition_is_continued(
    manifest: Manifest,
    tiny_features: Path,
    tiny_fit: FeatureShards,
    tmp_path: Path,
    cache: FeatureCache,
    backbone: Backbone,
) -> None:
    process = worker(tiny_features, tmp_path / "fit", "slow")
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["images 0\n", "images 8\n"]
    time.sleep(0.3)  # an image takes 0.1 s, and the second partition is being written: this is within a later one
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "fit").exists()
    kept = len(cache.shelf(backbone).find(tiny_fit.index["image_id"].to_pylist()))
    whole = [len(piece) for piece in partitions(manifest.rows("train", "calibrate"), 8)]
    assert kept in list(accumulate(whole))[:-1]  # whole partitions, in order
    done = run(manifest, tiny_features / "data/raw" / LINE, tmp_path / "fit", cache, backbone)
    assert counts(done) == (len(tiny_fit) - kept, kept, 0)
    assert contents(tmp_path / "fit") == contents(tiny_fit.folder)


@pytest.mark.slow
def test_a_disk_that_fills_inside_a_shard_leaves_no_half_of_it(
    manifest: Manifest,
    tiny_features: Path,
    tiny_fit: FeatureShards,
    tmp_path: Path,
    cache: FeatureCache,
    backbone: Backbone,
) -> None:
    process = worker(tiny_features, tmp_path / "fit", "small-disk")
    _, errors = process.communicate()
    assert (process.returncode, errors.strip()) == (1, "OSError 27")
    assert not (tmp_path / "fit").exists()
    kept = len(cache.shelf(backbone).find(tiny_fit.index["image_id"].to_pylist()))
    assert kept == len(partitions(manifest.rows("train", "calibrate"), 8)[0])
    assert list(cache.folder.glob("*/*.tmp-*")) == []
    done = run(manifest, tiny_features / "data/raw" / LINE, tmp_path / "fit", cache, backbone)
    assert counts(done) == (len(tiny_fit) - kept, kept, 0)
    assert contents(tmp_path / "fit") == contents(tiny_fit.folder)


@pytest.mark.parametrize("field", ["partition_size", "batch_size"])
def test_sizes_of_nothing_are_refused(field: str) -> None:
    with pytest.raises(WTFlowError, match=field):
        extract_params(**{field: 0})


def test_what_an_earlier_run_left_in_the_folder_is_removed(
    manifest: Manifest, tiny_raw: Path, tiny_fit: FeatureShards, tmp_path: Path, cache: FeatureCache, backbone: Backbone
) -> None:
    folder = Path(shutil.copytree(tiny_fit.folder, tmp_path / "fit"))
    write_json(folder / "part-00000.safetensors.tmp-12345678", {})
    (folder / "part-99999.safetensors").write_bytes(b"of an earlier, larger run")
    (folder / "part-00001.safetensors").write_bytes(b"half")
    run(manifest, tiny_raw, folder, cache, backbone)
    assert contents(folder) == contents(tiny_fit.folder)


def test_a_partition_can_be_told_to_another_process(tmp_path: Path) -> None:
    """Ray hands it over."""
    partition = Partition(["a"], "b", [], Timing(images=1))
    assert pickle.loads(pickle.dumps(partition)) == partition  # noqa: S301
