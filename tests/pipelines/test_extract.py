import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipelines import extract
from tests.tiny_line import EXTRACT, LINE, PREPARE
from wtflow.data.manifest import Manifest, read_rejected
from wtflow.data.shards import FeatureShards
from wtflow.errors import WTFlowError

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


def configure(folder: Path, max_rejected_fraction: float = 0.0) -> None:
    prepare = PREPARE | {"max_rejected_fraction": max_rejected_fraction}
    params = {"prepare": prepare, "extract": EXTRACT, "lines": {LINE: {stage: {} for stage in STAGES}}}
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


@pytest.mark.slow
@pytest.mark.skipif(not CAN_MOUNT, reason="needs the right to mount a small disk: unshare -rm")
def test_a_disk_that_fills_in_the_middle_of_a_shard(workspace: Path, tiny_features: Path) -> None:
    """A real one of 200 KiB, which holds two shards."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "WTFLOW_THREADS": "1"}
    command = ["unshare", "-rm", "sh", "-c", FULL_DISK]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    left = [f".wtflow/extract/{LINE}/fit/part-{number:05d}.safetensors" for number in range(3)]
    assert done.stderr == f"error: no space left for {left[2]}. Free some, then run the stage again.\n"
    said = done.stdout.splitlines()
    assert said[:3] == ["exit 1", *left[:2]]
    assert said[-1] == "exit 0"
    for output in extract.OUTPUTS:
        features = f"data/features/{LINE}/{output}"
        assert FeatureShards.open(workspace / features).digest == FeatureShards.open(tiny_features / features).digest
