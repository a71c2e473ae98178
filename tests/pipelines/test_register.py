import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipelines import comparison, register
from pipelines.adapters import mlflow_registry as models
from pipelines.adapters.tracking import tracking
from pipelines.register import promote
from wtflow.bundle import load_bundle
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


def challenger(client: "MlflowClient", line: str, auroc: float | None, test_set: str = TEST_SET) -> models.Registered:
    """A new version that was measured on `test_set`."""
    tags = {"bundle_digest": "0" * 64, "test_set": test_set, "image_auroc": json.dumps(auroc)}
    added = client.create_model_version(models.model_name(line), "file:///nowhere", tags=tags)
    return models.registered(client, line, int(added.version))


def champion(client: "MlflowClient", line: str) -> int | None:
    return models.aliases(client, line).get(models.CHAMPION)


def test_the_margin_does_not_add_up_over_promotions(client: "MlflowClient", tiny_test: FeatureShards) -> None:
    client.create_registered_model(models.model_name("steps"))
    champions, verdicts = [], []
    for auroc in (0.900, 0.895, 0.889, 0.891, 0.950, 0.941, 0.935):
        verdicts.append(promote(client, "steps", challenger(client, "steps", auroc), tiny_test, MARGIN))
        champions.append(champion(client, "steps"))
    # 0.889 and 0.935 are within the margin of the champion that they met, but not of the best
    assert champions == [1, 2, 2, 4, 5, 6, 6]
    assert verdicts[:2] == ["champion", "champion in place of version 1"]
    assert "0.8890 is more than 0.01 below 0.9000" in verdicts[2]
    assert "version 2 stays (now at 0.8950)" in verdicts[2]


def test_a_model_that_a_person_made_champion_is_the_one_to_beat(
    client: "MlflowClient", tiny_test: FeatureShards
) -> None:
    name = models.model_name("by-hand")
    client.create_registered_model(name)
    promote(client, "by-hand", challenger(client, "by-hand", 0.80), tiny_test, MARGIN)
    client.set_registered_model_alias(name, models.CHAMPION, str(challenger(client, "by-hand", 0.95).version))
    promote(client, "by-hand", challenger(client, "by-hand", 0.90), tiny_test, MARGIN)
    assert champion(client, "by-hand") == 2


def test_a_champion_that_another_process_makes_meanwhile_is_the_one_to_beat(
    client: "MlflowClient", tiny_test: FeatureShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.create_registered_model(models.model_name("race"))
    promote(client, "race", challenger(client, "race", 0.90), tiny_test, MARGIN)
    slow, fast = challenger(client, "race", 0.91), challenger(client, "race", 0.95)
    measure = register._auroc_of_champion

    def overtaken(*arguments: Any) -> float | None:
        monkeypatch.undo()
        models.crown(client, "race", fast, None)
        return measure(*arguments)

    monkeypatch.setattr(register, "_auroc_of_champion", overtaken)
    verdict = promote(client, "race", slow, tiny_test, MARGIN)
    assert f"version {fast.version} stays (now at 0.9500)" in verdict
    assert champion(client, "race") == fast.version


def test_the_best_that_is_noted_never_falls(client: "MlflowClient") -> None:
    client.create_registered_model(models.model_name("best"))
    for auroc in (0.95, 0.90):
        models.crown(client, "best", challenger(client, "best", auroc), None)
    assert models.best_champion(client, "best", TEST_SET) == 0.95


def test_without_anomalies_the_champion_stays(client: "MlflowClient", tiny_test: FeatureShards) -> None:
    client.create_registered_model(models.model_name("normals"))
    first, second = (challenger(client, "normals", None) for _ in range(2))
    assert promote(client, "normals", first, tiny_test, MARGIN) == "champion"
    assert "no anomalous images" in promote(client, "normals", second, tiny_test, MARGIN)
    assert champion(client, "normals") == first.version
    assert promote(client, "normals", first, tiny_test, MARGIN) == "already champion"


def test_on_a_new_test_set_the_champion_is_measured_and_its_figure_is_kept(
    registry: tuple["MlflowClient", str],
    tiny_test: FeatureShards,
    tiny_bundle: Path,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    client, experiment = registry
    bundle, line = load_bundle(tiny_bundle), "tiny"
    (tmp_path / "index.html").touch()
    tags = {"bundle_digest": bundle.digest, "test_set": "of former days", "image_auroc": "0.2"}
    models.add_version(client, experiment, bundle, {}, tmp_path / "index.html", tags)
    assert [str(one.message) for one in recwarn if "input example" in str(one.message)] == []
    first = models.version_of(client, line, bundle.digest)
    assert first is not None
    assert promote(client, line, first, tiny_test, MARGIN) == "champion"

    now, measured = comparison.test_set_digest(tiny_test), comparison.image_auroc(bundle, tiny_test, tmp_path)
    assert measured is not None
    champions = []
    for below in (0.012, 0.008, 0.015):
        promote(client, line, challenger(client, line, measured - below, now), tiny_test, MARGIN)
        champions.append(champion(client, line))
    assert champions == [1, 3, 3]
