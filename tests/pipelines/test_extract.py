import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import extract, prepare
from pipelines.adapters import ray_extract
from pipelines.environment import RunSettings
from tests.tiny_line import EXTRACT, LINE, PREPARE
from wtflow.data.manifest import Manifest, read_rejected
from wtflow.data.shards import FeatureShards
from wtflow.errors import WTFlowError
from wtflow.features.backbone import Backbone
from wtflow.features.extract import Job, Partition, Rows, compute_here

REPOSITORY = Path(__file__).parents[2]
STAGES = ("prepare", "extract", "train", "evaluate", "register")
CAN_MOUNT = subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode == 0
FULL_DISK = f"""
mkdir .wtflow && mount -t tmpfs -o size=200k none .wtflow || exit 99
{sys.executable} -m pipelines.extract {LINE}; echo "exit $?"
find .wtflow -type f | sort
mount -o remount,size=100m .wtflow
{sys.executable} -m pipelines.extract {LINE}; echo "exit $?"
"""


@pytest.fixture
def workspace(tiny_features: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny line, prepared, in a folder of its own."""
    for name in ("raw", "prepared"):
        shutil.copytree(tiny_features / "data" / name, tmp_path / "data" / name)
    configure(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configure(folder: Path, max_rejected_fraction: float = 0.0, **changes: Any) -> None:
    prepare = PREPARE | {"max_rejected_fraction": max_rejected_fraction}
    params = {"prepare": prepare, "extract": EXTRACT | changes, "lines": {LINE: {stage: {} for stage in STAGES}}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def test_every_image_is_in_the_features_or_among_the_rejected(workspace: Path) -> None:
    manifest = Manifest.read(Path(f"data/prepared/{LINE}/manifest.parquet"))
    gone = {splits: manifest.rows(*splits)[0]["path"] for splits in extract.OUTPUTS.values()}
    for path in gone.values():
        (workspace / "data/raw" / LINE / path).unlink()
    with pytest.raises(WTFlowError, match=r"1 of \d+ images could not be read again, first images/"):
        extract.main(LINE)
    configure(workspace, max_rejected_fraction=0.1)
    extract.main(LINE)
    for output, splits in extract.OUTPUTS.items():
        folder = Path(f"data/features/{LINE}/{output}")
        shards, rejected = FeatureShards.open(folder), read_rejected(folder / "rejected.parquet")
        assert rejected.select(["path", "line", "reason"]).to_pylist() == [
            {"path": gone[splits], "line": LINE, "reason": "unreadable"}
        ]
        assert len(shards) + rejected.num_rows == len(manifest.rows(*splits))


def test_copies_do_not_make_the_share_of_the_rejected_smaller(workspace: Path) -> None:
    manifest = Manifest.read(Path(f"data/prepared/{LINE}/manifest.parquet"))
    photographs = manifest.rows(*extract.OUTPUTS["fit"])
    lost = next(row for row in photographs if row["split"] == "train")
    (workspace / "data/raw" / LINE / lost["path"]).unlink()
    configure(workspace, augment={"below": 1000, "copies": 2})
    with pytest.raises(WTFlowError, match=f"1 of {len(photographs)} images could not be read again"):
        extract.main(LINE)
    configure(workspace, 0.1, augment={"below": 1000, "copies": 2})
    extract.main(LINE)
    shards = FeatureShards.open(Path(f"data/features/{LINE}/fit"))
    assert len(shards.rows(split="train")) == len(manifest.rows("train")) - 1
    assert len(shards.rows(split="copy")) == 2 * len(shards.rows(split="train"))


def test_a_second_line_and_pulled_features_cost_no_inference(
    workspace: Path, tiny_features: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line `other` has the photographs of `tiny`, whose features are there, and no cache."""
    monkeypatch.setenv("WTFLOW_FEATURES", str(workspace / "shared"))
    shutil.copytree(tiny_features / "data/features", "data/features")
    lines = {line: {stage: {} for stage in STAGES} for line in (LINE, "other")}
    lines["other"]["prepare"] = {"salt": "another split"}
    Path("params.yaml").write_text(yaml.safe_dump({"prepare": PREPARE, "extract": EXTRACT, "lines": lines}))
    shutil.copytree(f"data/raw/{LINE}", "data/raw/other")
    Path("data/raw/other/images").rename("data/raw/other/pictures")
    labels = Path("data/raw/other/labels.csv")
    labels.write_text(labels.read_text().replace("images/", "pictures/"))
    prepare.main("other")
    capsys.readouterr()
    extract.main("other")
    said = capsys.readouterr().out
    images = len(Manifest.read(Path("data/prepared/other/manifest.parquet")).rows())
    assert said.count(": 0 images computed") == 2
    assert len(list(Path("shared").glob("*/*.safetensors"))) > 0
    assert not Path(".wtflow/features").exists()
    assert sum(len(FeatureShards.open(Path(f"data/features/other/{one}"))) for one in extract.OUTPUTS) == images
    fits = [FeatureShards.open(Path(f"data/features/{line}/fit")) for line in lines]
    assert fits[0].index["image_id"] != fits[1].index["image_id"]


@pytest.mark.slow
@pytest.mark.skipif(not CAN_MOUNT, reason="needs the right to mount a small disk: unshare -rm")
def test_a_disk_that_fills_in_the_middle_of_a_shard(workspace: Path, tiny_features: Path) -> None:
    """A real one of 200 KiB, which holds four shards."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "WTFLOW_THREADS": "1"}
    command = ["unshare", "-rm", "sh", "-c", FULL_DISK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    said = done.stdout.splitlines()
    assert (said[0], said[-1]) == ("exit 1", "exit 0")
    assert re.fullmatch(
        r"error: no space left for \S+/\.wtflow/features/2-[0-9a-f]{64}/\S+\. "
        r"Free some, then type the same command\.\n",
        done.stderr,
    )
    left = [Path(path) for path in said[1:-3] if path.endswith(".safetensors")]
    assert len(left) == 4
    assert all(path.with_suffix(".json").as_posix() in said for path in left)
    assert not any(".tmp-" in path for path in said)
    kept = re.search(r", (\d+) from the cache", done.stdout)
    assert kept is not None
    assert int(kept[1]) == 18  # their images: the first partitions have 8, 8, 1 and 1
    for output in extract.OUTPUTS:
        features = f"data/features/{LINE}/{output}"
        assert FeatureShards.open(workspace / features).digest == FeatureShards.open(tiny_features / features).digest


def test_a_gpu_is_asked_for_only_where_something_is_computed(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(Backbone, "to", lambda backbone, device: asked.append(device) or backbone)
    monkeypatch.setenv("WTFLOW_USE_GPU", "true")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    extract.main(LINE)
    assert set(asked) == {"cuda"}
    asked.clear()
    extract.main(LINE)  # all of it is in the cache
    assert asked == []
    shutil.rmtree(workspace / ".wtflow/features")
    shutil.rmtree(workspace / "data/features")
    monkeypatch.setenv("RAY_ADDRESS", "a cluster's")
    elsewhere: list[int] = []

    def on_ray(job: Job, groups: Sequence[Rows], settings: RunSettings) -> Iterator[Partition]:
        elsewhere.append(len(groups))
        return compute_here(job, groups)

    monkeypatch.setattr(ray_extract, "_compute", on_ray)
    extract.main(LINE)
    assert len(elsewhere) == 2
    assert asked == []
