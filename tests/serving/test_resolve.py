import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from serving import resolve
from serving.resolve import champions, load, registry_uri
from tests.serving.lines import encoded, picture
from tests.serving.registry import crown, register
from wtflow.bundle import load_bundle
from wtflow.data.images import decode
from wtflow.errors import DigestError, WTFlowError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="module")
def registry(folder: Path, bundles: dict[str, Path]) -> str:
    """line-a: version 1 serves; version 2 is another bundle. line-b: version 1 serves. line-c: no champion."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    register(uri, "line-b", bundles["line-b"], folder, {"sample_image": "/data/b.png"})
    register(uri, "line-a", bundles["line-a"], folder)
    register(uri, "line-a", bundles["line-b"], folder)
    register(uri, "line-c", bundles["line-a"], folder)
    crown(uri, "line-a", 1)
    crown(uri, "line-b", 1)
    mlflow.MlflowClient(uri, uri).create_registered_model("somebody-elses")
    return uri


@pytest.mark.slow
def test_lines_with_a_champion(registry: str, bundles: dict[str, Path]) -> None:
    found = champions(registry)
    assert [(one.line, one.model, one.version) for one in found] == [
        ("line-a", "wtflow-line-a", 1),
        ("line-b", "wtflow-line-b", 1),
    ]
    assert [one.digest for one in found] == [load_bundle(bundles[one.line]).digest for one in found]
    assert [one.sample_image for one in found] == [None, "/data/b.png"]


@pytest.mark.slow
def test_loaded_detector_scores_as_the_bundle_does(registry: str, bundles: dict[str, Path]) -> None:
    line = load(champions(registry)[1])
    offline = load_bundle(bundles["line-b"])
    image = decode(encoded(picture(7)), offline.config.limits)
    assert line.detector.verdicts([image])[0].score == offline.detector().verdicts([image])[0].score
    assert (line.info.line, line.info.model_version, line.info.bundle_digest) == ("line-b", 1, offline.digest)


@pytest.mark.slow
def test_the_registry_of_the_pin_is_asked_wherever_the_process_is(registry: str, tmp_path: Path) -> None:
    """A replica on another node has neither this folder nor MLflow's variables."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
    }
    code = "import sys; from serving import resolve; print(resolve.load(resolve.champions(sys.argv[1])[0]).info.line)"
    done = subprocess.run(
        [sys.executable, "-c", code, registry],
        env=kept | {"PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "line-a", done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_pin_outlives_a_move_of_the_alias(registry: str, bundles: dict[str, Path]) -> None:
    """A replica that starts after the alias moved still loads what the others serve."""
    pinned = champions(registry)[0]
    crown(registry, "line-a", 2)
    try:
        assert champions(registry)[0].version == 2
        assert load(pinned).info.bundle_digest == load_bundle(bundles["line-a"]).digest
    finally:
        crown(registry, "line-a", 1)


@pytest.mark.slow
def test_bundle_that_is_not_the_tagged_one(folder: Path, registry: str, bundles: dict[str, Path]) -> None:
    version = register(registry, "line-d", bundles["line-a"], folder, {"bundle_digest": "0" * 64})
    wrong = resolve.Champion(registry, "line-d", "wtflow-line-d", version, "0" * 64, None)
    with pytest.raises(DigestError, match=r"wtflow-line-d version 1: .*000000000000.*make repro"):
        load(wrong)


@pytest.mark.slow
def test_one_changed_byte_is_refused(folder: Path, registry: str, bundles: dict[str, Path]) -> None:
    version = register(registry, "line-e", bundles["line-a"], folder)
    client = mlflow.MlflowClient(registry, registry)
    stored = client.get_model_version_download_uri("wtflow-line-e", str(version)).removeprefix("file://")
    weights = next(Path(stored).rglob("scorer.safetensors"))
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(DigestError, match=r"^wtflow-line-e version 1: .*scorer\.safetensors"):
        load(resolve.Champion(registry, "line-e", "wtflow-line-e", version, None, None))


@pytest.mark.slow
def test_model_without_a_bundle(folder: Path, registry: str) -> None:
    version = register(registry, "line-f", None, folder)
    with pytest.raises(WTFlowError, match=r"wtflow-line-f version 1: holds 0 bundles.*make repro"):
        load(resolve.Champion(registry, "line-f", "wtflow-line-f", version, None, None))


@pytest.mark.slow
def test_version_that_is_gone(registry: str) -> None:
    with pytest.raises(WTFlowError, match="wtflow-line-a version 99 did not come"):
        load(resolve.Champion(registry, "line-a", "wtflow-line-a", 99, None, None))


@pytest.mark.slow
def test_registry_without_champions(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri, uri)
    client.search_experiments()
    with pytest.raises(WTFlowError, match=r"no model wtflow-<line>.*make repro"):
        champions(uri)
    client.create_registered_model("wtflow-line-a")
    with pytest.raises(WTFlowError, match=r"without alias `champion`: wtflow-line-a.*make repro"):
        champions(uri)


def test_missing_registry_file_is_not_created(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with pytest.raises(WTFlowError, match=r"mlflow\.db: no such file.*make repro"):
        champions(f"sqlite:///{path}")
    assert not path.exists()


@pytest.mark.slow
def test_unreachable_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(WTFlowError, match="MLFLOW_TRACKING_URI"):
        champions("http://127.0.0.1:9")


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    path.write_text("this is not a database, however long it may be" * 9)
    with pytest.raises(WTFlowError, match=r"notes\.db: .*not a database.*MLFLOW_TRACKING_URI right"):
        champions(f"sqlite:///{path}")


def test_a_database_without_its_driver() -> None:
    with pytest.raises(
        WTFlowError, match=r"registry postgresql\+pg8000:.*No module named 'pg8000'.*MLFLOW_TRACKING_URI"
    ):
        champions("postgresql+pg8000://127.0.0.1:9/mlflow")


def test_registry_uri(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert registry_uri() == f"sqlite:///{tmp_path}/mlflow.db"
    for given, used in {
        "sqlite:///other/m.db": f"sqlite:///{tmp_path}/other/m.db",
        "sqlite:////data/m.db": "sqlite:////data/m.db",
        "http://mlflow:5000": "http://mlflow:5000",
    }.items():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        assert registry_uri() == used
