import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_line import LINE, PREPARE, extract_params, facts
from wtflow.artefact import write_json
from wtflow.data.images import ImageLimits
from wtflow.data.manifest import Manifest, read_rejected
from wtflow.data.shards import FeatureShards
from wtflow.errors import WTFlowError
from wtflow.features.backbone import Backbone, build_backbone
from wtflow.features.extract import Partition, Timing, extract

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


def run(
    manifest: Manifest, raw: Path, folder: Path, backbone: Backbone, **changes: Any
) -> tuple[list[dict[str, str]], list[Partition]]:
    """The fit output; rejected images and the partitions as they were reported."""
    partitions: list[Partition] = []
    rejected = extract(
        manifest.rows("train", "calibrate"),
        raw,
        folder,
        backbone,
        extract_params(**changes),
        LIMITS,
        facts(manifest),
        lambda number, partition: partitions.append(partition),
    )
    return rejected.to_pylist(), partitions


def test_a_second_run_writes_the_same_bytes(
    manifest: Manifest, tiny_raw: Path, tiny_fit: FeatureShards, tmp_path: Path, backbone: Backbone
) -> None:
    rejected, partitions = run(manifest, tiny_raw, tmp_path / "fit", backbone)
    assert (rejected, any(partition.reused for partition in partitions)) == ([], False)
    assert contents(tmp_path / "fit") == contents(tiny_fit.folder)


def test_finished_partitions_are_not_computed_again(
    manifest: Manifest, tiny_raw: Path, tiny_fit: FeatureShards, tmp_path: Path, backbone: Backbone
) -> None:
    folder = Path(shutil.copytree(tiny_fit.folder, tmp_path / "fit"))
    (folder / "index.json").unlink()
    (folder / "part-00001.safetensors").write_bytes(b"half")
    (folder / "part-00002.safetensors").unlink()
    (folder / "part-99999.safetensors").write_bytes(b"of an earlier, larger run")
    _, partitions = run(manifest, tiny_raw, folder, backbone)
    computed = [number for number, partition in enumerate(partitions) if not partition.reused]
    assert computed == [1, 2]
    assert contents(folder) == contents(tiny_fit.folder)


def test_other_weights_are_not_mixed_in(
    manifest: Manifest, tiny_raw: Path, tiny_fit: FeatureShards, tmp_path: Path, backbone: Backbone
) -> None:
    folder = Path(shutil.copytree(tiny_fit.folder, tmp_path / "fit"))
    weights = {name: value.clone() for name, value in backbone.network.state_dict().items()}
    weights["conv_stem.weight"] *= 1.01
    _, partitions = run(manifest, tiny_raw, folder, build_backbone(backbone.params, weights))
    assert not any(partition.reused for partition in partitions)
    assert FeatureShards.open(folder).digest != tiny_fit.digest


def test_damaged_images_are_counted_named_and_taken_again_when_restored(
    manifest: Manifest, tiny_raw: Path, raw: Path, tiny_fit: FeatureShards, tmp_path: Path, backbone: Backbone
) -> None:
    rows = manifest.rows("train", "calibrate")
    gone, changed, cut = rows[0], rows[9], rows[-1]
    (raw / gone["path"]).unlink()
    data = bytearray((raw / changed["path"]).read_bytes())
    data[-20] ^= 1
    (raw / changed["path"]).write_bytes(bytes(data))
    (raw / cut["path"]).write_bytes((raw / cut["path"]).read_bytes()[:500])
    folder = tmp_path / "fit"
    rejected, partitions = run(manifest, raw, folder, backbone)
    shards = FeatureShards.open(folder)
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
    total = sum((partition.timing for partition in partitions), Timing())
    assert (total.images, total.rejected) == (len(shards), 3)
    assert min(total.read, total.decode, total.infer, total.write) > 0
    row = shards.index["image_id"].to_pylist().index(rows[10]["image_id"])
    assert torch.equal(shards.batch([row])[3], tiny_fit.batch([10])[3])  # its neighbour moved up, with its features

    rejected, partitions = run(manifest, tiny_raw, folder, backbone)
    assert rejected == read_rejected(folder / "rejected.parquet").to_pylist() == []
    assert sum(not partition.reused for partition in partitions) == 3
    assert contents(folder) == contents(tiny_fit.folder)


def test_an_image_that_no_longer_decodes_is_rejected_with_the_reason(
    manifest: Manifest, tiny_raw: Path, tmp_path: Path, backbone: Backbone
) -> None:
    """Its bytes are those of the manifest, but limits have become narrower since."""
    params, limits = extract_params(), LIMITS.model_copy(update={"min_side": 301})
    rows = manifest.rows("train")[:3]
    with pytest.raises(WTFlowError, match="none of 3 images could be read"):
        extract(rows, tiny_raw, tmp_path / "none", backbone, params, limits, facts(manifest))
    assert not (tmp_path / "none" / "index.json").exists()


def test_a_partition_with_nothing_in_it_is_no_obstacle(
    manifest: Manifest, raw: Path, tmp_path: Path, backbone: Backbone
) -> None:
    rows = manifest.rows("train", "calibrate")
    for row in rows[8:16]:
        (raw / row["path"]).unlink()
    rejected, _ = run(manifest, raw, tmp_path / "fit", backbone)
    shards = FeatureShards.open(tmp_path / "fit")
    assert (len(rejected), len(shards)) == (8, len(rows) - 8)
    assert len(shards.batch(range(len(shards)))[3]) == len(shards)


WORKER = """
import json, os, resource, sys
from pathlib import Path
import torch
from tests.tiny_line import PREPARE, extract_params, facts
from wtflow.data.images import ImageLimits
from wtflow.data.manifest import Manifest, read_rejected
from wtflow.features import extract as module
from wtflow.features.backbone import build_backbone

torch.set_num_threads(1)
manifest, raw, folder, mode = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
manifest, params = Manifest.read(manifest), extract_params()


def on_partition(number, partition):
    print("partition", number, flush=True)
    if mode == "small-disk" and number == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


if mode == "slow":
    decode = module.decode

    def slowly(data, limits):
        import time

        time.sleep(0.1)
        return decode(data, limits)

    module.decode = slowly
try:
    module.extract(manifest.rows("train", "calibrate"), raw, folder, build_backbone(params.backbone), params,
                   ImageLimits.parse(PREPARE["limits"], "tests"), facts(manifest), on_partition)
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
    manifest: Manifest, tiny_features: Path, tiny_fit: FeatureShards, tmp_path: Path, backbone: Backbone
) -> None:
    folder = tmp_path / "fit"
    process = worker(tiny_features, folder, "slow")
    assert process.stdout is not None
    for number in range(2):
        assert process.stdout.readline() == f"partition {number}\n"
    time.sleep(0.3)  # a partition takes 0.8 s: this is in the middle of the third
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(WTFlowError, match="not there"):
        FeatureShards.open(folder)
    left = {path.name for path in folder.glob("*.safetensors")}
    assert left == {"part-00000.safetensors", "part-00001.safetensors"}
    _, partitions = run(manifest, tiny_features / "data/raw" / LINE, folder, backbone)
    assert [number for number, partition in enumerate(partitions) if partition.reused] == [0, 1]
    assert contents(folder) == contents(tiny_fit.folder)


@pytest.mark.slow
def test_a_disk_that_fills_inside_a_shard_leaves_no_half_of_it(
    manifest: Manifest, tiny_features: Path, tiny_fit: FeatureShards, tmp_path: Path, backbone: Backbone
) -> None:
    folder = tmp_path / "fit"
    process = worker(tiny_features, folder, "small-disk")
    _, errors = process.communicate()
    assert (process.returncode, errors.strip()) == (1, "OSError 27")
    assert [path.name for path in folder.iterdir()] == ["part-00000.safetensors"]
    with pytest.raises(WTFlowError, match="not there"):
        FeatureShards.open(folder)
    _, partitions = run(manifest, tiny_features / "data/raw" / LINE, folder, backbone)
    assert [partition.reused for partition in partitions] == [True] + [False] * (len(partitions) - 1)
    assert contents(folder) == contents(tiny_fit.folder)


@pytest.mark.parametrize("field", ["partition_size", "batch_size"])
def test_sizes_of_nothing_are_refused(field: str) -> None:
    with pytest.raises(WTFlowError, match=field):
        extract_params(**{field: 0})


def test_a_foreign_file_in_the_work_folder_is_removed(
    manifest: Manifest, tiny_raw: Path, tiny_fit: FeatureShards, tmp_path: Path, backbone: Backbone
) -> None:
    folder = Path(shutil.copytree(tiny_fit.folder, tmp_path / "fit"))
    write_json(folder / "part-00000.safetensors.tmp-12345678", {})
    run(manifest, tiny_raw, folder, backbone)
    assert contents(folder) == contents(tiny_fit.folder)
