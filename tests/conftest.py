"""One tiny real product line for all tests, built once a session: 60 photographs, features, bundle."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import s3_server, tiny_line
from wtflow.data.shards import FeatureShards
from wtflow.training import be_deterministic

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
be_deterministic()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Stages set the threads of their process, and another number of them rounds otherwise."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw folder in layout `elpv`: 48 normal, 8 anomalous and 4 uncertain solar cells. Not to be changed."""
    raw = tmp_path_factory.mktemp("tiny") / "data" / "raw" / tiny_line.LINE
    tiny_line.write_raw(raw)
    return raw


@pytest.fixture(scope="session")
def tiny_features(tiny_raw: Path) -> Path:
    """Root folder with data/raw/tiny, data/prepared/tiny and data/features/tiny/{fit,test}. Not to be changed."""
    root = tiny_raw.parents[2]
    manifest = tiny_line.write_prepared(tiny_raw, root / "data/prepared" / tiny_line.LINE)
    tiny_line.write_features(manifest, tiny_raw, root / "data/features" / tiny_line.LINE)
    return root


@pytest.fixture(scope="session")
def tiny_fit(tiny_features: Path) -> FeatureShards:
    """The opened features of the train and calibrate splits."""
    return FeatureShards.open(tiny_features / "data/features" / tiny_line.LINE / "fit")


@pytest.fixture(scope="session")
def tiny_test(tiny_features: Path) -> FeatureShards:
    """The opened features of the test split."""
    return FeatureShards.open(tiny_features / "data/features" / tiny_line.LINE / "test")


@pytest.fixture(scope="session")
def tiny_bundle(tiny_fit: FeatureShards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle trained for two epochs on `tiny_fit` and calibrated on its calibrate split. Not to be changed."""
    path = tmp_path_factory.mktemp("models") / tiny_line.LINE
    tiny_line.write_trained(tiny_fit, path)
    return path


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Port of an S3 server on this machine: see `tests.s3_server`."""
    with s3_server.s3_server() as port:
        yield port
