import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from wtflow.artefact import read_json, write_json
from wtflow.data.manifest import Manifest
from wtflow.data.shards import FeatureShards
from wtflow.errors import DigestError, WTFlowError

FILES = (
    "part-00000.safetensors", "part-00001.safetensors", "index.parquet", "rejected.parquet", "backbone.safetensors",
)  # fmt: skip


@pytest.fixture
def copy(tiny_fit: FeatureShards, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_fit.folder, tmp_path / "fit"))


def test_rows_are_the_manifest_s_and_lie_in_several_partitions(tiny_fit: FeatureShards, tiny_features: Path) -> None:
    manifest = Manifest.read(tiny_features / "data/prepared/tiny/manifest.parquet")
    rows = manifest.rows("train", "calibrate")
    assert tiny_fit.index["image_id"].to_pylist() == [row["image_id"] for row in rows]
    assert tiny_fit.index.select(manifest.table.column_names).to_pylist() == rows
    assert tiny_fit.header["partitions"] >= 3
    assert (len(tiny_fit), tiny_fit.levels) == (len(rows), (2, 3))
    assert tiny_fit.data_version == manifest.data_version


def test_batches_come_in_the_order_asked_for_across_partitions(tiny_fit: FeatureShards) -> None:
    rows = [len(tiny_fit) - 1, 0, 9, 0]
    together = tiny_fit.batch(rows)
    assert together[2].shape == (4, 40, 8, 8)
    assert together[3].shape == (4, 112, 4, 4)
    for level in tiny_fit.levels:
        assert together[level].dtype == torch.float16
        for place, row in enumerate(rows):
            assert torch.equal(together[level][place], tiny_fit.batch([row])[level][0])
    assert not torch.equal(together[3][0], together[3][1])


def test_pieces_cover_the_rows_and_the_last_is_shorter(tiny_fit: FeatureShards) -> None:
    rows = list(range(10))
    pieces = list(tiny_fit.batches(rows, 4))
    assert [len(piece[2]) for piece in pieces] == [4, 4, 2]
    assert torch.equal(torch.cat([piece[3] for piece in pieces]), tiny_fit.batch(rows)[3])


def test_rows_of_a_split_and_label(tiny_fit: FeatureShards, tiny_test: FeatureShards) -> None:
    train, calibrate = tiny_fit.rows(split="train"), tiny_fit.rows(split="calibrate")
    assert sorted(train + calibrate) == list(range(len(tiny_fit)))
    assert len(calibrate) >= 4
    assert tiny_fit.rows(label="normal") == list(range(len(tiny_fit)))
    labels = Counter(tiny_test.index["label"].to_pylist())
    assert labels["anomalous"] == len(tiny_test.rows(split="test", label="anomalous")) == 8
    assert tiny_test.rows(split="train") == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_one_changed_byte_is_refused(copy: Path, name: str, share: float) -> None:
    data = bytearray((copy / name).read_bytes())
    data[int(share * (len(data) - 1))] ^= 1
    (copy / name).write_bytes(bytes(data))
    with pytest.raises(DigestError, match=name.replace(".", r"\.")):
        FeatureShards.open(copy)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_shortened_file_is_refused(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(DigestError, match="not the bytes"):
        FeatureShards.open(copy)
    (copy / name).unlink()
    with pytest.raises(DigestError, match="missing"):
        FeatureShards.open(copy)


def test_a_folder_that_was_never_sealed_does_not_open(copy: Path) -> None:
    (copy / "index.json").unlink()
    with pytest.raises(WTFlowError, match=r"index\.json: not there"):
        FeatureShards.open(copy)


def test_an_unknown_format_and_a_changed_header(copy: Path, tiny_fit: FeatureShards) -> None:
    header = read_json(copy / "index.json")
    write_json(copy / "index.json", header | {"data_version": "0" * 32 + ".dir"})
    assert FeatureShards.open(copy).digest != tiny_fit.digest
    write_json(copy / "index.json", header | {"format": 1})
    with pytest.raises(WTFlowError, match="format 1, this version reads 2"):
        FeatureShards.open(copy)
