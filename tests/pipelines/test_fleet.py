"""Several small lines trained at once: what DVC knows afterwards, and what one failing line does."""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path

import mlflow
import pytest
import yaml

from pipelines import fleet
from pipelines.adapters import dvc_lock, ray_fleet, tracking
from pipelines.environment import RunSettings
from pipelines.lines import line_params
from pipelines.provenance import stage_code
from pipelines.train import features_folder, run_name
from tests.e2e.project import ROOT, Project
from tests.pipelines.fleets import digest, make_fleet
from tests.pipelines.searches import write_project
from wtflow.data.shards import FeatureShards
from wtflow.errors import WTFlowError
from wtflow.training import TrainParams

FLEET = [sys.executable, "-m", "pipelines.fleet", "--cpus", "2"]
LINES = ("line-0", "line-1", "line-2")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Three lines; the last one asks for a level that was not extracted, so that it fails."""
    made = make_fleet(tmp_path_factory.mktemp("fleet"), len(LINES))
    settings = yaml.safe_load((made.root / "params.yaml").read_text())
    settings["lines"]["line-2"]["train"]["fusion"] = {"levels": [1, 3], "stride": 8}  # 1 was not extracted
    (made.root / "params.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return made


def status(project: Project) -> dict[str, object]:
    """What DVC holds for stale, up to the training of the lines."""
    found: dict[str, object] = json.loads(
        project.run("dvc", "status", "--json", "--with-deps", *(f"train@{line}" for line in LINES))
    )
    return found


class Lock:
    """Stands in for DVC, whose lock another command holds for so many tries."""

    def __init__(self, held: int) -> None:
        self.held = held
        self.noted: list[str] = []

    def commit(self, runs: Mapping[str, str]) -> dict[str, str]:
        """Note these lines."""
        if self.held:
            self.held -= 1
            raise WTFlowError("dvc.lock: held")
        self.noted += runs
        return {}


def train_with(monkeypatch: pytest.MonkeyPatch, lock: Lock, error: BaseException | None = None) -> dict[str, str]:
    """A fleet whose lines end at once, the last one with `error`; DVC is told behind each."""

    def ends(*_: object) -> Iterator[ray_fleet.Ended]:
        for line in LINES[:2]:
            yield ray_fleet.Ended(line, 1.0, "run", "digest")
        if error is not None:
            raise error
        yield ray_fleet.Ended(LINES[2], 1.0, "run", "digest")

    monkeypatch.setattr(ray_fleet, "fleet", ends)
    monkeypatch.setattr(tracking, "tracking", nullcontext)
    monkeypatch.setattr(fleet, "commit", lock.commit)
    monkeypatch.setattr(fleet, "COMMIT_EVERY_S", -1)
    monkeypatch.setattr(fleet, "COMMIT_SHARE", 1e9)
    return fleet._train(LINES, RunSettings(), 1)


def test_a_lock_that_another_command_holds_costs_no_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = Lock(held=2)
    assert train_with(monkeypatch, lock) == {}
    assert lock.noted == list(LINES)
    assert capsys.readouterr().out.count("fleet: dvc.lock: held") == 2


def test_a_lock_that_is_held_to_the_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WTFlowError, match="held"):
        train_with(monkeypatch, Lock(held=9))


def test_what_is_trained_is_noted_when_the_fleet_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = Lock(held=1)
    with pytest.raises(KeyboardInterrupt):
        train_with(monkeypatch, lock, KeyboardInterrupt())
    assert lock.noted == list(LINES[:2])


def test_a_line_that_params_yaml_lost_meanwhile_costs_no_other_its_note(
    monkeypatch: pytest.MonkeyPatch, tiny_features: Path, tmp_path: Path
) -> None:
    write_project(tiny_features, tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    for package in ("pipelines", "wtflow"):
        (tmp_path / package).symlink_to(ROOT / package)
    monkeypatch.chdir(tmp_path)
    shards, params = FeatureShards.open(features_folder("tiny")), line_params("tiny", "train", TrainParams)
    noted = list[str]()
    monkeypatch.setattr(dvc_lock, "commit", noted.extend)
    run = run_name("tiny", params, shards, stage_code("train"))
    assert "no line 'gone'" in fleet.commit({"gone": "a run", "tiny": run})["gone"]
    assert noted == ["train@tiny"]


def test_a_line_that_is_named_twice_is_trained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[list[str]]()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(fleet, "stale_lines", lambda lines: asked.append(lines) or ([], {}))
    fleet.main(["solar-mono", "solar-mono"], 1)
    assert asked == [["solar-mono"]]


@pytest.mark.slow
def test_a_line_that_fails_stops_no_other_and_dvc_knows_the_rest(project: Project) -> None:
    printed = project.run(*FLEET, code=1)
    assert "error: fleet: 1 of 3 lines failed:" in printed
    assert "line-2: train.fusion.levels: [1] were not extracted" in printed
    assert "type the same command" in printed
    assert set(status(project)) == {"train@line-2"}
    assert not (project.root / "models/line-2").exists()
    trained = {line: digest(project, line) for line in LINES[:2]}
    assert len(set(trained.values())) == 2
    client = mlflow.MlflowClient(project.environment["MLFLOW_TRACKING_URI"])
    runs = client.search_runs([client.get_experiment_by_name("wtflow").experiment_id])
    assert {run.data.tags["line"]: run.info.status for run in runs} == {
        "line-0": "FINISHED",
        "line-1": "FINISHED",
        "line-2": "FAILED",
    }
    assert {run.data.tags.get("bundle_digest") for run in runs} == {*trained.values(), None}
    assert list((project.root / ".wtflow/train").glob("line-[01]-*")) == []

    # the same bundle as the stage's: DVC is made to run it
    for folder in ("models", ".wtflow/fields"):
        shutil.rmtree(project.root / folder / "line-0")
    curve = (project.root / "plots/line-0.csv").read_bytes()
    project.run("dvc", "repro", "--force", "--single-item", "train@line-0")
    assert digest(project, "line-0") == trained["line-0"]
    assert (project.root / "plots/line-0.csv").read_bytes() == curve

    settings = (project.root / "params.yaml").read_text()
    mended = yaml.safe_load(settings)
    mended["lines"]["line-2"]["train"]["fusion"]["levels"] = [2, 3]
    (project.root / "params.yaml").write_text(yaml.safe_dump(mended, sort_keys=False))
    printed = project.run(*FLEET)
    assert "fleet: 2 of 3 lines up to date, 1 to train" in printed
    assert status(project) == {}
    assert "0 to train" in project.run(*FLEET)

    # code that changes afterwards makes every line stale, without a `dvc repro` in between
    source = project.root / "pipelines/train.py"
    source.write_text(source.read_text() + "# changed\n")
    asked = "from pipelines.fleet import stale_lines; print(stale_lines(['line-0', 'line-1']))"
    assert project.run(sys.executable, "-c", asked) == "(['line-0', 'line-1'], {})\n"
