import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipelines import comparison, register
from pipelines.adapters import mlflow_registry as models
from pipelines.adapters.tracking import tracking
from pipelines.register import Match, Trial, promote
from wtflow.bundle import Bundle, load_bundle
from wtflow.data.manifest import Manifest
from wtflow.data.shards import FeatureShards

if TYPE_CHECKING:
    from mlflow import MlflowClient

pytestmark = pytest.mark.slow
MARGIN = 0.01
TEST_SET = "a" * 64


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple["MlflowClient", str]]:
    """A registry and its experiment. Every test has a line of its own in it."""
    folder = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        with tracking() as opened:
            yield opened


@pytest.fixture
def client(registry: tuple["MlflowClient", str]) -> "MlflowClient":
    return registry[0]


@pytest.fixture
def trial(tiny_features: Path, tiny_test: FeatureShards) -> Trial:
    return Trial(tiny_test, Manifest.read(tiny_features / "data/prepared/tiny/manifest.parquet"))


def challenger(client: "MlflowClient", line: str, auroc: float | None, test_set: str = TEST_SET) -> models.Registered:
    """A new version that was measured on `test_set`."""
    tags = {"bundle_digest": "0" * 64, "test_set": test_set, "image_auroc": json.dumps(auroc)}
    added = client.create_model_version(models.model_name(line), "file:///nowhere", tags=tags)
    return models.registered(client, line, int(added.version))


def champion(client: "MlflowClient", line: str) -> int | None:
    return models.aliases(client, line).get(models.CHAMPION)


def test_the_margin_does_not_add_up_over_promotions(client: "MlflowClient", trial: Trial) -> None:
    client.create_registered_model(models.model_name("steps"))
    champions, verdicts = [], []
    for auroc in (0.900, 0.895, 0.889, 0.891, 0.950, 0.941, 0.935):
        verdicts.append(promote(client, "steps", challenger(client, "steps", auroc), trial, MARGIN))
        champions.append(champion(client, "steps"))
    # 0.889 and 0.935 are within the margin of the champion that they met, but not of the best
    assert champions == [1, 2, 2, 4, 5, 6, 6]
    assert verdicts[:2] == ["champion", "champion in place of version 1"]
    assert "0.8890 is more than 0.01 below 0.9000" in verdicts[2]
    assert "version 2 stays (now at 0.8950)" in verdicts[2]


def test_a_model_that_a_person_made_champion_is_the_one_to_beat(client: "MlflowClient", trial: Trial) -> None:
    name = models.model_name("by-hand")
    client.create_registered_model(name)
    promote(client, "by-hand", challenger(client, "by-hand", 0.80), trial, MARGIN)
    client.set_registered_model_alias(name, models.CHAMPION, str(challenger(client, "by-hand", 0.95).version))
    promote(client, "by-hand", challenger(client, "by-hand", 0.90), trial, MARGIN)
    assert champion(client, "by-hand") == 2


def test_a_champion_that_another_process_makes_meanwhile_is_the_one_to_beat(
    client: "MlflowClient", trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.create_registered_model(models.model_name("race"))
    promote(client, "race", challenger(client, "race", 0.90), trial, MARGIN)
    slow, fast = challenger(client, "race", 0.91), challenger(client, "race", 0.95)
    measure = register._match

    def overtaken(*arguments: Any) -> Match:
        monkeypatch.undo()
        models.crown(client, "race", fast, None)
        return measure(*arguments)

    monkeypatch.setattr(register, "_match", overtaken)
    verdict = promote(client, "race", slow, trial, MARGIN)
    assert f"version {fast.version} stays (now at 0.9500)" in verdict
    assert champion(client, "race") == fast.version


def test_the_best_that_is_noted_never_falls(client: "MlflowClient") -> None:
    client.create_registered_model(models.model_name("best"))
    for auroc in (0.95, 0.90):
        models.crown(client, "best", challenger(client, "best", auroc), None)
    assert models.best_champion(client, "best", TEST_SET) == 0.95


def test_without_anomalies_the_champion_stays(client: "MlflowClient", trial: Trial) -> None:
    client.create_registered_model(models.model_name("normals"))
    first, second = (challenger(client, "normals", None) for _ in range(2))
    assert promote(client, "normals", first, trial, MARGIN) == "champion"
    assert "no anomalous images" in promote(client, "normals", second, trial, MARGIN)
    assert champion(client, "normals") == first.version
    assert promote(client, "normals", first, trial, MARGIN) == "already champion"


def added(
    registry: tuple["MlflowClient", str],
    line: str,
    bundle: Bundle,
    folder: Path,
    tags: dict[str, str],
    trained_on: list[str],
) -> models.Registered:
    """A version of `line` with real files."""
    client, experiment = registry
    (folder / "index.html").touch()
    tags = {"bundle_digest": bundle.digest, **tags}
    named = replace(bundle, provenance={**bundle.provenance, "line": line})
    number = models.add_version(client, experiment, named, {}, folder / "index.html", tags, trained_on)
    return models.registered(client, line, number)


def test_on_a_new_test_set_the_champion_is_measured_and_its_figure_is_kept(
    registry: tuple["MlflowClient", str],
    trial: Trial,
    tiny_bundle: Path,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    client, line, bundle = registry[0], "tiny", load_bundle(tiny_bundle)
    trained_on = [row["image_id"] for row in trial.manifest.rows("train")]
    tags = {"test_set": "of former days", "image_auroc": "0.2"}
    first = added(registry, line, bundle, tmp_path, tags, trained_on)
    assert [str(one.message) for one in recwarn if "input example" in str(one.message)] == []
    assert models.version_of(client, line, bundle.digest) == first
    assert promote(client, line, first, trial, MARGIN) == "champion"

    now, measured = comparison.test_set_digest(trial.shards), comparison.image_auroc(bundle, trial.shards, tmp_path)
    assert measured is not None
    champions = []
    for below in (0.012, 0.008, 0.015):
        promote(client, line, challenger(client, line, measured - below, now), trial, MARGIN)
        champions.append(champion(client, line))
    assert champions == [1, 3, 3]


def test_parts_that_the_champion_was_trained_on_do_not_count(
    registry: tuple["MlflowClient", str],
    trial: Trial,
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(register, "FEWEST_NORMALS", 3)
    client, bundle, now = registry[0], load_bundle(tiny_bundle), comparison.test_set_digest(trial.shards)
    normals = [row for row in trial.manifest.rows("test") if row["label"] == "normal"]
    known = {row["group"] for row in normals[:1]}
    former = {"test_set": "of former days", "image_auroc": "0.9"}
    first = added(registry, "moved", bundle, tmp_path, former, [normals[0]["image_id"]])
    promote(client, "moved", first, trial, MARGIN)

    left = [row["group"] not in known or row["label"] != "normal" for row in trial.shards.index.to_pylist()]
    rows = [row for row, stays in enumerate(left) if stays]
    fair, whole = (comparison.image_auroc(bundle, trial.shards, tmp_path, some) for some in (rows, None))
    assert len(rows) < len(left)
    assert fair is not None
    assert whole is not None
    # the recorded figure is on the whole set, and lower: on images that neither has seen the two are equal
    tags = {"test_set": now, "image_auroc": f"{whole - 0.1}"}
    second = added(registry, "moved", replace(bundle, digest="1" * 64), tmp_path, tags, [])
    match = register._match(client, "moved", first.version, second, trial)
    assert match == Match(fair, fair, len(left) - len(rows))
    assert promote(client, "moved", second, trial, MARGIN) == "champion in place of version 1"
    assert models.best_champion(client, "moved", now) == second.image_auroc


@pytest.mark.parametrize(
    ("trained_on", "damaged", "said"),
    [
        ("most", False, r"has 0 normal images of parts that version 1 was not trained on"),
        ("none", True, r"version 1 cannot be opened \(bundle.json: format 1, this version reads"),
        (None, False, "version 1 has another test set and does not say what it was trained on"),
    ],
)
def test_a_champion_that_cannot_be_compared_stays(
    registry: tuple["MlflowClient", str],
    trial: Trial,
    tiny_bundle: Path,
    tmp_path: Path,
    trained_on: str | None,
    damaged: bool,
    said: str,
) -> None:
    client, line, bundle = registry[0], f"odd-{trained_on}", load_bundle(tiny_bundle)
    if damaged:
        bundle = replace(bundle, path=Path(shutil.copytree(tiny_bundle, tmp_path / "old")))
        (bundle.path / "bundle.json").write_text('{"format": 1}')
    former = {"test_set": "of former days", "image_auroc": "0.9"}
    known = [row["image_id"] for row in trial.manifest.rows("test")] if trained_on == "most" else []
    if trained_on is None:
        client.create_registered_model(models.model_name(line))
        first = challenger(client, line, 0.9, "of former days")
    else:
        first = added(registry, line, bundle, tmp_path, former, known)
    promote(client, line, first, trial, MARGIN)
    second = challenger(client, line, 0.9, comparison.test_set_digest(trial.shards))
    verdict = promote(client, line, second, trial, MARGIN)
    assert re.search(said, verdict)
    assert f"'wtflow-{line}', 'champion', 2)" in verdict
    assert champion(client, line) == 1
